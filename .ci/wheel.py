"""Builds the wheel and shows that it works where nothing but it and its dependencies is installed.

First come the core and the command `mor` without any extra, that is with torch and three small packages.
Then each extra is added to such an environment, in turn, and what it promises is imported.

    python .ci/wheel.py [FOLDER]

FOLDER gets the wheel (default: dist). It is built from a copy of the sources, because setuptools
leaves files of earlier builds beside them, which would get into the next wheel. The new environment
needs no network: the wheel's dependencies, and theirs in turn, are linked into it from the environment
that runs this script. What the wheel does not declare is not there.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    PathDistribution,
    distribution,
)
from pathlib import Path

from packaging.requirements import Requirement  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NAME = PROJECT["project"]["name"]
SOURCES = [ROOT / folder for folder in PROJECT["tool"]["setuptools"]["packages"]["find"]["where"]]
PACKAGES = PROJECT["tool"]["importlinter"]["root_packages"]
SECONDS_OF_HELP = 1.0
PROMISES = {
    "megatron": ["mor_megatron"],
    "muon": ["emerging_optimizers"],
    "te": ["transformer_engine.pytorch"],
    "bridge": ["mor_bridge"],
    "titan": ["mor_titan"],
    "dali": ["mor_dali"],
    "hf": ["mor_huggingface", "mor_tools.commands.generate"],
    "eval": ["mor_huggingface.lm_eval"],
    "reports": ["mor_tools.reports", "mor_tools.commands.plan", "mor_tools.commands.report"],
    "serve": ["mor_tools.serving", "mor_tools.commands.serve"],
    "wandb": ["wandb"],
    "completion": ["argcomplete"],
    "megatron,examples": ["mor_tools.pretraining"],
}
"""Packages whose modules can all be imported with an extra, or with several together."""
TOOLS = {"dev", "docs"}
"""Extras for work on this project, which promise nothing to those who install the wheel."""


def main(target: Path) -> None:
    """Build, look at, install and use the wheel; raises where something is wrong."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        check_contents(wheel)
        python = install(wheel, Path(folder) / "environment")
        use(python, Path(folder))
        print(f"without extras: works ({time.monotonic() - began:.0f} s)", flush=True)
        check_promises(python, Path(folder))
        target.mkdir(exist_ok=True)
        shutil.copy(wheel, target)
    print(f"{target / wheel.name} is complete and works ({time.monotonic() - began:.0f} s)")


def build(folder: Path) -> Path:
    """The wheel, in `folder`."""
    copy = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in PACKAGES:
        place = find(package).relative_to(ROOT)
        shutil.copytree(ROOT / place, copy / place, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(copy))
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Every module and recipe is in it and nothing else, typing markers and licence included."""
    expected = {"LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    for package in PACKAGES:
        place = find(package)
        files = [*place.rglob("*.py"), *place.rglob("*.yaml"), place / "py.typed"]
        expected |= {str(file.relative_to(place.parent)) for file in files}
    with zipfile.ZipFile(wheel) as archive:
        found = {re.sub(r"^[^/]+\.dist-info/(licenses/)?", "", n) for n in archive.namelist()}
    assert found == expected, f"missing or superfluous: {sorted(found ^ expected)}"


def install(wheel: Path, environment: Path) -> Path:
    """Python of a new environment that has the wheel and what it asks for."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip("install", "--no-deps", "--no-index", str(wheel), python=python)
    site = site_of(environment)
    for dependency in closure(installed(site)):
        link(dependency, site)
    return python


def check_promises(base: Path, folder: Path) -> None:
    """With each extra in turn, import what it promises.

    Args:
        base: Python of the environment without extras, to which those of an extra are added.
    """
    declared = set(PROJECT["project"]["optional-dependencies"]) - TOOLS
    promised = {extra for extras in PROMISES for extra in extras.split(",")}
    assert promised == declared, f"promises of these extras: {sorted(promised ^ declared)}"
    site = site_of(base.parents[1])
    known = {dependency.name for dependency in closure(installed(site))}
    for extras, packages in PROMISES.items():
        began = time.monotonic()
        try:
            added = closure(installed(site), extras.split(","))
        except PackageNotFoundError as missing:
            print(f"with {extras}: left out, because {missing.name} is not installed here")
            continue
        environment = folder / f"with-{extras.replace(',', '-')}"
        venv.create(environment, with_pip=False)
        own = site_of(environment)
        (own / "base.pth").write_text(str(site))
        for dependency in added:
            if dependency.name not in known:
                link(dependency, own)
        run(folder, environment / "bin" / "python", "-c", IMPORT, *packages)
        print(f"with {extras}: works ({time.monotonic() - began:.0f} s)", flush=True)


