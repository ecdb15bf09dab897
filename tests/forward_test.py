"""Reading each prompt once, and cutting rows to their length: equal to reading every row whole, for less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlrl import batches, home_rows, meshes, reductions, runs, scoring, updates
from mlrl.generation import generate
from mlrl.loops import checks, online
from mlrl.losses import policy, values
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.optimizers import adamw
from mlrl.pods.collectives import traffic
from mlrl.types import Prompts, Refused, TrainState
from tests.loops import worlds

N, G, P, T, V = 3, 4, 6, 8, 13
CONFIG = Config(vocabulary_size=V, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24, windows=(0, 3),
                value_head=True)  # fmt: skip
WITH_CRITIC = dataclasses.replace(CONFIG, critic_layers=1)
LOSSES = (policy.ppo_clip, values.value_loss)
FORWARDS = {"whole": scoring.whole_rows(), "shared": scoring.shared_prompts()}


@functools.cache
def rows(config):
    """Prompts of three lengths, completions of many, and parameters in which nothing is zero or one."""
    model = Transformer(config)
    params = initialize(model, jax.random.key(0))
    moved = lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    params = jax.jit(functools.partial(jax.tree.map, moved))(params)
    valid = jnp.arange(P)[None] >= jnp.asarray([0, 2, 4])[:, None]
    tokens = jax.random.randint(jax.random.key(1), (N, P), 0, V) * valid
    zeros = jnp.zeros(N, jnp.int32)
    prompts = Prompts(tokens, valid, zeros, zeros, ())
    sample = functools.partial(generate, model, max_completion_tokens=T, eos_ids=(3, 4), pad_id=0, group_size=G)
    rollout = jax.jit(sample)(params, prompts, jax.random.key(2))
    lengths = set(np.asarray(rollout.action_mask.sum(axis=1)).tolist())
    assert len(lengths) > 3 and max(lengths) == T, "the rows are too alike to show anything"
    batch = batches.unannotated(rollout).replace(
        old_log_probs=rollout.behavior_log_probs - 0.1, values=jnp.zeros_like(rollout.behavior_log_probs),
        advantages=jax.random.normal(jax.random.key(3), (N * G, P + T)), returns=jnp.ones((N * G, P + T)),
    )  # fmt: skip
    return model, params, prompts, batch


@functools.cache
def gradients(config, forward, **knobs):
    """Gradients and metrics of a PPO loss with values, jitted."""
    model, params, prompts, batch = rows(config)
    batch = batch.replace(weights=reductions.token_mean(batch.mask), token_weights=reductions.token_mean(batch.mask))
    call = functools.partial(
        updates.gradients, losses=LOSSES, prepare=lambda params: forward.prepare(model, params, prompts),
        score_fn=lambda params, rollout, *more: forward.score(model, params, prompts, rollout, *more, temperature=1.3),
        **knobs,
    )  # fmt: skip
    return jax.jit(call)(params, batch)


def assert_close(found, wanted):
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("config", [CONFIG, WITH_CRITIC], ids=["values", "critic"])
def test_a_prompt_read_once_gives_the_same_scores_and_gradients(config):
    model, params, prompts, batch = rows(config)
    score = lambda f, p, **how: f.score(model, p, prompts, batch.rollout, *f.prepare(model, p, prompts),
                                        with_logits=True, chunk_columns=3, top_tokens=2, **how)  # fmt: skip
    seen = [jax.jit(functools.partial(score, f))(params) for f in FORWARDS.values()]
    assert_close(seen[1], seen[0])
    assert float(jnp.abs(seen[0].values).max()) > 0.1
    assert_close(gradients(config, FORWARDS["shared"]), gradients(config, FORWARDS["whole"]))
    assert_close(jax.jit(functools.partial(score, FORWARDS["shared"], chunk_vocabulary=5))(params), seen[0])


# Prompts read once and cut rows come together in the test of minibatches below, too.
@pytest.mark.parametrize("forward", ["whole", pytest.param("shared", marks=pytest.mark.slow)])
def test_rows_cut_to_their_length_give_the_same_gradients(forward):
    plain = gradients(CONFIG, FORWARDS["whole"])
    assert_close(gradients(CONFIG, FORWARDS[forward], micro_batch_rows=4, bucket_columns=(P + 2, P + 5, P + T)), plain)


def test_rows_on_several_devices_find_their_prompts():
    """Also where a row lies on another device than its prompt, after a shuffle."""
    model, params, prompts, batch = rows(CONFIG)
    batch = batch.replace(weights=reductions.token_mean(batch.mask), token_weights=reductions.token_mean(batch.mask))
    forward = FORWARDS["shared"]

    @jax.jit
    def grads(params, prompts, batch):
        return updates.gradients(
            params, meshes.split_rows(batch), losses=LOSSES, micro_batch_rows=2 * N, bucket_columns=(P + T,),
            prepare=lambda params: forward.prepare(model, params, meshes.split_rows(prompts)),
            score_fn=lambda params, rollout, *more: forward.score(model, params, prompts, rollout, *more),
        )[0]  # fmt: skip

    alone = grads(params, prompts, batch)
    with meshes.use(meshes.mesh(devices=N)):
        assert_close(grads(params, prompts, batch), alone)
        assert_close(grads(params, prompts, jax.tree.map(lambda x: x[::-1], batch)), alone)


def test_rows_that_stay_at_home_are_taken_without_sending_any():
    table, own = jnp.arange(24.0).reshape(8, 3), jnp.asarray([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]])
    rows = (own + 2 * jnp.arange(4)[:, None]).reshape(-1)
    with meshes.use(meshes.mesh(devices=4)) as mesh:
        spread = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
        take = jax.jit(home_rows.take_own)
        text = take.lower(spread(table), spread(own)).compile().as_text()
        assert not traffic(text).sent
        np.testing.assert_array_equal(take(spread(table), spread(own)), table[rows])
        anywhere = jax.jit(home_rows.take)
        assert traffic(anywhere.lower(spread(table), spread(rows)).compile().as_text()).sent
        for wanted in (rows, rows[::-1]):
            np.testing.assert_array_equal(anywhere(spread(table), spread(wanted)), table[wanted])


def test_a_group_stays_whole_when_rows_are_sorted_by_length():
    _, _, _, batch = rows(CONFIG)
    numbered = batch.replace(old_log_probs=jnp.arange(N * G, dtype=jnp.float32)[:, None] + 0 * batch.old_log_probs)
    together = []

    def noted(scores, piece):
        jax.debug.callback(lambda x: together.append(np.asarray(x)), piece.old_log_probs[:, 0], ordered=True)
        return jnp.sum(scores.log_probs * piece.weights), {}

    model, params, prompts, _ = rows(CONFIG)
    jax.jit(functools.partial(
        updates.gradients, losses=(noted,), micro_batch_rows=G, bucket_columns=(P + 5, P + T), unit_rows=G,
        score_fn=functools.partial(scoring.score, model)))(params, numbered)  # fmt: skip
    jax.effects_barrier()
    assert sorted(int(piece[0]) for piece in together) == [0, G, 2 * G]
    for piece in together:
        np.testing.assert_array_equal(piece, piece[0] + np.arange(G))


def test_a_bucket_holds_what_it_must_and_no_more():
    _, _, _, batch = rows(CONFIG)
    columns = np.asarray(updates.columns_needed(batch))
    for row in range(N * G):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        width = updates.in_buckets(lambda b: jnp.int32(b.mask.shape[1]), (P + 2, P + 5, P + T))(one)
        assert int(width) == next(c for c in (P + 2, P + 5, P + T) if c >= columns[row])


def test_a_prompt_read_once_costs_less():
    """G rows of P + T columns: P + G (T - 1) columns of the trunk in place of G (P + T)."""
    config = Config(vocabulary_size=8, width=64, layers=2, heads=2, kv_heads=1, head_width=32, mlp_width=256)
    model, (n, g, p, t) = Transformer(config), (2, 8, 24, 7)
    zeros = jnp.zeros(n, jnp.int32)
    prompts = Prompts(jnp.ones((n, p), jnp.int32), jnp.ones((n, p), bool), zeros, zeros, ())
    params = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
    rollout = jax.eval_shape(lambda params: generate(
        model, params, prompts, jax.random.key(0), max_completion_tokens=t, eos_ids=(3,), pad_id=0, group_size=g,
    ), params)  # fmt: skip

    def flops(forward):
        def loss(params, rollout):
            prepared = forward.prepare(model, params, prompts)
            return forward.score(model, params, prompts, rollout, *prepared).log_probs.sum()

        return jax.jit(jax.grad(loss)).lower(params, rollout).cost_analysis()["flops"]

    columns = (p + g * (t - 1)) / (g * (p + t))
    assert flops(FORWARDS["shared"]) / flops(FORWARDS["whole"]) == pytest.approx(columns, rel=0.15)


def test_rows_that_do_not_begin_with_their_prompt_are_not_readable():
    _, _, prompts, batch = rows(CONFIG)
    rollout = batch.rollout
    other_token = rollout.replace(tokens=rollout.tokens.at[5, P - 1].add(1))
    other_padding = rollout.replace(tokens=rollout.tokens.at[9, 0].add(1))
    other_length = rollout.replace(valid=rollout.valid.at[7, 0].set(~rollout.valid[7, 0]))
    for changed, row in ((other_token, 5), (other_length, 7), (other_padding, -1)):
        for name, forward in FORWARDS.items():
            found = forward.readable(prompts, changed).tolist()
            assert found == [not (name == "shared" and b == row) for b in range(N * G)]


def test_a_run_whose_rows_do_not_begin_with_their_prompt_stops_and_says_what_to_set(tmp_path):
    def shifted(*args, **kwargs):
        rollout = worlds.ROLLOUT(*args, **kwargs)
        return rollout.replace(tokens=jnp.roll(rollout.tokens, 1, axis=1))

    experiment = worlds.sums(rollout_fn=shifted, evaluations=(), num_steps=1)
    with runs.Run(tmp_path, experiment.recording) as run, pytest.raises(runs.Stopped, match="@scoring.whole_rows"):
        online.train(experiment, run)
    assert run._state.step == 1 and jax.tree.all(jax.tree.map(
        np.array_equal, run._state.params, online.initial_state(online.prepare(experiment)).params
    )), "something was learned from rows that could not be read"  # fmt: skip


@pytest.mark.parametrize(
    "buckets, words", [((1, 2), "add 3"), ((2, 1, 3), "ascending"), ((0, 3), "at least 1"), (3, "a tuple")]
)
def test_buckets_that_do_not_cover_are_refused(buckets, words):
    with pytest.raises(Refused, match=words):
        checks.buckets_cover(buckets, 3)


def test_an_experiment_whose_buckets_do_not_cover_is_refused():
    with pytest.raises(Refused, match="add 3"):
        online.prepare(worlds.sums(length_buckets=(1, 2)))


def test_a_step_is_the_same_however_rows_are_read():
    """The same tokens, and parameters equal to rounding, whichever way the learner reads."""
    after = []
    for changes in ({"forward": scoring.whole_rows()}, {}, {"length_buckets": (1, 2, 3), "micro_batch_rows": 4}):
        parts = online.prepare(worlds.sums(evaluations=(), **changes))
        with meshes.use(parts.experiment.mesh()):
            state = online.initial_state(parts)
            prompts = online.prompt_source(parts)(state, 0)
            after.append(jax.jit(functools.partial(online.whole_step, parts))(state, prompts))
    for state, _, batch in after[1:]:
        np.testing.assert_array_equal(batch.rollout.tokens, after[0][2].rollout.tokens)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, after[0][0].params)


def test_minibatches_of_micro_batches_in_buckets_end_where_whole_rows_end():
    model, params, prompts, batch = rows(CONFIG)
    optimizer = adamw(learning_rate=0.01)
    state = TrainState(jnp.int32(0), jax.random.key(1), params, optimizer.init(params), (), (), (), {}, jnp.int32(0))

    def updated(forward, **knobs):
        step = functools.partial(
            updates.update, losses=LOSSES, optimizer=optimizer, reduction=reductions.token_mean, minibatches=3,
            prepare=lambda p: forward.prepare(model, p, prompts),
            score_fn=lambda p, rollout, *more: forward.score(model, p, prompts, rollout, *more), **knobs,
        )  # fmt: skip
        return jax.jit(step)(state, batch, jax.random.key(0))

    (whole, _), (cut, metrics) = (updated(FORWARDS["whole"]),
                                  updated(FORWARDS["shared"], micro_batch_rows=2, bucket_columns=(P + 3, P + T)))
    assert float(metrics["grad_norm"]) > 0.01 and float(metrics["skipped_updates"]) == 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), cut.params, whole.params)
