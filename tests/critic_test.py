"""A critic with a trunk of its own: its values, its gradients, its beginning, and where it is not computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import metrics, optimizers, updates
from mlrl.batches import unannotated
from mlrl.generation import generate
from mlrl.loops import describe
from mlrl.loops.start import critic_from_policy, own_start, teacher
from mlrl.losses import policy, values
from mlrl.models.transformer import Config, Transformer, initialize, without_values
from mlrl.monitoring import value_metrics
from mlrl.reductions import token_mean
from mlrl.scoring import score
from mlrl.types import Prompts, Refused, Rewards, Rollout, TrainState

ALONE = Config(vocabulary_size=11, width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24)
BOTH = dataclasses.replace(ALONE, value_head=True, critic_layers=1, tied_head=False)
MODEL = Transformer(BOTH)
B, P, L = 4, 3, 8
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
tell = jit(functools.partial(score, MODEL))


def random_like(tree, seed=0):
    """Random arrays of the shapes of a tree, around 1 for scales; the value head is not zero, as a new one is."""
    rng = np.random.default_rng(seed)
    draw = lambda path, x: np.float32(0.3 * rng.normal(size=x.shape) + ("scale" in str(path)))
    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.cache
def params():
    return random_like(jax.eval_shape(functools.partial(initialize, MODEL), jax.random.key(0)))


def without_critic(tree):
    return {name: part for name, part in tree.items() if name != "critic"}


@functools.cache
def rollout():
    """Rows of 2 to 5 actions after prompts of 3 columns, the first row's prompt padded by 1."""
    columns, lengths = np.arange(L)[None], np.asarray([5, 2, 3, 4])[:, None]
    valid = columns < P + lengths
    action = valid & (columns >= P)
    valid[0, 0] = False
    tokens = np.random.default_rng(2).integers(0, 11, (B, L), np.int32)
    zeros, none = np.zeros((B,), np.int32), np.zeros((B, L), np.int32)
    rows = Rollout(tokens, valid, action, np.where(action, np.float32(-2.4), np.float32(0)), none, zeros, zeros,
                   np.zeros((B,), bool), zeros)  # fmt: skip
    return jax.tree.map(jnp.asarray, rows).check()


def batch():
    """Rows whose every token has an advantage of 1, an old value of 0 and the number of its column for a return."""
    rewards = Rewards(jnp.zeros((B, L)), jnp.zeros(B), jnp.ones(B, bool), {})
    made = unannotated(rollout(), rewards)
    returns = jnp.broadcast_to(jnp.arange(L, dtype=jnp.float32), (B, L))
    weights = token_mean(made.mask)
    return made.replace(old_log_probs=rollout().behavior_log_probs, values=jnp.zeros((B, L)), returns=returns,
                        advantages=jnp.ones((B, L)), weights=weights, token_weights=weights).check()  # fmt: skip


def scored():
    return tell(params(), rollout())


def test_the_critics_values_are_those_of_a_value_model_with_its_weights():
    model = Transformer(dataclasses.replace(BOTH, critic_layers=0, tied_head=True))
    alone = jit(functools.partial(score, model))(params()["critic"], rollout())
    np.testing.assert_array_equal(scored().values, alone.values)
    assert np.unique(np.asarray(alone.values)[np.asarray(rollout().valid)]).size > B


def of_actions(rows):
    """The values of the actions, in the last columns; 0 elsewhere."""
    return jnp.where(rows.action_mask, tell(params(), rows).values, 0.0)[:, -L:]


def test_a_value_is_of_the_state_before_its_token():
    one, other = (of_actions(rollout().replace(tokens=rollout().tokens.at[0, 5].set(token)))[0] for token in (1, 2))
    np.testing.assert_array_equal(one[:6], other[:6])
    assert float(abs(one[6] - other[6])) > 1e-4 and one[3:6].all()


