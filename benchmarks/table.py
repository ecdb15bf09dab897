"""The results of `make bench` as one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.comparing import OURS
from benchmarks.peers.shapes import ROWS


def as_markdown(results: Mapping[str, Any]) -> str:
    """RESULTS.md, of what results.json holds."""
    m, repeats = results["machine"], sorted({case["repeats"] for case in results["cases"]})
    again = "make bench QUICK=1" if results["quick"] else "make bench"
    lines = [
        f"# Speed beside bare JAX, TRL and tunix (made by `{again}`)", "",
        *(line for name in dict.fromkeys(case["rows"] for case in results["cases"]) for line in _rows_in_words(name)),
        "", "Every side is a process of its own; they take turns, one works at a time. Seconds are medians of "
        f"{' or '.join(map(str, repeats))} turns.",
        "The ratio is of mlrl's seconds to the other's in one round: its median and quartiles. Peak memory is that of",
        "the whole process in its turns, libraries included. (r: of which rollout, where the other says so.) A peer's",
        "update is its step less its rollout; tunix's prefill is its sampler's call for one token. Each side has",
        "the settings with which its step was the fastest of those tried (`run.TRIED`): rows of a micro-batch, and",
        f"devices among which a CPU's cores and the rows are split. {_settings(results)}.", "",
        f"{m['device']}, {m['processor']}, {m['cores']} cores, load {m['load_before']:.1f} before; Python "
        f"{m['python']}, jax {m['jax']}, flax {m['flax']}{_versions(results)}. fp32 products reach at most "
        f"{results['ceiling_flops'] / 1e9:.0f} GFLOP/s ([2048,2048] by itself).", "",
        "| what | rows | model | mlrl | beside | its time | ratio (quartiles) | goal | | peak MiB, mlrl / its |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [line for case in results["cases"] for line in _lines(case)]
    shares = [f"{case['ceiling_share']:.0%} at {case['model']}" for case in results["cases"] if "ceiling_share" in case]
    if shares:
        lines += ["", f"mlrl's whole step with full rows reaches this share of that ceiling: {', '.join(shares)}. The",
                  "step's products are counted by formula (`mlrl.costs`)."]  # fmt: skip
    lines += ["", "Not measured: GPUs, TPUs, several devices, bf16, and models above these sizes."]
    unmeasured = "; ".join(results.get("unmeasured", []))
    lines += [f"Of these comparisons not measured yet: {unmeasured}."] if unmeasured else []
    lines += [f"Left out: {name}: {why}" for name, why in results["missing"].items()]
    return "\n".join([*lines, ""])


def _lines(case: Mapping[str, Any]) -> list[str]:
    sides, found = case["sides"], []
    for other, ratio in case["ratios"].items():
        low, high = ratio["quartiles"]
        rollout = sides[other].get("rollout_seconds")
        time = f"{sides[other]['median_seconds']:.3f} s" + (f" (r {rollout:.3f})" if rollout else "")
        goal = "" if ratio["goal_at_most"] is None else f"at most {ratio['goal_at_most']:.2f}"
        cells = [
            case["case"], case["rows"], case["model"], f"{sides[OURS]['median_seconds']:.3f} s", other, time,
            f"{ratio['ratio']:.2f} ({low:.2f}-{high:.2f})", goal, judged(ratio["met"]),
            f"{sides[OURS]['peak_mib']:,.0f} / {sides[other]['peak_mib']:,.0f}",
        ]  # fmt: skip
        found.append(f"| {' | '.join(cells)} |")
    return found


def _settings(results: Mapping[str, Any]) -> str:
    """What the sides of the steps were set to."""
    said = []
    for case in results["cases"]:
        if case["case"] == "step":
            each = ", ".join(f"{side} {one['settings']['micro_batch_rows']} x {one['settings']['devices']}"
                             for side, one in case["sides"].items())  # fmt: skip
            said.append(f"{case['rows']}, {case['model']}: {each}")
    return "; ".join(said) or "no step was measured"


def judged(met: bool | None) -> str:
    """In a word; none where there is no goal."""
    return {True: "met", False: "MISSED", None: ""}[met]


def _rows_in_words(name: str) -> list[str]:
    rows = ROWS[name]
    ends = "none of which ends early"
    if rows.ending:
        ends = f"which end with probability 1/{1 / rows.ending:.0f} a token"
    return [f"- {name}: {rows.prompts} prompts x {rows.group}, prompts of {rows.prompt_tokens} tokens, at most "
            f"{rows.new_tokens} new ones, {ends}"]  # fmt: skip


def _versions(results: Mapping[str, Any]) -> str:
    """Versions that the other sides named and ours did not."""
    found = {}
    for case in results["cases"]:
        for side in case["sides"].values():
            found |= {name: value for name, value in side["about"].items() if isinstance(value, str)}
    return "".join(f", {name} {value}" for name, value in found.items() if name not in results["machine"])
