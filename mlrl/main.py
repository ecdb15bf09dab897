"""The one door: the command line, and the only place that knows gin."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

PACKAGE = pathlib.Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. Mistakes of the user's end in one line, with a trace under --debug."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only reads data here, and has much to say of GPUs
    arguments, overrides = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        return arguments.command(arguments, overrides) or 0
    except KeyboardInterrupt:
        print("mlrl: stopped; `mlrl train` on the same folder goes on from its last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        print(f"mlrl: {_one_line(error)}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(prog="mlrl", description="Reinforcement learning for language models, in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(command=run)
        command.add_argument("--debug", action="store_true", help="show the trace of an error")
        return command

    train = add("train", _train, "Train an experiment; resumes by itself if the run folder holds a run.")
    train.add_argument("experiment", help="a gin file")
    train.add_argument("--run_dir", default="", help="the run's folder (default: runs/<name of the experiment>)")
    train.add_argument("--report", action="store_true", help="write report.html at the end and print a summary")
    check = add("check", _check, "Say in words what an experiment would do, without compiling anything.")
    check.add_argument("experiment", help="a gin file")
    evaluate = add("eval", _evaluate, "Evaluate a run's last checkpoint: pass@k, maj@k, greedy -> results.json.")
    evaluate.add_argument("run_dir")
    evaluate.add_argument("--prompts", type=int, default=0, help="held-out prompts (default: the experiment's)")
    evaluate.add_argument("--samples", type=int, default=0, help="completions a prompt (default: the experiment's)")
    report = add("report", _report, "Write one self-contained HTML page about one or several runs.")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", default="", help="the page (default: report.html in the first run's folder)")
    for command in (train, check, evaluate):
        command.epilog = "--gin.NAME=VALUE sets a macro (--gin.SEED=1) or a binding (--gin.Config.layers=4)."
    plain = [a for a in argv if not a.startswith("--gin.")]
    overrides = {}
    for given in (a for a in argv if a.startswith("--gin.")):
        name, equals, value = given[len("--gin.") :].partition("=")
        if not equals:
            parser.error(f"{given} has no value: write --gin.{name}=VALUE")
        overrides[name] = value
    return parser.parse_args(plain), overrides


def _train(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    folder = arguments.run_dir or f"runs/{pathlib.Path(arguments.experiment).stem}"
    experiment, config = load(arguments.experiment, overrides)
    from mlrl import folders, runs

    loop = _loop_of(experiment)
    loop.prepare(experiment)
    _refuse_unused()
    folders.claim_run_folder(folder, config, may_differ=("num_steps",))
    pathlib.Path(folder, "operative_config.gin").write_text(_operative_config())
    with runs.Run(folder, experiment.recording) as run:
        loop.train(experiment, run)
    if arguments.report:
        from mlrl import report

        page = report.write_report([folder], pathlib.Path(folder, "report.html"))
        print(report.summary_table(folder))
        print(f"report: {page}")


def _check(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    experiment, _ = load(arguments.experiment, overrides)
    loop = _loop_of(experiment)
    parts = loop.prepare(experiment)
    _refuse_unused()
    print(loop.describe(parts))


def _evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = pathlib.Path(arguments.run_dir, "config.gin")
    _require_file(config, "a run folder has a config.gin")
    experiment, _ = load(str(config), overrides)
    from mlrl import runs

    results = runs.evaluate_run(arguments.run_dir, experiment, _loop_of(experiment),
                                prompts=arguments.prompts, samples=arguments.samples)  # fmt: skip
    for task, found in results.items():
        for name, r in found.items():
            print(f"{task}  {name:<8} {r['value']:.3f}  [{r['low']:.3f}, {r['high']:.3f}]  {r['prompts']} prompts")
    print(f"written to {pathlib.Path(arguments.run_dir, 'results.json')}")


def _report(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from mlrl import report

    out = pathlib.Path(arguments.out or pathlib.Path(arguments.run_dirs[0], "report.html"))
    print(report.write_report(arguments.run_dirs, out))


def run(experiment: Any) -> Any:
    """What a gin file binds: `main.run.experiment = @online.Experiment()`."""
    return experiment


def load(path: str, overrides: dict[str, str] | None = None) -> tuple[Any, str]:
    """Reads a gin file, then the overrides, and builds the experiment.

    Args:
      path: the gin file. Includes are found beside the working directory, beside mlrl's own gin library, and as
        absolute paths.
      overrides: macro or binding name -> value as text; text that is no Python literal is taken as a string.
    Returns: the experiment, and the configuration as text, which holds everything and can be loaded again.
    Raises: Refused, or gin's own errors, which the command line shortens to one line.
    """
    import gin

    from mlrl.types import Refused

    _require_file(pathlib.Path(path), "name an experiment's gin file")
    gin.clear_config()
    for folder in (os.getcwd(), str(PACKAGE.parent), str(PACKAGE)):
        gin.add_config_file_search_path(folder)
    if os.getcwd() not in sys.path:  # the user's own modules, named in their gin file
        sys.path.insert(0, os.getcwd())
    with _gin_errors(path):
        gin.parse_config_file(path)
        gin.parse_config([_override(name, value) for name, value in (overrides or {}).items()])
        gin.finalize()
        if not gin.config_str() or ("", "mlrl.main.run") not in gin.config._CONFIG:
            raise Refused(f"{path} binds no experiment: it needs main.run.experiment = @online.Experiment()")
        config = gin.config_str(max_line_length=110)
        return gin.get_configurable("mlrl.main.run")(), config


@contextlib.contextmanager
def _gin_errors(path: str) -> Iterator[None]:
    """Turns what gin says, in many lines, into one line that starts with the file."""
    from mlrl.types import Refused

    # gin logs every folder in which it did not find a file, as errors.
    level = logging.root.level
    logging.root.setLevel(logging.CRITICAL)
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{path}: {_one_line(error)}{_near_miss(str(error))}") from error
    finally:
        logging.root.setLevel(level)


def _one_line(error: Exception) -> str:
    """The error in one line: gin's notes on where it happened are kept, its advice to developers is not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(line for line in lines if not line.startswith(("No values supplied", "Gin had values bound")))
    from mlrl.types import Refused

    if isinstance(error, Refused) or type(error).__name__ in ("Stopped", "UnknownConfigurable"):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows the trace)"