def test_padding_and_unscored_columns_change_no_value():
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (2, 0))) if x.ndim == 2 else x, rollout())
    wider = wider.replace(tokens=wider.tokens.at[:, :2].set(7))
    np.testing.assert_allclose(of_actions(wider), of_actions(rollout()), atol=1e-5)
    late = jit(functools.partial(score, MODEL, first_column=P))(params(), rollout()).values
    np.testing.assert_allclose(late[:, P:], scored().values[:, P:], atol=1e-6)
    assert not late[:, :P].any() and scored().values[1, 1:P].all()


def state_of(weights, opt_state=()):
    return TrainState(jnp.int32(0), jax.random.key(1), weights, opt_state, (), (), (), {}, jnp.int32(0))


def moved(model, weights):
    """Which parts of the parameters the gradients of the policy's and of the values' loss reach."""
    gradients = functools.partial(updates.gradients, batch=batch(), score_fn=functools.partial(score, model))
    both = jit(lambda p: [gradients(p, losses=(loss,))[0] for loss in (policy.ppo_clip, values.value_loss)])(weights)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(both))
    reached = lambda part: any(bool(x.any()) for x in jax.tree.leaves(part))
    return [{name for name, part in gradient.items() if reached(part)} for gradient in both]


def test_policy_and_critic_share_no_gradient():
    of_policy, of_values = moved(MODEL, params())
    assert of_policy == set(params()) - {"critic"} and of_values == {"critic"}
    shared = Transformer(dataclasses.replace(BOTH, critic_layers=0))  # the control: a value head trains its trunk
    of_policy, of_values = moved(shared, without_critic(params()) | {"value": params()["critic"]["value"]})
    assert of_policy == set(params()) - {"critic"} and of_values == set(params()) - {"critic", "head"} | {"value"}


