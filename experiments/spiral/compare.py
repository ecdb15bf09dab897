"""The arms of the SPIRAL study on three games, over several seeds, at one budget of rows: tables and a plot.

    python -m experiments.spiral.compare FOLDER [--seeds 5] [--games kuhn] [--arms role shared] [--gin.STEPS=100 ...]

An arm is GAME.gin or GAME_ARM.gin of this folder. All arms of a seed start from the same warm-started parameters; the
seeds of an arm are trained by one program, each in a run folder of its own. An arm that is done is not done again, one
that was cut is begun again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import time
from typing import Any

from experiments.study import shown
from experiments.trained import draw, number, read, started
from mlrl import main
from mlrl.loops import online, seeds

ARMS = ("role", "shared", "none", "fixed")
# What the table of a game shows: heading -> (metric, which part of the run). Of a curve that goes up and down the last
# value says little, so the mean over the last quarter of the steps ("late") stands beside it.
COLUMNS = {
    "kuhn": {
        "exploitability, last": ("eval/kuhn_poker/exploitability", "last"),
        "exploitability, last quarter": ("eval/kuhn_poker/exploitability", "late"),
        "chips a round against random": ("eval/kuhn_poker/payoff_random", "last"),
        "against the equilibrium": ("eval/kuhn_poker/payoff_equilibrium", "last"),
        "won against random": ("eval/against_random/won", "last"),
        "won against the equilibrium": ("eval/against_equilibrium/won", "last"),
    },
    "tic_tac_toe": {
        "won against random": ("eval/against_random/won", "last"),
        "lost against random": ("eval/against_random/lost", "last"),
        "drawn against minimax": ("eval/against_minimax/drawn", "last"),
        "payoff as X": ("eval/against_minimax/payoff_0", "last"),
        "payoff as O": ("eval/against_minimax/payoff_1", "last"),
    },
    "negotiation": {
        "won against random": ("eval/against_random/won", "last"),
        "lost against random": ("eval/against_random/lost", "last"),
        "payoff as first": ("eval/against_random/payoff_0", "last"),
        "payoff as second": ("eval/against_random/payoff_1", "last"),
        "lost to careful": ("eval/against_careful/lost", "last"),
        "broke the rules": ("eval/against_careful/invalid", "last"),
        "accepts what puts it behind": ("eval/negotiation/accepts_behind", "last"),
        "accepts what puts it ahead": ("eval/negotiation/accepts_ahead", "last"),
        "opens so as to be behind": ("eval/negotiation/opens_behind", "last"),
        "won in training": ("reward/from_environment/won", "late"),
    },
}
BOTH = {"invalid rows in training": ("reward/from_environment/invalid", "late"), "gradient norm": ("grad_norm", "late")}
PANELS = (("kuhn", "eval/kuhn_poker/exploitability", "Kuhn poker: exploitability, chips"),
          ("tic_tac_toe", "eval/against_minimax/drawn", "Tic-Tac-Toe: drawn against minimax"),
          ("tic_tac_toe", "eval/against_random/won", "Tic-Tac-Toe: won against random"),
          ("negotiation", "eval/against_random/won", "Negotiation: won against random"),
          ("negotiation", "eval/against_careful/lost", "Negotiation: lost to the careful player"),
          ("negotiation", "eval/negotiation/accepts_behind", "Negotiation: accepts what puts it behind"))  # fmt: skip


def compare() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--games", nargs="+", default=list(COLUMNS))
    parser.add_argument("--arms", nargs="+", default=ARMS)
    arguments, rest = parser.parse_known_args()
    overrides = dict(word.removeprefix("--gin.").split("=", 1) for word in rest)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for game in arguments.games:
        for arm in arguments.arms:
            run(arguments.folder, game, arm, arguments.seeds, overrides)
    found = {game: {arm: read(arguments.folder / f"{game}-{arm}") for arm in arguments.arms}
             for game in arguments.games}  # fmt: skip
    text = "\n".join(line for game, arms in found.items() for line in table(game, arms))
    (arguments.folder / "table.md").write_text(text)
    plot(found, arguments.folder / "plot.png")
    print(text)


def run(folder: pathlib.Path, game: str, arm: str, count: int, overrides: dict[str, str]) -> None:
    """All seeds of an arm, unless they are done; done.json says how many minutes they took."""
    own = folder / f"{game}-{arm}"
    if (own / "done.json").is_file():
        return
    shutil.rmtree(own, ignore_errors=True)
    file = f"experiments/spiral/{game}{'' if arm == 'role' else f'_{arm}'}.gin"
    experiments = [
        started(main.load(file, overrides | {"SEED": str(seed)})[0], folder / f"{game}-warm-{seed}.pickle")
        for seed in range(count)
    ]
    began = time.time()
    print(f"{game} {arm}: {count} seeds of {experiments[0].num_steps} steps", flush=True)
    folders = [own / f"seed_{seed}" for seed in range(count)]
    for one in folders:
        one.mkdir(parents=True)
    seeds.train([seeds.Variant(online.prepare(experiments[0]), experiments, folders)])
    (own / "done.json").write_text(json.dumps({"minutes": (time.time() - began) / 60}))


def table(game: str, arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A Markdown table of one game: the start that all arms share, then every arm."""
    columns = COLUMNS[game] | BOTH
    lines = [f"| {game} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    first = next(iter(arms.values()))
    rows = {"warm start": (first, "first"), **{name: (curves, "") for name, curves in arms.items()}}
    for name, (curves, part) in rows.items():
        cells = [shown([number(seed[metric], part or usual) for seed in curves]) for metric, usual in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(found: dict[str, dict[str, list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """A panel for each measure: mean over seeds and its interval against the step, one colour an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in PANELS if panel[0] in found]
    figure, places = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axes, (game, metric, title) in zip(places[0], panels):
        for arm, curves in found[game].items():
            draw(axes, [seed[metric] for seed in curves], arm)
        axes.set(title=title, xlabel="training step")
        axes.grid(alpha=0.3)
    places[0][0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    compare()
