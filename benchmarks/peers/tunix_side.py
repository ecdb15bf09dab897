"""tunix's turns, in tunix's environment: whole steps of its GRPOLearner, or a part of them.

Decode is its vanilla sampler, and prefill the same for one new token; scoring is what its learner calls for log-probs;
update is a whole step less its rollout.

    python tunix_side.py CASE MODEL ROWS FOLDER MICRO_BATCH_ROWS DEVICES
"""

import os
import sys
import time
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
import shapes
from flax import nnx
from tunix.generate import sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

VERSIONS = {name: version(name) for name in ("google-tunix", "jax", "flax")}


class Ids:
    """A tokenizer in whose text every id is a word of its own."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        return 0  # none is put in front

    def eos_id(self):
        return shapes.EOS

    def pad_id(self):
        return shapes.PAD


def reward(prompts, completions, **_):
    """The share of even ids, as the other sides reward it."""
    rows = [[int(word) for word in text.split()] for text in completions]
    return [sum(token % 2 == 0 for token in row) / max(1, len(row)) for row in rows]


def texts(rows, model, number):
    return [" ".join(map(str, ids)) for ids in shapes.prompt_ids(rows, model, number)]


def loaded(model, folder, mesh):
    """The weights that all sides start from, in fp32."""
    config = llama.ModelConfig(
        num_layers=model.layers, vocab_size=model.vocabulary, embed_dim=model.width, hidden_dim=model.mlp_width,
        num_heads=model.heads, head_dim=model.head_width, num_kv_heads=model.kv_heads, rope_theta=int(model.theta),
        norm_eps=model.eps, weight_tying=True,
    )  # fmt: skip
    return llama_params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)


def steps(turns, model, rows, folder, micro_batch_rows, mesh, only_update):
    """Whole steps: generation, reward, one optimizer step on all rows. The learner asks for its prompts in turns."""
    policy = loaded(model, folder, mesh)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=policy, tokenizer=Ids(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(shapes.LEARNING_RATE), eval_every_n_steps=10**9, max_steps=10**9,
                mini_batch_size=rows.prompts, train_micro_batch_size=micro_batch_rows // rows.group,
                rollout_micro_batch_size=rows.prompts, compute_logps_micro_batch_size=rows.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=rows.new_tokens, max_prompt_length=rows.prompt_tokens, temperature=1.0,
                top_p=1.0, kv_cache_size=rows.prompt_tokens + rows.new_tokens, eos_tokens=[shapes.EOS],
            ),
        ),
    )  # fmt: skip
    settings = grpo_learner.GRPOConfig(num_generations=rows.group, num_iterations=1, beta=0.0)
    learner = grpo_learner.GRPOLearner(cluster, settings, reward)
    parts = {}
    cluster.generate = timed(parts, cluster.generate)

    def prompts():
        yield {"prompts": np.asarray(texts(rows, model, 0))}
        learned(cluster)
        turns.ready(**VERSIONS)
        number = 0
        while turns.wait():
            number += 1
            parts.clear()
            start = time.perf_counter()
            yield {"prompts": np.asarray(texts(rows, model, number))}
            learned(cluster)
            seconds = time.perf_counter() - start
            if only_update:
                turns.done(seconds - parts["rollout"])
            else:
                turns.done(seconds, parts=dict(parts))
        os._exit(0)  # the learner would go on to write its metrics

    learner.train(prompts())


def learned(cluster):
    """Waits for the update that was sent to the device."""
    jax.block_until_ready(nnx.state(cluster.actor_trainer.model))


def timed(parts, generate):
    def call(*args, **kwargs):
        start = time.perf_counter()
        found = generate(*args, **kwargs)
        parts["rollout"] = parts.get("rollout", 0.0) + time.perf_counter() - start
        return found

    return call


def scoring(turns, model, rows, folder, mesh):
    """Log-probs of completions of all rows at once, as the learner asks for them."""
    graph, state = nnx.split(loaded(model, folder, mesh))
    at = np.arange(rows.count)[:, None] + 5 * np.arange(rows.new_tokens)
    completions = jnp.asarray(shapes.FIRST + at % (model.vocabulary - shapes.FIRST), jnp.int32)

    def turn(number):
        prompts = jnp.repeat(jnp.asarray(shapes.prompt_ids(rows, model, number), jnp.int32), rows.group, axis=0)
        found = common.compute_per_token_logps(graph, state, prompts, completions, shapes.PAD, shapes.EOS)
        jax.block_until_ready(found)

    turns.serve(turn, **VERSIONS)


def decoding(turns, model, rows, folder, mesh, new_tokens):
    """The sampler alone, with a cache that is no longer than the rows: every row has a prompt, as it wants them."""
    cache = sampler.CacheConfig(rows.prompt_tokens + new_tokens, model.layers, model.kv_heads, model.head_width)
    sample = sampler.Sampler(loaded(model, folder, mesh), Ids(), cache)

    def turn(number):
        out = sample([text for text in texts(rows, model, number) for _ in range(rows.group)],
                     max_generation_steps=new_tokens, max_prompt_length=rows.prompt_tokens, temperature=1.0,
                     top_p=1.0, seed=number, eos_tokens=[shapes.EOS])  # fmt: skip
        assert rows.ending or {len(tokens) for tokens in out.tokens} == {new_tokens}

    turns.serve(turn, **VERSIONS)


def main(case, model, rows, folder, micro_batch_rows, devices):
    turns = protocol.Turns()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[: int(devices)]).reshape(-1, 1), ("fsdp", "tp"))
    given = (turns, shapes.MODELS[model], shapes.ROWS[rows], folder)
    with mesh:
        if case in ("step", "update"):
            steps(*given, int(micro_batch_rows), mesh, only_update=case == "update")
        elif case == "scoring":
            scoring(*given, mesh)
        else:
            decoding(*given, mesh, new_tokens=1 if case == "prefill" else shapes.ROWS[rows].new_tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
