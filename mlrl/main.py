"""The one door: the command line, and the only place that knows gin."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

TERMINATED = 143  # as of a process that SIGTERM ended, so that whoever started the run starts it again
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
    except BrokenPipeError:  # whoever read what is printed, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        from mlrl import mistakes

        print(f"mlrl: {mistakes.one_line(error)}", file=sys.stderr, flush=True)
        if type(error).__name__ not in ("Stopped", "Preempted"):
            _leave_others()
        return TERMINATED if type(error).__name__ == "Preempted" else 2


def _leave_others() -> None:
    """Ends this process at once if it is one of several: the others may be gone or stuck, and are not waited for."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(2)


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
    train.add_argument("--seeds", type=int, default=0, metavar="S",
                       help="train S seeds together, from SEED on, in folders RUN_DIR/seed_<n>")  # fmt: skip
    train.add_argument("--sweep", action="append", default=[], metavar="NAME=V1,V2",
                       help="train each value of a macro or binding together, in folders RUN_DIR/<NAME=V>/seed_<n>; "
                            "again for a grid")  # fmt: skip
    train.add_argument("--profile_steps", default="", metavar="FIRST:LAST",
                       help="trace these steps, as 20:22, into RUN_DIR/profile")  # fmt: skip
    check = add("check", _check, "Say in words what an experiment would do, without compiling anything.")
    check.add_argument("experiment", help="a gin file")
    compile_ = add("compile", _compile, "Compile an experiment's own programs for TPUs that are not there: what fits.")
    compile_.add_argument("experiment", help="a gin file")
    compile_.add_argument("--topology", required=True, metavar="KIND:AxBxC", help="such as v5e:4x4 or v5p:4x4x4")
    compile_.add_argument("--slices", type=int, default=1, help="so many of them, joined by the network")
    compile_.add_argument("--json", default="", metavar="FILE", help="write the numbers there too; - prints only them")
    compile_.add_argument("--results", default="", help=argparse.SUPPRESS)  # the process that compiles writes here
    evaluate = add("eval", _evaluate, "Evaluate a run's last checkpoint: pass@k, maj@k, greedy -> results.json.")
    evaluate.add_argument("run_dir")
    evaluate.add_argument("--task", default="", help="only the evaluation of this task")
    evaluate.add_argument("--prompts", type=int, default=0, help="held-out prompts (default: the experiment's)")
    evaluate.add_argument("--samples", type=int, default=0, help="completions a prompt (default: the experiment's)")
    report = add("report", _report, "Write one self-contained HTML page about one or several runs.")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", default="", help="the page (default: report.html in the first run's folder)")
    export = add("export", _export, "Write a run's last checkpoint as a Hugging Face folder.")
    export.add_argument("run_dir")
    export.add_argument("out_dir", help="a new folder: config.json, model.safetensors and the tokenizer's files")
    export.add_argument("--shard_gb", type=float, default=5.0, help="cut weights into shards of at most so many GB")
    for command in (train, check, compile_, evaluate, export):
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
    from mlrl import processes

    processes.join()
    folder = arguments.run_dir or f"runs/{pathlib.Path(arguments.experiment).stem}"
    if arguments.seeds or arguments.sweep:
        _train_together(arguments, overrides, folder)
        return
    experiment, config = processes.together(lambda: load(arguments.experiment, overrides))
    from mlrl import folders, profiling, runs

    profile = profiling.Steps.parse(arguments.profile_steps) if arguments.profile_steps else profiling.Steps()
    loop, parts = _prepared(experiment)
    _require_finite_rewards(parts)

    def claim() -> None:
        folders.claim_run_folder(folder, config, may_differ=("num_steps", "num_rounds", *folders.LAYOUT))
        folders.write_atomically(pathlib.Path(folder, "operative_config.gin"), _operative_config())

    processes.by_first(claim)
    processes.require_shared(folder)
    with runs.Run(folder, experiment.recording, profile=profile) as run:
        loop.train(experiment, run)
    if arguments.report and processes.is_first():
        from mlrl import report

        page = report.write_report([folder], pathlib.Path(folder, "report.html"))
        print(report.summary_table(folder))
        print(f"report: {page}")


def _train_together(arguments: argparse.Namespace, overrides: dict[str, str], folder: str) -> None:
    """Trains an experiment with several seeds, settings, or both by one program, each run in a folder of its own."""
    from mlrl import folders as folders_
    from mlrl.loops import seeds, sweeps
    from mlrl.types import Refused

    if arguments.profile_steps:
        raise Refused("--profile_steps traces one run: leave out --seeds and --sweep")
    variants, claims = [], []
    for setting in sweeps.settings(arguments.sweep):
        given, name = overrides | setting, sweeps.name_of(setting)
        parts = _prepared(load(arguments.experiment, given)[0])[1]
        _require_finite_rewards(parts)
        count, operative = arguments.seeds or (1 if setting else 0), _operative_config()
        seeds.fits(parts, count, name)
        names = range(parts.experiment.seed, parts.experiment.seed + count)
        loaded = [load(arguments.experiment, given | {"SEED": str(seed)}) for seed in names]
        folders_.require_only_seeds_differ([config for _, config in loaded], [e.seed for e, _ in loaded], names)
        own = [pathlib.Path(folder, name, f"seed_{seed}") for seed in names]
        variants.append(seeds.Variant(parts, [experiment for experiment, _ in loaded], own, _bound_now(), name))
        claims += [(path, config, re.sub(r"(?m)^SEED = .*$", f"SEED = {seed}", operative))
                   for seed, path, (_, config) in zip(names, own, loaded)]  # fmt: skip
    folders_.require_no_run(folder)
    for path, config, operative in claims:
        folders_.claim_run_folder(path, config, may_differ=("num_steps",))
        folders_.write_atomically(path / "operative_config.gin", operative)
    seeds.train(variants)
    if arguments.report:
        from mlrl import report

        own = [path for path, *_ in claims]
        page = report.write_report(own, pathlib.Path(folder, "report.html"))
        print("\n".join(report.summary_table(path) for path in own))
        print(f"report: {page}")


def _bound_now() -> Any:
    """A function that gives a context in which gin has bound what it has now."""
    import gin

    bound = dict(gin.config._CONFIG)

    def swap(to: dict) -> dict:
        before = dict(gin.config._CONFIG)
        gin.config._CONFIG.clear()
        gin.config._CONFIG.update(to)
        return before

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        before = swap(bound)
        try:
            yield
        finally:
            swap(before)

    return inside


def _require_finite_rewards(parts: Any) -> None:
    from mlrl.loops import checks

    if hasattr(parts, "reward"):
        checks.rewards_are_finite(parts.reward, parts.experiment.task)


def _check(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    experiment, _ = load(arguments.experiment, overrides)
    loop, parts = _prepared(experiment)
    print(loop.describe(parts))


def _compile(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from mlrl.pods import ahead, command

    _require_file(pathlib.Path(arguments.experiment), "name an experiment's gin file")
    if not arguments.results:
        again = [f"--gin.{name}={value}" for name, value in overrides.items()]
        return command.report(arguments.experiment, again, arguments.topology, arguments.slices, arguments.json)
    with ahead.on_topology(arguments.topology, arguments.slices):
        experiment, _ = load(arguments.experiment, overrides)
        ahead.compile_all(*_prepared(experiment), arguments.topology, pathlib.Path(arguments.results))
    return 0


def _prepared(experiment: Any) -> tuple[Any, Any]:
    """(the loop's module, the experiment's parts): all that can be wrong before compiling has been refused."""
    import gin
    from mlrl import mistakes

    loop = _loop_of(experiment)
    parts = loop.prepare(experiment)
    mistakes.refuse_unused(gin.config)
    return loop, parts


def _evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from mlrl import processes, runs

    processes.join()
    experiment = processes.together(lambda: _experiment_of(arguments.run_dir, overrides))
    results = runs.evaluate_run(arguments.run_dir, experiment, _loop_of(experiment), task=arguments.task,
                                prompts=arguments.prompts, samples=arguments.samples)  # fmt: skip
    if not processes.is_first():
        return
    for task, found in results.items():
        for name, r in found.items():
            print(f"{task}  {name:<8} {r['value']:.3f}  [{r['low']:.3f}, {r['high']:.3f}]  {r['prompts']} prompts")
    print(f"written to {pathlib.Path(arguments.run_dir, 'results.json')}")


def _export(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from mlrl import export, folders

    folders.require_local(arguments.out_dir)
    experiment = _experiment_of(arguments.run_dir, overrides)
    for line in export.export_run(arguments.run_dir, experiment, _loop_of(experiment), arguments.out_dir,
                                  shard_bytes=int(arguments.shard_gb * 1e9)):  # fmt: skip
        print(line)


def _experiment_of(run_dir: str, overrides: dict[str, str]) -> Any:
    """The experiment that a run folder's config.gin describes."""
    from mlrl import folders

    folders.require_local(run_dir)
    config = pathlib.Path(run_dir, "config.gin")
    _require_file(config, "a run folder has a config.gin")
    return load(str(config), overrides)[0]


def _report(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from mlrl import folders, report

    for path in (*arguments.run_dirs, arguments.out):
        folders.require_local(path)
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
    from mlrl import mistakes
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
        mistakes.refuse_lost(gin.config_parser, path)
        if not gin.config_str() or ("", "mlrl.main.run") not in gin.config._CONFIG:
            raise Refused(f"{path} binds no experiment: it needs main.run.experiment = @online.Experiment()")
        config = gin.config_str(max_line_length=110)
        return gin.get_configurable("mlrl.main.run")(), config


@contextlib.contextmanager
def _gin_errors(path: str) -> Iterator[None]:
    """Turns what gin says, in many lines, into one line that starts with the file."""
    import gin
    from mlrl import mistakes
    from mlrl.types import Refused

    # gin logs every folder in which it did not find a file, as errors.
    level = logging.root.level
    logging.root.setLevel(logging.CRITICAL)
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(mistakes.of_gin(gin.config, path, error)) from error
    finally:
        logging.root.setLevel(level)


def _override(name: str, value: str) -> str:
    """A command-line override as a line of gin; text that gin cannot read as a value becomes a string."""
    import gin

    if not value.startswith(("@", "%")):
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

    if path.is_dir():
        raise Refused(f"{path} is a folder: {what_to_do}")
    if not path.is_file():
        raise Refused(f"there is no file {path}: {what_to_do}")


def _loop_of(experiment: Any) -> Any:
    """The loop's module: an experiment's class is defined beside the functions that run it."""
    return sys.modules[type(experiment).__module__]
