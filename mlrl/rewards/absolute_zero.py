"""Absolute Zero: the rewards of proposers and solvers, and the buffer of tasks that they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlrl.rewards.completions import completion_texts
from mlrl.rollouts.propose_and_solve import tasks_of
from mlrl.tasks import executed, triplets
from mlrl.tasks.triplets import KINDS, Triplet
from mlrl.types import Models, Prompts, Refused, RewardFn, Rewards, Rollout, Task

State = dict[str, Any]
_NAMES = ("propose/reward", "propose/malformed", "propose/valid", "propose/new", "rate/none", "rate/some", "rate/all",
          "solve/malformed", *(f"solve/{kind}" for kind in KINDS), "buffer/size")  # fmt: skip


def absolute_zero(
    *, capacity: int = 2048, width: int = 48, malformed: float = -1.0, unrewarded: float = -0.5, seconds: float = 1.0,
    deduction_seeds: Sequence[str] = (), abduction_seeds: Sequence[str] = (), induction_seeds: Sequence[str] = (),
) -> RewardFn:  # fmt: skip
    """Rewards of the rows of `propose_and_solve`, on the host. With s the share of right attempts at a proposal:

        proposer   r = 1 - s if s > 0 else 0: a task that is sometimes solved; one that always or never is earns nothing
        solver     r = 1 if right, else 0
        both       malformed or invalid: `malformed`;  well-formed and r <= 0: `unrewarded`;  else r

    Its state is the buffer, {"texts": [3,C,W] uint8, "count": [3] int32}, in TrainState: all valid proposals are
    added, whatever s; when it is full, the oldest of the kind is overwritten. `recall` draws from it.

    An attempt is right or not (outcome); the outcome of a proposal is whether it is valid. A valid proposal without an
    attempt, as in a demonstration, is unscored.

    Args:
      capacity: C, triplets of each kind.
      width: W, bytes of a triplet: triplets.propose.prompt_tokens.
      malformed, unrewarded: as above.
      seconds: limit of running one program; the same as propose_and_solve's.
      deduction_seeds, abduction_seeds, induction_seeds: texts of triplets to begin with, beside the trivial one; see
        triplets.seeds.
    Returns: a RewardFn. Its parts are shares of the rows they speak of: of proposals, of attempts, or, of valid
      proposals, how many had s = 0, in between, or 1 (rate/...); propose/new are texts that the buffer had not.
    Raises: Refused, if a seed is malformed or too long.

    Reference: Zhao et al. 2025, "Absolute Zero". Left out: rewards of formats other than these.
    """
    own = tuple((first, *more) for first, more in
                zip(triplets.FIRST, (deduction_seeds, abduction_seeds, induction_seeds)))  # fmt: skip
    _check_seeds(own, capacity, width)

    def init() -> State:
        texts = np.zeros((len(KINDS), capacity, width), np.uint8)
        for kind, found in enumerate(own):
            texts[kind, : len(found)] = triplets.text_array(found, width)
        return {"texts": texts, "count": np.array([len(found) for found in own], np.int32)}

    def update(state: State, rollout: Rollout, prompts: Prompts, task: Task, models: Models) -> tuple[Rewards, State]:
        if not isinstance(prompts.example, Mapping) or "fallback" not in prompts.example:
            raise Refused("absolute_zero judges the prompts of triplets.propose: set Experiment.task to it")
        texts, proposes = completion_texts(rollout, task.vocabulary), np.asarray(rollout.role) % 2 == 0
        first, family = np.flatnonzero(proposes), np.cumsum(proposes) - 1
        kinds = np.asarray(prompts.source)[first].tolist()
        given = [triplets.texts_of(np.asarray(prompts.example[name])[first]) for name in ("reference", "fallback")]
        tasks, proposed = tasks_of(kinds, [texts[row] for row in first], *given, prompts.tokens.shape[1],
                                   task.vocabulary, seconds=seconds)  # fmt: skip
        attempts = np.flatnonzero(~proposes)
        verdicts = executed.judged([tasks[family[row]] for row in attempts], [texts[row] for row in attempts],
                                   seconds=seconds)  # fmt: skip
        right, formed = np.zeros(len(texts)), np.zeros(len(texts), bool)
        formed[attempts], right[attempts] = (np.array(column) for column in zip(*verdicts)) if verdicts else ((), ())
        valid = np.array([proposal.triplet is not None for proposal in proposed], bool)
        tried = np.bincount(family[attempts], minlength=len(first))
        rate = np.bincount(family[attempts], right[attempts], minlength=len(first)) / np.maximum(tried, 1)
        right[first], formed[first] = np.where(rate > 0, 1.0 - rate, 0.0), valid
        reward = np.where(formed, np.where(right > 0, right, unrewarded), malformed)
        scored = np.ones(len(texts), bool)
        scored[first] = ~valid | (tried > 0)
        outcome = np.where(proposes, formed, right)
        state, new = remembered(state, [proposal.triplet for proposal in proposed])
        well_formed = np.array([proposal.well_formed for proposal in proposed], bool)
        known = valid & (tried > 0)
        of = lambda rows, values, among=True: _share(len(texts), rows, np.asarray(values, float), among)  # noqa: E731
        kind_of = np.asarray(kinds)[family]
        parts = {
            "propose/reward": of(first, reward[first]), "propose/malformed": of(first, ~well_formed),
            "propose/valid": of(first, valid), "propose/new": of(first, new), "rate/none": of(first, rate == 0, known),
            "rate/some": of(first, (rate > 0) & (rate < 1), known), "rate/all": of(first, rate == 1, known),
            "solve/malformed": of(attempts, ~formed[attempts]),
            **{f"solve/{name}": of(attempts, right[attempts], kind_of[attempts] == kind)
               for kind, name in enumerate(KINDS)},
            "buffer/size": np.full(len(texts), np.minimum(state["count"], capacity).sum(), np.float32),
        }  # fmt: skip
        reward = np.where(scored, reward, 0.0).astype(np.float32)
        tokens = _at_last_action(reward, np.asarray(rollout.action_mask))
        return Rewards(tokens, outcome.astype(np.float32), scored, parts), state

    return RewardFn(init, update, False, _NAMES)


def remembered(state: State, found: Sequence[Triplet | None]) -> tuple[State, np.ndarray]:
    """The buffer with the valid triplets added, and which of them [N] it did not hold before."""
    texts, count = np.array(state["texts"]), np.array(state["count"])
    capacity, width, new = texts.shape[1], texts.shape[2], np.zeros(len(found), bool)
    for number, triplet in enumerate(found):
        if triplet is not None:
            row = triplets.text_array([triplet.text], width)[0]
            new[number] = not (texts[triplet.kind] == row).all(axis=1).any()
            texts[triplet.kind, count[triplet.kind] % capacity] = row
            count[triplet.kind] += 1
    return {"texts": texts, "count": count}, new


def recall(prompts: Prompts, state: State, task: Task) -> Prompts:
    """Prompts of triplets.propose about triplets of the buffer: a reference to be shown, a fallback to be solved.

    Which ones is said by the prompts' index, so that a resumed run draws the same. An induction prompt shows the
    program of a deduction triplet. For Experiment.prompts_fn.

    Args:
      prompts: as drawn.
      state: of `absolute_zero`.
      task: that they are drawn from, for its vocabulary.
    """
    texts, count = np.asarray(state["texts"]), np.asarray(state["count"])
    kinds, index = np.asarray(prompts.source), np.asarray(prompts.index)
    held = np.minimum(count, texts.shape[1])
    shown_kind = np.where(kinds == triplets.INDUCTION, triplets.DEDUCTION, kinds)
    reference = texts[shown_kind, index % held[shown_kind]]
    fallback = texts[kinds, index // 65537 % held[kinds]]
    asked = [triplets.propose_prompt(kind, text) for kind, text in zip(kinds, triplets.texts_of(reference))]
    tokens, valid = triplets.prompt_arrays(asked, prompts.tokens.shape[1], task.vocabulary)
    return prompts.replace(tokens=tokens, valid=valid, example={"reference": reference, "fallback": fallback})


def solved(completion: str, example: Mapping[str, Any], *, malformed: float = -1.0, unrewarded: float = -0.5,
           seconds: float = 1.0) -> dict[str, float]:  # fmt: skip
    """The reward of an attempt at a triplet of triplets.solve, per completion: 1.0 if right, else as `absolute_zero`.

    Returns: {"reward", "outcome"}: the outcome is 1.0 iff it is right.
    """
    program, *inputs = example["triplet"].split("#")
    task = Triplet(example["kind"], program, tuple(inputs), tuple(example["outputs"]))
    ((formed, right),) = executed.judged([task], [completion], seconds=seconds)
    return {"reward": 1.0 if right else unrewarded if formed else malformed, "outcome": float(right)}


def _check_seeds(own: Sequence[Sequence[str]], capacity: int, width: int) -> None:
    for kind, found in enumerate(own):
        for text in found:
            if triplets.parsed(kind, text) is None or len(text.encode()) + 2 > width:
                raise Refused(f"absolute_zero: the {KINDS[kind]} seed {text!r} is no triplet of that kind, or longer "
                              f"than width={width} less 2")  # fmt: skip
        if len(found) > capacity:
            raise Refused(f"absolute_zero: {len(found)} {KINDS[kind]} seeds, but capacity is {capacity}")


def _share(rows: int, at: np.ndarray, values: np.ndarray, among: Any) -> np.ndarray:
    """[rows] float32 whose mean over all rows is the mean of `values` over those of the rows `at` that are `among`."""
    part, among = np.zeros(rows, np.float32), np.broadcast_to(among, at.shape)
    part[at] = np.where(among, values, 0.0) * rows / max(1, among.sum())
    return part


def _at_last_action(values: np.ndarray, action_mask: np.ndarray) -> np.ndarray:
    tokens = np.zeros(action_mask.shape, np.float32)
    acting = np.flatnonzero(action_mask.any(axis=1))
    last = action_mask.shape[1] - 1 - action_mask[:, ::-1].argmax(axis=1)
    tokens[acting, last[acting]] = values[acting]
    return tokens
