"""One policy proposes tasks and solves them, in one rollout: a proposal, and a group of attempts at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.models.transformer import Transformer
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import Sampling
from mlrl.tasks import executed, triplets
from mlrl.tasks.triplets import Triplet
from mlrl.types import Array, Params, Prompts, Refused, Rollout, RolloutFn, Vocabulary


def propose_and_solve(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    vocabulary: Vocabulary,
    sampling: Sampling,
    group_size: int,
    policy_version: Array | int = 0,
    rollout_fn: RolloutFn = single_turn,
    seconds: float = 1.0,
) -> Rollout:
    """A proposal for every prompt, then `group_size` - 1 attempts to solve it.

    The proposals are validated on the host, by running them, between two samplings in one program. Where one is no
    valid triplet, the attempts are at the prompt's fallback: this step's new tasks first, filled up from the buffer.

    The rows of prompt n are its proposal, with role 2k and a group of its own, then the attempts, with role 2k + 1 and
    the group n; k is the kind of triplet, `prompts.source`. Attempts begin with prompts of their own, as wide as those
    given: the learner must read every row whole (scoring.whole_rows).

    A group of one is what `rollout_fn` makes of it, so that evaluations, which sample row by row, are not touched.

    Args:
      prompts: [N,P] of triplets.propose.
      vocabulary, sampling, group_size, policy_version: given by the loop.
      rollout_fn: makes the rows of one kind: the groups in order.
      seconds: limit of running one proposal.
    Returns: Rollout with B = N * group_size rows.
    Raises: Refused, if the prompts are not those of triplets.propose.

    Reference: Zhao et al. 2025, "Absolute Zero". There, solve rates come from samples of their own, which are not
    trained on, and every task has one attempt that is; here the attempts are both.
    """
    given = dict(vocabulary=vocabulary, sampling=sampling, policy_version=policy_version)
    if group_size == 1:
        return rollout_fn(model, params, prompts, key, group_size=1, **given)
    if not isinstance(prompts.example, dict) or not {"reference", "fallback"} <= prompts.example.keys():
        raise Refused("propose_and_solve needs the prompts of triplets.propose: set Experiment.task to it")
    (n, width), attempts = prompts.tokens.shape, group_size - 1
    propose_key, solve_key = jax.random.split(key)
    proposed = rollout_fn(model, params, prompts, propose_key, group_size=1, **given)

    def asked(tokens, actions, kinds, references, fallbacks):
        texts = [vocabulary.decode(row[mask].tolist()) for row, mask in zip(np.asarray(tokens), np.asarray(actions))]
        tasks, _ = tasks_of(np.asarray(kinds).tolist(), texts, triplets.texts_of(references),
                            triplets.texts_of(fallbacks), width, vocabulary, seconds=seconds)  # fmt: skip
        return triplets.prompt_arrays([triplets.solve_prompt(task) for task in tasks], width, vocabulary)

    shapes = jax.ShapeDtypeStruct((n, width), jnp.int32), jax.ShapeDtypeStruct((n, width), jnp.bool_)
    tokens, valid = jax.pure_callback(asked, shapes, proposed.tokens, proposed.action_mask, prompts.source,
                                      prompts.example["reference"], prompts.example["fallback"])  # fmt: skip
    tasks = prompts.replace(tokens=tokens, valid=valid)
    solved = rollout_fn(model, params, tasks, solve_key, group_size=attempts, **given)
    kinds = jnp.asarray(prompts.source, jnp.int32)
    groups = jnp.arange(n, dtype=jnp.int32)
    proposed = proposed.replace(role=2 * kinds, group=n + groups)
    solved = solved.replace(role=jnp.repeat(2 * kinds + 1, attempts), group=jnp.repeat(groups, attempts))

    def join(proposal: Array, solutions: Array) -> Array:
        grouped = solutions.reshape(n, attempts, *solutions.shape[1:])
        return jnp.concatenate([proposal[:, None], grouped], axis=1).reshape(n * group_size, *proposal.shape[1:])

    return jax.tree.map(join, proposed, solved)


def solve_alone(model: Transformer, params: Params, prompts: Prompts, key: Array, *,
                rollout_fn: RolloutFn = single_turn, **given: Any) -> Rollout:  # fmt: skip
    """`group_size` attempts at every prompt of triplets.solve, with the roles that `propose_and_solve` gives them.

    For a solver without a proposer, under an advantage that goes by role.
    """
    rows = rollout_fn(model, params, prompts, key, **given)
    kinds = jnp.asarray(prompts.source, jnp.int32)
    return rows.replace(role=2 * jnp.repeat(kinds, rows.role.shape[0] // kinds.shape[0]) + 1)


def tasks_of(
    kinds: Sequence[int], texts: Sequence[str], references: Sequence[str], fallbacks: Sequence[str], width: int,
    vocabulary: Vocabulary, *, seconds: float = 1.0,
) -> tuple[list[Triplet], list[executed.Proposal]]:  # fmt: skip
    """(what is attempted, what was proposed) for each prompt: the proposal if it is valid, else the fallback.

    A function of the texts alone, so that rollout and reward agree; what was run before is remembered.
    """
    found = executed.proposals(kinds, texts, references, width, vocabulary, seconds=seconds)
    parts = [triplets.parsed(kind, text) for kind, text in zip(kinds, fallbacks)]
    if None in parts:
        text = fallbacks[parts.index(None)]
        raise Refused(f"the buffer of triplets holds {text!r}, which is none: name other seeds")
    ran = executed.outputs(parts, seconds=seconds)
    stored = [Triplet(kind, *part, tuple(map(str, outputs))) for kind, part, outputs in zip(kinds, parts, ran)]
    return [proposal.triplet or own for proposal, own in zip(found, stored)], found
