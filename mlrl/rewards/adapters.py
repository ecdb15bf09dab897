"""Adapters: reward functions with the signatures of TRL, verl, OpenRLHF and verifiers, as (completion,
example) ones.

Each takes a function as people have it, and returns one that `per_completion` lifts. They judge one
completion at a time: a function that compares the completions of a batch with each other is not for them.
What the functions get besides the text comes from the example: "prompt", "answer", "task", and whatever else
the task's examples hold.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Completion = Callable[[str, Mapping[str, Any]], Any]


def from_trl(f: Callable[..., Any], *, conversational: bool = False) -> Completion:
    """Adapts TRL's f(prompts, completions, **columns) -> list of float or None.

    It is called with one completion at a time: a function that compares completions sees each alone.

    Every entry of the example is a column, and is given as a list of one; a function without **columns gets
    those it names. Left out: completion_ids, trainer_state and the logging callbacks. Coroutine functions
    work.

    Args:
      f: the reward function.
      conversational: whether prompts and completions are lists of chat messages instead of strings.
    Raises:
      Refused: f has no parameter `completions`.
    """
    _must_take(f, ("completions",), "from_trl")
    return _named(functools.partial(_trl, f=f, conversational=conversational), f)


def _trl(completion: str, example: Mapping[str, Any], *, f: Callable[..., Any], conversational: bool) -> Any:
    prompt: Any = example["prompt"]
    text: Any = completion
    if conversational:
        prompt, text = _chat("user", prompt), _chat("assistant", completion)
    columns = {name: [value] for name, value in example.items() if name not in ("prompt", "completion")}
    return _only(_call(f, {**columns, "prompts": [prompt], "completions": [text]}))


def from_verl(f: Callable[..., Any]) -> Completion:
    """Adapts verl's compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float or dict.

    data_source is example["task"], ground_truth example["answer"], and extra_info the example. Of a dict,
    "score" is the reward; its other numbers are logged, and the rest of it is left out.

    Raises:
      Refused: f has no parameters `solution_str` and `ground_truth`.
    """
    _must_take(f, ("solution_str", "ground_truth"), "from_verl")
    return _named(functools.partial(_verl, f=f), f)


def _verl(completion: str, example: Mapping[str, Any], *, f: Callable[..., Any]) -> Any:
    result = _call(
        f,
        {
            "data_source": example.get("task", ""),
            "solution_str": completion,
            "ground_truth": example["answer"],
            "extra_info": dict(example),
        },
    )
    if not isinstance(result, Mapping):
        return result
    return {"reward": result["score"], **_numbers({n: v for n, v in result.items() if n != "score"})}


def from_openrlhf(f: Callable[..., Any]) -> Completion:
    """Adapts OpenRLHF's reward_func(queries, prompts, labels) -> tensor, or dict of "rewards", "scores",
    "extra_logs".

    A query is prompt + completion, a label example["answer"]. Of a dict, "rewards" is the reward, "scores"
    the unshaped outcome that filters read, and the numbers of "extra_logs" are logged.

    Raises:
      Refused: f has no parameters `queries`, `prompts` and `labels`.
    """
    _must_take(f, ("queries", "prompts", "labels"), "from_openrlhf")
    return _named(functools.partial(_openrlhf, f=f), f)


def _openrlhf(completion: str, example: Mapping[str, Any], *, f: Callable[..., Any]) -> Any:
    prompt = example["prompt"]
    result = _call(
        f, {"queries": [prompt + completion], "prompts": [prompt], "labels": [example.get("answer")]}
    )
    if not isinstance(result, Mapping):
        return _only(result)
    entries = _numbers({name: _only(value) for name, value in result.get("extra_logs", {}).items()})
    if "scores" in result:
        entries["outcome"] = _only(result["scores"])
    return {**entries, "reward": _only(result["rewards"])}


def from_verifiers(f: Callable[..., Any], *, conversational: bool = True) -> Completion:
    """Adapts a rubric function of verifiers: any of prompt, completion, answer, state, info, task; maybe a
    coroutine.

    `state` is a fresh dict of the same entries, and `info` is example["info"] or else the example. Left out:
    parsers and judges, which a rubric holds (bind them with functools.partial), and group rewards.

    Args:
      f: the rubric function; it gets the parameters that it names.
      conversational: whether prompt and completion are lists of chat messages instead of strings.
    """
    return _named(functools.partial(_verifiers, f=f, conversational=conversational), f)


def _verifiers(
    completion: str, example: Mapping[str, Any], *, f: Callable[..., Any], conversational: bool
) -> Any:
    given: dict[str, Any] = {
        "prompt": example["prompt"],
        "completion": completion,
        "answer": example.get("answer", ""),
        "info": example.get("info", dict(example)),
        "task": example.get("task", ""),
    }
    if conversational:
        given |= {"prompt": _chat("user", given["prompt"]), "completion": _chat("assistant", completion)}
    return _call(f, {**given, "state": dict(given)})


def _call(f: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """f with those of the arguments that it names, or all if it takes **kwargs; waits for a coroutine."""
    parameters = inspect.signature(f).parameters
    missing = [name for name, p in parameters.items() if name not in arguments and p.default is p.empty
               and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]  # fmt: skip
    if missing:
        raise TypeError(f"it asks for {', '.join(missing)}, and is given {', '.join(arguments)}")
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    result = f(**arguments)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def _chat(role: str, text: Any) -> list[dict[str, str]]:
    return text if isinstance(text, list) else [{"role": role, "content": text}]


def _only(values: Any) -> Any:
    """The one element of a list, tuple, array or tensor; a plain number or None is itself."""
    if values is None or getattr(values, "shape", None) == () or not hasattr(type(values), "__len__"):
        return values
    if len(values) != 1:
        raise ValueError(f"one completion was given, and {len(values)} rewards came back: return a list of one")
    return values[0]


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in entries.items() if hasattr(type(value), "__float__")}


def _must_take(f: Callable[..., Any], names: tuple[str, ...], adapter: str) -> None:
    from mlrl.types import Refused  # not at the top: workers import this file, and must not pay for JAX

    try:
        parameters = inspect.signature(f).parameters
    except (TypeError, ValueError):
        raise Refused(f"{adapter} needs a function, got {f!r}") from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    missing = [name for name in names if name not in parameters]
    if missing:
        raise Refused(
            f"{adapter}: {getattr(f, '__name__', f)!r} must take {', '.join(names)}; "
            f"it takes {', '.join(parameters)}"
        )


def _named(adapted: functools.partial, f: Callable[..., Any]) -> Completion:
    adapted.__name__ = getattr(f, "__name__", type(f).__name__)  # what logs and errors call it
    return adapted
