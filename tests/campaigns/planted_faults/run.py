"""Plants small semantic faults, one at a time in a copy of the source, and runs the tests.

    python -m tests.campaigns.planted_faults [--processes 2] [--only TEXT]

A fault that no test notices means a missing test. Each is tried against the tests it names, those of
`make test` (marker `full` left out). The last lines count what was found; the exit code is 1 where a
smaller share than `--at-least` was.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.campaigns.planted_faults.every_fault import FAULTS
from tests.campaigns.planted_faults.fault import Fault

ROOT = Path(__file__).parents[3]
_LEFT_OUT = shutil.ignore_patterns(
    ".git", "runs", "site", "build", "dist", "__pycache__", ".*_cache"
)
_SECONDS = 900
_NOTHING_RAN = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)


def planted(fault: Fault, root: Path) -> str:
    """The source of the fault's file with the fault in it.

    Raises:
        ValueError: the text that it replaces does not stand there exactly once.
    """
    source = (root / fault.file).read_text("utf-8")
    if source.count(fault.old) != 1:
        raise ValueError(
            f"{fault.what}: {fault.file} has {source.count(fault.old)} places that read "
            f"{fault.old!r}; there must be one. Mend its entry in {Path(__file__).parent}."
        )
    return source.replace(fault.old, fault.new)


def is_found(fault: Fault, copy: Path) -> bool:
    """Whether a test fails once the fault is in the copy, which is whole again afterwards.

    Raises:
        ValueError: none of its tests runs, so that nothing could notice it.
    """
    file = copy / fault.file
    before = file.read_text("utf-8")
    file.write_text(planted(fault, copy), "utf-8")
    try:
        tests = [f"tests/{name}" for name in fault.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not full", *tests]
        command += ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={_SECONDS // 3}"]
        path = os.pathsep.join([str(copy), str(copy / "integrations")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            return True  # a test that hangs is noticed
        if run.returncode in _NOTHING_RAN:
            raise ValueError(
                f"{fault.what}: no test of {fault.tests!r} runs every day. Mend its entry in "
                f"{Path(__file__).parent}."
            )
        return run.returncode != 0
    finally:
        file.write_text(before, "utf-8")


def try_all(faults: Sequence[Fault], processes: int) -> list[Fault]:
    """Plant each fault and say what became of it; those that no test noticed."""
    survived = []
    with tempfile.TemporaryDirectory(prefix="planted_faults_") as folder:
        copies = [Path(folder, str(number)) for number in range(processes)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        free = list(copies)

        def attempt(fault: Fault) -> bool:
            copy = free.pop()
            try:
                return is_found(fault, copy)
            finally:
                free.append(copy)

        with ThreadPoolExecutor(processes) as pool:
            for number, (fault, found) in enumerate(
                zip(faults, pool.map(attempt, faults), strict=True), start=1
            ):
                outcome = "found" if found else "SURVIVED"
                print(
                    f"{number:3}/{len(faults)}  {outcome:8}  {fault.file}: {fault.what}", flush=True
                )
                if not found:
                    survived.append(fault)
    return survived


def main(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(prog="planted_faults", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("--processes", type=int, default=2, help="faults tried at a time (default: 2)")
    add("--only", default="", metavar="TEXT", help="faults whose file or description has this text")
    add("--at-least", type=float, default=0.95, help="share that must be found (default: 0.95)")
    chosen = options.parse_args(arguments)
    faults = [fault for fault in FAULTS if chosen.only in f"{fault.file} {fault.what}"]
    if not faults:
        options.error(f"--only {chosen.only!r} names none of the {len(FAULTS)} faults.")
    for fault in faults:  # before anything runs
        planted(fault, ROOT)
    survived = try_all(faults, chosen.processes)
    found = len(faults) - len(survived)
    print(f"{found} of {len(faults)} faults were found")
    for fault in survived:
        print(f"survived: {fault.file}: {fault.what}")
    return int(found < chosen.at_least * len(faults))
