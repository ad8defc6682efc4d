"""Commands, files and targets that README and pages name are there, and take their arguments."""

import argparse
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from mor_tools import commands
from mor_tools.pretraining.command_line import load_settings
from tests.docs.test_pages import PAGES, ROOT
from tests.docs.test_tutorials import TUTORIALS

ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
PATH = re.compile(r"\b(?:examples|tests|docs|integrations|mor_[a-z]+)/[\w./-]*\w")
MAKEFILE = (ROOT / "Makefile").read_text()
TRAINERS = ("pretrain_gpt_mor.py", "nodes.sh", "slurm.sh", "two_nodes_on_one_machine.sh")
OTHERS = {
    "curl",
    "git",
    "kill",
    "pip",
    "pre-commit",
    "vllm",
}  # programs of others, which are not asked
GUIDES = [*PAGES, *TUTORIALS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


def commands_of(page: Path) -> list[str]:
    """The commands of the page's bash blocks, each on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def check(command: str) -> None:
    """Raise where the command could not start."""
    words = shlex.split(command, comments=True)
    variables = []
    while ASSIGNMENT.fullmatch(words[0]):
        variables.append(words.pop(0).partition("=")[0])
    program, *arguments = words
    if program == "torchrun":
        assert arguments[:1] == ["--nproc-per-node"], command
        program, *arguments = ["python", *arguments[2:]]
        if arguments[0] != "-m":
            program, *arguments = arguments
    elif program == "python" and arguments[0] != "-m":
        program, *arguments = arguments
    if program == "make":
        check_make(arguments)
    elif program == "mor":
        chosen = commands.parser().parse_args(arguments)
        if chosen.command == "pretrain":
            config = [] if chosen.config is None else ["--config", str(chosen.config)]
            load_settings([*config, *chosen.settings])
    elif program == "python":
        assert find_spec(arguments[1]) is not None, command
        if arguments[1] == "mor_tools.pretraining":
            load_settings(arguments[2:])
    elif program == "eval":
        assert command == 'eval "$(make -s env)"', command
    elif program not in OTHERS:
        check_script(ROOT / program, arguments, variables)


def check_make(arguments: list[str]) -> None:
    for target in arguments:
        if not ASSIGNMENT.match(target):
            assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target


def check_script(script: Path, arguments: list[str], variables: list[str]) -> None:
    assert script.is_file(), script
    source = script.read_text("utf-8")
    assert script.suffix == ".py" or script.stat().st_mode & 0o100, f"{script} cannot be run"
    for name in variables:
        assert name in source, f"{script} does not know {name}"
    if script.name in TRAINERS:
        load_settings(arguments)
        return
    for argument in arguments:
        if argument.startswith("-"):
            assert f'"{argument}"' in source, f"{script} does not know {argument}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_commands_of_a_page_can_start(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        check(command)


def test_wrong_commands_are_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (
        "make coffee",
        "mor convert a b --recursion-count 3",
        "python examples/generate.py --prompts x",
        "torchrun --nproc-per-node 2 examples/pretrain_gpt_mor.py training.step=1",
        "python -m mor_huggingface.harness",
        "torchrun --nproc-per-node 2 -m mor_tools.pretraining training.step=1",
        "examples/launch/node.sh",
    ):
        with pytest.raises(
            (AssertionError, ValueError, argparse.ArgumentError, SystemExit, KeyError)
        ):
            check(command)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_files_and_targets_that_a_page_names_are_there(page):
    text = page.read_text("utf-8")
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if "*" not in span]
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for span in spans:
        for path in PATH.findall(span):
            assert (ROOT / path).exists() or (ROOT / "integrations" / path).exists(), path
        if re.fullmatch(r"test_\w+\.py", span):
            assert span in tests, span
        if span.startswith("make ") and "=" not in span:
            check_make(span.split()[1:])


def test_extras_that_pages_install_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in PAGES:
        for names in re.findall(r"(?:mor-layers|\.)\[([a-z,]+)\]", page.read_text("utf-8")):
            assert set(names.split(",")) <= set(extras), (page.name, names)