def _near_miss(message: str) -> str:
    """A name that exists and looks like the quoted one that does not, or nothing."""
    import gin

    quoted = re.findall(r"'([\w./]+)'", message)
    known = [selector for _, selector in gin.config._CONFIG] + [selector for selector, _ in gin.config._REGISTRY.items()]
    known += [name.rpartition(".")[2] for name in known]
    for name in quoted:
        close = difflib.get_close_matches(name, [k for k in known if k != name], n=1, cutoff=0.8)
        if close:
            return f": did you mean {close[0]!r}?"
    return ""


def _refuse_unused() -> None:
    """Compares what the gin files bind with what was used; a binding that does nothing is a mistake.

    Preparing an experiment traces everything that it will run, so that what is not used by then is never used.
    """
    import gin

    from mlrl.types import Refused

    bound, used = gin.config._CONFIG, set()
    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items():
        inner = scope.split("/") if scope else []
        outward = ["/".join(inner[:i]) for i in range(len(inner), -1, -1)]  # a scope inherits from those around it
        for name in values:
            found = (s for s in outward if name in bound.get((s, selector), {}))
            used.add((next(found, scope), selector, name))
    for (scope, selector), values in bound.items():
        for name in values:
            if (scope, selector, name) in used:
                continue
            if selector == "gin.macro":
                close = difflib.get_close_matches(scope, [s for s, kind, _ in used if kind == "gin.macro"], n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise Refused(f"nothing uses the macro {scope}: remove it, or refer to it as %{scope}{hint}")
            shown = f"{scope}/{selector}.{name}" if scope else f"{selector}.{name}"
            raise Refused(f"nothing uses the binding {shown}: remove it, or name @{selector.split('.', 1)[1]} "
                          "where the experiment takes it, in the scope of the binding")  # fmt: skip


def _override(name: str, value: str) -> str:
    """A command-line override as a line of gin; text that gin cannot read as a value becomes a string."""
    import gin

    try:
        gin.config_parser.ConfigParser(f"x = {value}", gin.config.ParserDelegate()).parse_statement()
    except Exception:
        value = repr(value)
    return f"{name} = {value}"


def _operative_config() -> str:
    import gin

    return gin.operative_config_str(max_line_length=110)


def _require_file(path: pathlib.Path, what_to_do: str) -> None:
    from mlrl.types import Refused

    if not path.is_file():
        raise Refused(f"there is no file {path}: {what_to_do}")


def _loop_of(experiment: Any) -> Any:
    """The loop's module: an experiment's class is defined beside the functions that run it."""
    return sys.modules[type(experiment).__module__]
