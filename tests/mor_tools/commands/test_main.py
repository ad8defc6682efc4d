"""The command `mor` itself: its help, its version, and what they may cost."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mor_layers
from mor_tools import commands

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "megatron", "mor_layers", "matplotlib", "rich", "omegaconf")


def test_help_imports_no_library_that_takes_seconds_to_load():
    code = (
        "import sys\n"
        "from mor_tools.commands import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        f"    print('imported', *(name for name in {HEAVY} if name in sys.modules), sep=' ')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *_, last = run.stdout.splitlines()
    assert last.split() == ["imported"]
    assert all(name in run.stdout for name in ("convert", "inspect", "plan"))


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mor {mor_layers.__version__}\n"


@pytest.mark.parametrize("name", sorted(commands._COMMANDS))
def test_summaries_are_the_first_lines_of_the_modules(name):
    _, summary = commands._COMMANDS[name]
    assert " ".join((commands.load(name).__doc__ or "").split("\n\n")[0].split()) == summary


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
        commands.main(["plan", "x.yaml"])
    monkeypatch.delitem(sys.modules, "mor_tools.planner")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit) as stopped:
        commands.main(["plan", "x.yaml"])
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