def products(function, *args):
    """How many matrix products the compiled program has."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return sum(text.count(f" {kind}(") for kind in ("dot", "convolution")) + text.count("__onednn$matmul")


def test_a_critic_is_not_computed_where_nobody_reads_values():
    read = lambda name, model: lambda p, r: getattr(score(model, p, r), name)  # noqa: E731
    policy_only = products(read("log_probs", without_values(MODEL)), without_critic(params()), rollout())
    assert policy_only > 0
    assert products(read("log_probs", MODEL), params(), rollout()) == policy_only
    of_values = products(read("values", MODEL), params(), rollout())
    together = products(functools.partial(score, MODEL), params(), rollout())
    assert of_values > 0 and together == of_values + policy_only


def test_sampler_and_reference_need_no_critic():
    prompts = Prompts(rollout().tokens[:, :P], rollout().valid[:, :P], jnp.zeros(B, jnp.int32),
                      jnp.zeros(B, jnp.int32), ()).check()  # fmt: skip
    sample = jit(functools.partial(generate, MODEL, max_completion_tokens=2, eos_ids=(0,), pad_id=0))
    sampled = [sample(p, prompts, jax.random.key(3)).tokens for p in (params(), without_critic(params()))]
    np.testing.assert_array_equal(*sampled)
    reference = own_start()
    model = reference.model(MODEL)
    frozen = reference.params(params(), model, jax.random.key(0))
    assert set(params()) - set(frozen) == {"critic"}
    said = jit(functools.partial(score, model))(frozen, rollout())
    np.testing.assert_array_equal(said.log_probs, scored().log_probs)
    assert not said.values.any()
    assert teacher(model=BOTH, start=initialize).model(MODEL) == model


def test_a_critic_changes_nothing_of_the_first_policy():
    both = jit(lambda key: (initialize(MODEL, key), initialize(without_values(MODEL), key)))
    with_critic, alone = both(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, without_critic(with_critic), alone)
    assert not with_critic["critic"].keys() & {"head", "critic"}
    assert not np.array_equal(with_critic["critic"]["embedding"]["embedding"], alone["embedding"]["embedding"])


def test_a_critic_may_begin_as_the_policy():
    def start(model, key):
        assert not model.config.value_head and not model.config.critic_layers
        return jax.tree.map(jnp.asarray, random_like(jax.eval_shape(functools.partial(initialize, model), key)))

    made = critic_from_policy(start=start)(MODEL, jax.random.key(4))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, params())]
    assert shapes[0] == shapes[1]
    trunk = {name: part for name, part in made["critic"].items() if name != "value"}
    jax.tree.map(np.testing.assert_array_equal, trunk, {name: made[name] for name in trunk})
    assert not any(x.any() for x in jax.tree.leaves(made["critic"]["value"]))
    jax.jit(lambda p: p, donate_argnums=0)(made)  # no buffer twice
    deeper = Transformer(dataclasses.replace(BOTH, critic_layers=2))
    with pytest.raises(Refused, match="all of the policy's 1 layers, but Config.critic_layers is 2"):
        critic_from_policy()(deeper, jax.random.key(4))


def test_a_critic_without_a_value_head_is_refused():
    with pytest.raises(Refused, match="critic_layers is 2.*set Config.value_head = True"):
        Config(critic_layers=2)
    with pytest.raises(Refused, match="Config.critic_layers must be a whole number of at least 0"):
        Config(value_head=True, critic_layers=-1)


def test_the_description_counts_the_critic():
    # embedding 11*16; a layer of 16*4*8 + 16*16 + 16*48 + 24*16 and two norms; the last norm; the value head
    count = 11 * 16 + (512 + 256 + 768 + 384 + 32) + 16 + 17
    told = describe.the_model(BOTH, state_of(params()))
    assert f"a critic of 1 layers of its own: {count:,} of the parameters" in told


def explained_variance(rows):
    return float(value_metrics(rows, frozenset({"Batch.values"}))["value/explained_variance"])


def test_explained_variance_by_hand():
    given = batch()
    mask = given.mask & (jnp.arange(L) < P + 2)  # columns 3 and 4 of every row: returns 3 and 4, variance 1/4
    explained = lambda v: explained_variance(given.replace(mask=mask, values=v))
    outside = jnp.where(mask, 0.0, jnp.nan)
    assert explained(given.returns + 5 + outside) == pytest.approx(1.0)
    assert explained(jnp.zeros((B, L)) + outside) == pytest.approx(0.0)
    assert explained(0.5 * given.returns + outside) == pytest.approx(1 - (1 / 16) / (1 / 4))
    assert explained(-given.returns) == pytest.approx(1 - 1 / (1 / 4))
    assert np.isnan(explained_variance(given.replace(returns=jnp.full((B, L), 0.3))))
    host = metrics.explained_variance(given.returns**2, given.returns, given.mask)
    assert explained_variance(given.replace(values=given.returns**2)) == pytest.approx(host, rel=1e-5)
    assert value_metrics(given, frozenset({"Scores.values"})) == {}


def test_a_critic_learns_the_returns_while_the_policy_stands_still():
    """Returns are the column's number, which positions tell: fitted by the critic alone, in the update's own code."""
    optimizer = optimizers.policy_and_critic(
        policy=optimizers.frozen_first(optimizer=optimizers.adamw(), steps=60),
        critic=optimizers.adamw(learning_rate=1e-2),
    )
    state = state_of(params(), optimizer.init(params()))
    step = jit(functools.partial(
        updates.update, score_fn=functools.partial(score, MODEL), losses=(policy.ppo_clip, values.value_loss),
        optimizer=optimizer, reduction=token_mean, epochs=60,
    ))  # fmt: skip
    after, _ = step(state, batch(), jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, without_critic(after.params), without_critic(params()))
    ends = [
        explained_variance(batch().replace(values=tell(weights, rollout()).values))
        for weights in (params(), after.params)
    ]
    assert ends[0] < 0.5 and ends[1] > 0.9
    again, _ = step(after, batch(), jax.random.key(2))
    pairs = zip(*(jax.tree.leaves(without_critic(weights)) for weights in (again.params, params())))
    assert all(bool((x != y).any()) for x, y in pairs)
