"""The command `mor` itself: its help, its version, and what they may cost."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mor_layers
from mor_layers.recursion import SHARING_SCHEMES
from mor_layers.weights import INITIALIZATIONS
from mor_tools import commands, terminal
from mor_tools.commands import command_line
from mor_tools.commands.command_line import COMMANDS
from mor_tools.formats import FORMATS
from mor_tools.planner import HARDWARE
from tests.mor_tools.terminals import on_a_terminal

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "megatron", "mor_layers", "matplotlib", "rich", "omegaconf")


def test_help_imports_no_library_that_takes_seconds_to_load():
    requests = [["--help"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import contextlib, sys\n"
        "from mor_tools.commands import main\n"
        f"for arguments in {requests}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(arguments)\n"
        f"print('imported', *(name for name in {HEAVY} if name in sys.modules), sep=' ')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *_, last = run.stdout.splitlines()
    assert last.split() == ["imported"]
    assert all(f"usage: mor {name}" in run.stdout for name in COMMANDS)


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mor {mor_layers.__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_summaries_are_the_first_lines_of_the_modules(name):
    module = sys.modules[commands.load(name).__module__]
    first = (module.__doc__ or "").split("\n\n")[0]
    assert " ".join(first.split()) == COMMANDS[name].summary


def test_names_that_options_repeat_are_those_of_the_packages():
    assert set(command_line.FORMATS) == set(FORMATS)
    assert tuple(HARDWARE) == command_line.HARDWARE
    assert command_line.INITIALIZATIONS == INITIALIZATIONS
    assert command_line.SHARING_SCHEMES == SHARING_SCHEMES


@pytest.mark.parametrize("arguments", [[], ["coffee"], ["--coffee"], ["--coffee", "plan"]])
def test_wrong_arguments_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(arguments)
    assert stopped.value.code == 2
    assert "usage: mor" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mor_tools.commands.plan", raising=False)
    monkeypatch.setitem(
        sys.modules, "mor_tools.planner", None
    )  # what `import` makes of this: missing
    with pytest.raises(ModuleNotFoundError, match=r"mor_tools\.planner"):
        commands.main(["plan", "x.yaml", "--gpus", "1"])
    monkeypatch.delitem(sys.modules, "mor_tools.planner")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit) as stopped:
        commands.main(["plan", "x.yaml", "--gpus", "1"])
    assert stopped.value.code == 2
    assert 'rich, which is not installed. Install it with `pip install "mor-layers[reports]"`' in (
        capsys.readouterr().err
    )


def test_extras_of_optional_packages_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in commands._EXTRAS.items():
        brought = " ".join(project["optional-dependencies"][extra])
        # transformers depends on tokenizers
        assert package in brought or (package, extra) == ("tokenizers", "hf")


def test_errors_are_red_on_a_terminal_and_plain_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.error("no.") == "error: no."
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert terminal.error("no.") == "\x1b[1;31merror:\x1b[0m no."
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.error("no.") == "error: no."


def test_a_command_that_is_interrupted_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load", lambda name: interrupted)
    with pytest.raises(SystemExit) as stopped:
        commands.main(["plan", "x.yaml", "--gpus", "1"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\n"


def test_a_command_at_work_says_so_on_a_terminal():
    config = str(ROOT / "examples" / "configs" / "tiny.yaml")
    plan = ["-m", "mor_tools.commands", "plan", config, "--gpus", "2"]
    status, shown = on_a_terminal([sys.executable, *plan])
    assert status == 0
    assert shown.index("starting mor plan ...") < shown.index(
        "counting the layouts of 2 devices ..."
    )


def test_without_rich_nothing_is_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with terminal.working("loading"):
        pass
    assert capsys.readouterr() == ("", "")
