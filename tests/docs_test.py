"""The README and docs/: their files are written out and prepared or trained, their links lead somewhere."""

import ast
import contextlib
import json
import pathlib
import re
import sys

import pytest

from mlrl import main

REPO = pathlib.Path(__file__).resolve().parent.parent
PAGES = (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
TEXTS = {page.relative_to(REPO).as_posix(): page.read_text() for page in PAGES}

# A block whose opening line names a file, as ```gin my_experiment.gin, is that file; examples build on each other.
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)
BLOCKS = [(page, *found.groups()) for page, text in TEXTS.items() for found in BLOCK.finditer(text)]
FILES = {name: text for _, _, name, text in BLOCKS if name}
TRAINED = ("my_experiment.gin", "my_guessing.gin", "my_nim.gin")  # below, which prepares them first
EXPERIMENTS = [name for name in FILES if name.endswith(".gin") and name not in TRAINED]

TINY = ("--gin.Config.width=16", "--gin.Config.layers=1", "--gin.Config.heads=2", "--gin.Config.kv_heads=1",
        "--gin.Config.head_width=8", "--gin.Config.mlp_width=24")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder outside of the checkout with every file that the README and docs/ show."""
    folder = tmp_path_factory.mktemp("docs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    with contextlib.chdir(folder):
        path = list(sys.path)
        sys.path.insert(0, str(folder))
        yield folder
        sys.path[:] = path


def test_the_pages_have_the_examples_that_they_are_for():
    shown = {page: [name for where, _, name, _ in BLOCKS if where == page and name] for page in TEXTS}
    assert shown["README.md"] == ["my_rewards.py", "my_experiment.gin"]
    assert len(shown["docs/own_reward.md"]) >= 6 and len(shown["docs/own_parts.md"]) >= 4
    assert len(FILES) == sum(map(len, shown.values())), "two blocks are files of the same name"


def test_every_block_of_python_or_gin_is_a_file_and_so_is_run():
    assert [(page, text) for page, kind, name, text in BLOCKS if kind in ("python", "gin") and not name] == []


def test_a_reward_takes_twelve_lines():
    assert FILES["my_rewards.py"].count("\n") <= 12


def test_the_page_of_the_sandbox_says_what_came_out(folder):
    module = {}
    exec(FILES["my_sandbox.py"], module)
    assert module["tried"]() == [("raised", [0.5, None]), ("timeout", [])]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_can_be_prepared_and_uses_all_that_it_binds(name, folder):
    experiment, _ = main.load(name, {"Config.layers": "1"})
    loop, parts = main._prepared(experiment)  # refuses what cannot work, and what nothing uses
    assert parts.experiment is experiment and loop.__name__.startswith("mlrl.loops.")


def test_the_reward_of_the_readme_is_right():
    module = {}
    exec(FILES["my_rewards.py"], module)
    judge = module["right_digits"]
    assert judge("12", {"answer": "12"}) == {"reward": 1.0, "outcome": 1.0}
    assert judge("13", {"answer": "12"}) == {"reward": 0.5, "outcome": 0.0}
    assert judge("121", {"answer": "12"}) == {"reward": pytest.approx(2 / 3), "outcome": 0.0}
    assert judge("", {"answer": "12"}) == {"reward": 0.0, "outcome": 0.0}


def test_the_readme_s_command_trains(folder, capsys):
    (command,) = re.findall(r"^mlrl (train my_experiment\.gin.*)$", TEXTS["README.md"], re.M)
    small = ("--gin.STEPS=2", "--gin.online.Experiment.prompts_per_step=8", *TINY)
    assert main.main([*command.split(), *small]) == 0, capsys.readouterr().err
    run = folder / "runs" / "my_experiment"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-2:] == [1, 2]
    assert "reward/right_digits/outcome" in lines[-1]
    assert (run / "report.html").is_file()
    table = re.search(r"^\| file \| .*?\n\n", TEXTS["docs/run_folder.md"], re.M | re.S).group()
    told = set(re.findall(r"^\| `([\w.]+)/?`", table, re.M))
    there = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    unasked = {"results.json", "profile", "chunks.json"}  # not without an evaluation, --profile_steps, chunks.fastest
    assert told - unasked == there - unasked


def test_links_and_named_files_exist():
    missing = []
    for page, text in TEXTS.items():
        prose = BLOCK.sub("", text)
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
        missing += [(page, link) for link in links if not (REPO / page).parent.joinpath(link).exists()]
        paths = re.findall(r"`((?:mlrl|gin|experiments|docs|tests|benchmarks|colab)/[\w./-]+)`", prose)
        missing += [(page, path) for path in paths if not (REPO / path).exists()]
        modules = re.findall(r"`mlrl\.([\w.]+)`", prose)
        missing += [(page, name) for name in modules if not _module_or_attribute(name)]
    assert missing == []


def _strings_of_the_code():
    """Every string that the package writes, with a NUL for what an f-string fills in."""
    found = []
    for path in sorted((REPO / "mlrl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


STRINGS = _strings_of_the_code()


def _is_logged(name):
    """Whether the code has a string that comes to this name; <word> stands for any, ... for any end."""
    if name.endswith("..."):
        return any(string.startswith(name[:-3]) for string in STRINGS)
    name = re.sub(r"<\w+>", "x", name)
    patterns = (".+".join(map(re.escape, string.split("\0"))) for string in STRINGS if re.fullmatch(r"\S+", string))
    return any(re.fullmatch(pattern, name) for pattern in patterns if re.search(r"\w", pattern.replace(".+", "")))


def test_metrics_that_are_named_are_logged():
    named = [(page, name) for page, text in TEXTS.items()
             for name in re.findall(r"`([a-z_]+/[\w@<>/.]+)`", BLOCK.sub("", text))
             if not (REPO / name.split("/")[0]).is_dir() and name.split("/")[0] not in ("runs", "tensorboard", "layers")
             and not re.search(r"\.\w+$", name)]  # fmt: skip
    assert len(named) > 20
    assert [pair for pair in named if not _is_logged(pair[1])] == []
    assert not _is_logged("ratio/middle") and not _is_logged("kll/...")


def test_names_and_messages_that_are_quoted_are_those_of_the_code():
    """Of the two pages that one reads with a run beside them: every name, and every phrase of three words or more."""
    words = "\n".join(path.read_text() for folder in ("mlrl", "gin") for path in (REPO / folder).rglob("*.*")
                      if path.suffix in (".py", ".gin"))  # fmt: skip
    missing = []
    for page in ("docs/debugging.md", "docs/reading.md"):
        quoted = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", BLOCK.sub("", TEXTS[page]))]
        names = [name for name in quoted if re.fullmatch(r"[a-zA-Z_.]+", name)]
        missing += [name for name in names if not re.search(rf"\b{re.escape(name.split('.')[-1])}\b", words)]
        phrases = [part.strip() for text in quoted if text.count(" ") > 3 and "=" not in text.split()[1:2]
                   for part in re.split(r"\.\.\.|['(]|[\d.]+%?", text)]  # fmt: skip
        phrases = [part for part in phrases if part.count(" ") >= 2]
        missing += [part for part in phrases if not any(part in string for string in STRINGS)]
    assert missing == []


def _module_or_attribute(dotted):
    """Whether mlrl.<dotted> is a file of the package, or a name written in one."""
    *parents, last = dotted.split(".")
    inside = REPO.joinpath("mlrl", *parents)
    if (inside / f"{last}.py").is_file() or (inside / last).is_dir():
        return True
    source = inside.with_suffix(".py") if inside.with_suffix(".py").is_file() else inside / "__init__.py"
    return re.search(rf"\b{last}\b", source.read_text()) is not None


def test_commands_and_knobs_that_are_named_exist():
    words = "\n".join(TEXTS.values())
    for command in set(re.findall(r"^mlrl (\w+)|`mlrl (\w+)", words, re.M)):
        with pytest.raises(SystemExit) as stopped:
            main.main(["".join(command), "--help"])
        assert stopped.value.code == 0, command
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
    assert set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", words, re.M)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


def test_the_picture_is_small():
    assert 0 < (REPO / "docs" / "report.png").stat().st_size < 300_000


@pytest.mark.parametrize("name, shown", [
    ("my_guessing.gin", {"reward/from_environment/turns", "reward/from_environment", "truncated_share"}),
    ("my_nim.gin", {"reward/from_environment/invalid", "reward/from_environment/moves", "reward/from_environment/won",
                    "controller/role_conditioned/1", "eval/nim_against_random/greedy"}),
])  # fmt: skip
def test_the_episodes_of_the_docs_train(name, shown, folder, capsys):
    rows = ("--gin.online.Experiment.prompts_per_step=8", "--gin.online.Experiment.group_size=4")
    evaluated = ("--gin.Evaluation.prompts=8",) if name == "my_nim.gin" else ()
    run = folder / "runs" / name
    train = ["train", name, "--run_dir", str(run), "--gin.STEPS=2", *rows, *TINY, *evaluated]
    assert main.main(train) == main.main(["report", str(run)]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shown <= set().union(*lines) and (run / "report.html").is_file()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"][:1] for row in samples} == {"?" if name == "my_guessing.gin" else ":"}
    if name == "my_guessing.gin":  # a hint after every guess but the last
        assert all(row["prompt"] == "?" and set("".join(row["observed"].values())) <= {*"<>"} for row in samples)
        assert all(len(row["observed"]) == row["parts"]["from_environment/turns"] - 1 for row in samples)
    else:  # the baseline is the old one: 0 in the first step
        assert [line["controller/role_conditioned/0"] == 0 for line in lines if "loss" in line] == [True, False]


def test_the_page_of_methods_is_that_of_the_gin_files(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "docs")
    import make_methods

    page = make_methods.methods_page()
    assert page == (REPO / "docs" / "methods.md").read_text(), "run python docs/make_methods.py"
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert sorted(headings) == sorted(path.stem for path in (REPO / "gin" / "methods").glob("*.gin"))
    assert "Made of [grpo](#grpo), [`policy.cispo`](../mlrl/losses/policy.py)" in page


def test_the_table_of_knobs_is_that_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "docs")
    import make_knobs

    page = make_knobs.knobs_page()
    assert page == (REPO / "docs" / "knobs.md").read_text(), "run python docs/make_knobs.py"
    assert "| `ppo_clip.clip_high` | `0.2` | how far above 1 it may rise; 0.28 in DAPO. |" in page
    silent = [line for line in page.splitlines() if line.endswith("|  |")]
    assert not silent, f"docstrings say nothing of: {silent}"