def site_of(environment: Path) -> Path:
    """The folder of an environment's packages."""
    (site,) = environment.glob("lib/python*/site-packages")
    return site


def installed(site: Path) -> Distribution:
    """The wheel, installed."""
    (place,) = site.glob("mor_layers-*.dist-info")
    return PathDistribution(place)


def closure(root: Distribution, extras: Sequence[str] = ()) -> list[Distribution]:
    """What a distribution with these extras depends on, and what that depends on in turn.

    Raises:
        PackageNotFoundError: some of it is not installed in this environment.
    """
    found: dict[str, Distribution] = {}
    seen = set()
    waiting = [(root, extra) for extra in ("", *extras)]  # each with an extra that is asked for
    while waiting:
        asking, extra = waiting.pop()
        for requirement in map(Requirement, asking.requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            other = found.setdefault(requirement.name, distribution(requirement.name))
            asked = {(requirement.name, name) for name in ("", *requirement.extras)} - seen
            waiting += [(other, name) for _, name in asked]
            seen |= asked
    return list(found.values())


def link(dependency: Distribution, site: Path) -> None:
    """Link a distribution's files into `site`; folders of several distributions are merged."""
    for file in dependency.files or ():
        if file.parts[0] == ".." or file.suffix == ".pyc":
            continue
        link = site / file
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(os.path.realpath(dependency.locate_file(file)))


def use(python: Path, folder: Path) -> None:
    """What a newcomer does first, outside the checkout."""
    run(folder, python, "-W", "error:::mor_layers", "-c", EVERY_MODULE)
    for page in ("README.md", "docs/pages/quickstart.md"):
        text = (ROOT / page).read_text("utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        plain = [block for block in blocks if "megatron" not in block]
        assert plain, f"{page} has no example in plain PyTorch"
        # A page's blocks share names.
        run(folder, python, "-W", "error:::mor_layers", "-c", "\n".join(plain))
    mor = python.parent / "mor"
    for arguments, extra in LACKING.items():
        refused = subprocess.run(
            [mor, *arguments.split()], cwd=folder, env=hidden(), capture_output=True, text=True
        )
        assert refused.returncode == 2, refused.stderr
        expected = f'pip install "mor-layers[{extra}]"'
        assert expected in refused.stderr, f"mor {arguments}: {refused.stderr}"
    seconds = min(float(run(folder, python, "-c", TIMED, str(mor))) for _ in range(3))
    assert seconds < SECONDS_OF_HELP, f"mor --help takes {seconds:.1f} s"
    assert run(folder, mor, "--version").split() == ["mor", distribution_version(python)]


EVERY_MODULE = """
import importlib, mor_layers, pkgutil
for module in pkgutil.walk_packages(mor_layers.__path__, "mor_layers."):
    importlib.import_module(module.name)
"""
IMPORT = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    paths = getattr(package, "__path__", ()) if name.startswith("mor_") else ()
    for module in pkgutil.walk_packages(paths, name + "."):
        if not module.name.endswith(("__main__", "lm_eval")):
            importlib.import_module(module.name)
"""
"""Imports every module of our packages; other packages as a whole. The lm_eval one has its own extra."""
LACKING = {
    "inspect run --text file": "reports",
    "generate": "reports",
    "plan file --gpus 1": "reports",
    "report run": "reports",
    "serve": "serve",
    "convert source target": "reports",
    "pretrain": "megatron",
}
"""The first extra that each command asks for if there is none."""
TIMED = """
import subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.argv[1], "--help"], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - start)
"""


def distribution_version(python: Path) -> str:
    """The version that the environment's metadata says."""
    code = f"from importlib.metadata import version; print(version({NAME!r}))"
    return run(python.parent, python, "-c", code).strip()


def find(package: str) -> Path:
    """The folder of a package."""
    (place,) = (folder / package for folder in SOURCES if (folder / package).is_dir())
    return place


def pip(*arguments: str, python: Path | None = None) -> None:
    """Run pip, for another environment where `python` is given."""
    other = ["--python", str(python)] if python else []
    run(ROOT, sys.executable, "-m", "pip", *other, "--disable-pip-version-check", "-q", *arguments)


def hidden() -> dict[str, str]:
    """Environment variables that do not lead to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(folder: Path, *command: str | Path) -> str:
    """Output of a command that does not see the checkout."""
    done = subprocess.run(command, cwd=folder, env=hidden(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist"))
