"""Tiny rollouts and a fake task for the tests of rewards."""

import numpy as np

from mlrl.types import Prompts, Rollout, Task

EOS = 1
LETTERS = "_$abcdefghijklmnopqrstuvwxyz0123456789 "


class Letters:
    """One id per character; 0 is padding, 1 is EOS."""

    size = len(LETTERS)
    pad_id = 0
    eos_ids = (EOS,)

    def encode(self, text):
        return [LETTERS.index(character) for character in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids if i > EOS)


def rollout_of(completions, prompt="ab", columns=8):
    """Rows `prompt` + completion + EOS; the completion and its EOS are the actions."""
    vocabulary, rows = Letters(), len(completions)
    tokens = np.zeros((rows, len(prompt) + columns), np.int32)
    action_mask = np.zeros(tokens.shape, bool)
    valid = np.zeros(tokens.shape, bool)
    for row, text in enumerate(completions):
        ids = [*vocabulary.encode(prompt + text), EOS]
        tokens[row, : len(ids)] = ids
        valid[row, : len(ids)] = True
        action_mask[row, len(prompt) : len(ids)] = True
    return Rollout(
        tokens=tokens,
        valid=valid,
        action_mask=action_mask,
        behavior_log_probs=np.zeros(tokens.shape, np.float32),
        turn=np.zeros(tokens.shape, np.int32),
        role=np.zeros(rows, np.int32),
        group=np.zeros(rows, np.int32),
        truncated=np.zeros(rows, bool),
        policy_version=np.zeros(rows, np.int32),
    ).check()


def prompts_of(rows, prompt="ab"):
    """The prompts of a step, repeated to `rows` rows; row i is example i."""
    ids = np.tile(np.array(Letters().encode(prompt), np.int32), (rows, 1))
    index = np.arange(rows, dtype=np.int32)
    example = {"answer": index.astype(np.float32)}
    return Prompts(tokens=ids, valid=np.ones(ids.shape, bool), source=np.zeros(rows, np.int32), index=index,
                   example=example).check()  # fmt: skip


def task_of(answers, prompt="ab"):
    """A task whose example i has the answer answers[i]."""
    return Task(
        name="letters",
        sources=("letters",),
        sizes=(len(answers),),
        rates=(1.0,),
        vocabulary=Letters(),
        at=lambda source, index: prompts_of(len(index)),
        targets=lambda source, index: (None, None),
        example=lambda source, index: {"prompt": prompt, "answer": answers[index], "task": "letters"},
        in_graph=False,
    )


def run(reward, completions, answers=None, prompt="ab", state=None):
    """One update of a reward on hand-made rows -> (Rewards, state)."""
    rollout = rollout_of(completions, prompt)
    prompts = prompts_of(len(completions), prompt)
    task = task_of(answers if answers is not None else list(completions), prompt)
    rewards, state = reward.update(reward.init() if state is None else state, rollout, prompts, task, None)
    return rewards.check(), state
