"""Absolute Zero: the rewards of proposers and solvers, and the buffer of tasks that they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
        rows = _judged(rollout, prompts, task, seconds)
        first, attempts, proposes = np.flatnonzero(rows.proposes), np.flatnonzero(~rows.proposes), rows.proposes
        tried = np.bincount(rows.family[attempts], minlength=len(first))
        rate = np.bincount(rows.family[attempts], rows.right[attempts], minlength=len(first)) / np.maximum(tried, 1)
        earned = rows.right.copy()
        earned[first] = np.where(rate > 0, 1.0 - rate, 0.0)
        scored = ~proposes | ~rows.formed
        scored[first] |= tried > 0
        reward = np.where(rows.formed, np.where(earned > 0, earned, unrewarded), malformed)
        reward = np.where(scored, reward, 0.0).astype(np.float32)
        state, new = remembered(state, [proposal.triplet for proposal in rows.proposed])
        parts = _parts(rows, reward, new, np.where(rows.formed[first] & (tried > 0), rate, np.nan))
        parts["buffer/size"] = np.full(len(reward), np.minimum(state["count"], capacity).sum(), np.float32)
        outcome = np.where(proposes, rows.formed, rows.right).astype(np.float32)
        return Rewards(_at_last_action(reward, np.asarray(rollout.action_mask)), outcome, scored, parts), state

    return RewardFn(init, update, False, _NAMES)


class _Rows(NamedTuple):
    """What was found of B rows, of which N are proposals.

    proposes, formed  [B] bool   a proposal or an attempt; valid, or well-formed
    right             [B]        1.0 where an attempt is right
    family, kind      [B] int    which proposal a row belongs to, and of which kind
    proposed          N          the proposals
    """

    proposes: np.ndarray
    formed: np.ndarray
    right: np.ndarray
    family: np.ndarray
    kind: np.ndarray
    proposed: Sequence[executed.Proposal]


def _judged(rollout: Rollout, prompts: Prompts, task: Task, seconds: float) -> _Rows:
    """Validates the proposals again, as the rollout did, and judges the attempts at them."""
    if not isinstance(prompts.example, Mapping) or "fallback" not in prompts.example:
        raise Refused("absolute_zero judges the prompts of triplets.propose: set Experiment.task to it")
    texts, proposes = completion_texts(rollout, task.vocabulary), np.asarray(rollout.role) % 2 == 0
    first, attempts, family = np.flatnonzero(proposes), np.flatnonzero(~proposes), np.cumsum(proposes) - 1
    kinds = np.asarray(prompts.source)[first]
    given = [triplets.texts_of(np.asarray(prompts.example[name])[first]) for name in ("reference", "fallback")]
    tasks, proposed = tasks_of(kinds.tolist(), [texts[row] for row in first], *given, prompts.tokens.shape[1],
                               task.vocabulary, seconds=seconds)  # fmt: skip
    verdicts = executed.judged([tasks[family[row]] for row in attempts], [texts[row] for row in attempts],
                               seconds=seconds)  # fmt: skip
    formed, right = np.zeros(len(texts), bool), np.zeros(len(texts))
    formed[first] = [proposal.triplet is not None for proposal in proposed]
    formed[attempts], right[attempts] = [well for well, _ in verdicts], [is_right for _, is_right in verdicts]
    return _Rows(proposes, formed, right, family, kinds[family], proposed)


def _parts(rows: _Rows, reward: np.ndarray, new: np.ndarray, rate: np.ndarray) -> dict[str, np.ndarray]:
    """Named shares [B]; `rate` [N] is NaN where a proposal is not valid or nobody tried it."""
    of_proposals = lambda values, among=True: _share(rows.proposes, np.asarray(values, float), among)  # noqa: E731
    of_attempts = lambda values, among=True: _share(~rows.proposes, np.asarray(values, float), among)  # noqa: E731
    known, right, kind = ~np.isnan(rate), rows.right[~rows.proposes], rows.kind[~rows.proposes]
    return {
        "propose/reward": of_proposals(reward[rows.proposes]),
        "propose/malformed": of_proposals([not proposal.well_formed for proposal in rows.proposed]),
        "propose/valid": of_proposals(rows.formed[rows.proposes]), "propose/new": of_proposals(new),
        "rate/none": of_proposals(rate == 0, known), "rate/some": of_proposals((rate > 0) & (rate < 1), known),
        "rate/all": of_proposals(rate == 1, known), "solve/malformed": of_attempts(~rows.formed[~rows.proposes]),
        **{f"solve/{name}": of_attempts(right, kind == number) for number, name in enumerate(KINDS)},
    }  # fmt: skip


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


def _share(at: np.ndarray, values: np.ndarray, among: Any) -> np.ndarray:
    """[B] float32 whose mean over all rows is the mean of `values` over those of the rows `at` [B] that are `among`."""
    part, among = np.zeros(len(at), np.float32), np.broadcast_to(among, values.shape)
    part[at] = np.where(among, values, 0.0) * len(at) / max(1, among.sum())
    return part


def _at_last_action(values: np.ndarray, action_mask: np.ndarray) -> np.ndarray:
    tokens = np.zeros(action_mask.shape, np.float32)
    acting = np.flatnonzero(action_mask.any(axis=1))
    last = action_mask.shape[1] - 1 - action_mask[:, ::-1].argmax(axis=1)
    tokens[acting, last[acting]] = values[acting]
    return tokens
