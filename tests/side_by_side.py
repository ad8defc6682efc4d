"""Runs the tests as pytest processes side by side, which fill two cores, with one verdict.

`python -m tests.side_by_side [--full] [options of pytest]`. The exhaustive sweeps (marker `full`)
run with `--full` only. Options are handed on to every process. The progress of all is shown as it
comes, the report of each when it has ended, and the last line sums up as pytest's own does.
"""

import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Both take about as long. What the first does not name is left to the second, so that a new folder
# of tests cannot be forgotten.
_DISTRIBUTED = (
    "tests/distributed",
    "tests/mor_tools/pretraining/processes/test_several_nodes.py",
    "tests/test_reference.py",
    "tests/compatibility",
    "tests/gpu",
    "tests/mor_huggingface",
)
PARTS = {
    "distributed": _DISTRIBUTED,
    "others": ("tests", *(f"--ignore={path}" for path in _DISTRIBUTED)),
}

# Seconds that pytest has to close its worker processes after Ctrl-C, which it sees as well.
_GRACE = 15.0

# Seconds after which a test counts as hung and ends its process. The sweeps take longer.
_SWEEP_TIMEOUT = 3600

_OUTCOMES = (
    "failed",
    "passed",
    "skipped",
    "deselected",
    "xfailed",
    "xpassed",
    "warnings",
    "errors",
)
_COUNT = rf"\d+ (?:{'|'.join(_OUTCOMES)}|warning|error)"
_CLOSING_LINE = re.compile(rf"=* ?(?:(?:{_COUNT}(?:, )?)+|no tests ran) in [\d.]+s\b.*")


@dataclass
class Part:
    """One pytest process and what it has said."""

    name: str
    process: subprocess.Popen[str]
    report: list[str] = field(default_factory=list)
    closing: str | None = None
    """Pytest's closing line, once it came."""

    def follow(self, width: int) -> None:
        """Show the progress at once, in whole lines, and keep the report until the end."""
        assert self.process.stdout is not None
        for line in map(str.rstrip, self.process.stdout):
            if _CLOSING_LINE.fullmatch(line):
                self.closing = line.strip("= ")
            elif self.report or line.startswith("=") or self.closing is not None:
                self.report.append(line)
            elif line:
                print(f"{self.name:{width}} | {line}", flush=True)

    def verdict(self, is_chosen: bool) -> tuple[Counter[str], int]:
        """Tests by outcome and exit code.

        A process that ends badly without a failing test, or without pytest's closing line, counts
        as an error, and so does one that finds no test, unless options chose among them.
        """
        code, counts = self.process.returncode, counts_of(self.closing or "")
        is_empty = code == pytest.ExitCode.NO_TESTS_COLLECTED
        if self.closing is not None and (code == 0 or (is_empty and is_chosen)):
            return counts, 0
        if not counts["failed"] + counts["errors"]:
            counts["errors"] += 1
        return counts, max(1, code)


def counts_of(closing: str) -> Counter[str]:
    """Tests by outcome: `3 passed, 1 error in 2.50s` says {"passed": 3, "errors": 1}."""
    plurals = {"warning": "warnings", "error": "errors"}
    pairs: list[tuple[str, str]] = re.findall(r"(\d+) ([a-z]+)", closing.partition(" in ")[0])
    return Counter({plurals.get(outcome, outcome): int(number) for number, outcome in pairs})


def closing_line(counts: Mapping[str, int], seconds: float) -> str:
    """The line that pytest ends with."""
    parts = []
    for outcome in _OUTCOMES:
        if number := counts.get(outcome, 0):
            is_one = number == 1 and outcome in ("warnings", "errors")
            parts.append(f"{number} {outcome.removesuffix('s') if is_one else outcome}")
    return f"{', '.join(parts) or 'no tests ran'} in {seconds:.2f}s"


def run(parts: Mapping[str, Sequence[str]], options: Sequence[str]) -> int:
    """Run the parts at the same time, show what they say, and return the exit code for all."""
    began, code = time.monotonic(), int(pytest.ExitCode.OK)
    started = [Part(name, _start(name, arguments, options)) for name, arguments in parts.items()]
    width = max(map(len, parts))
    followers = [
        threading.Thread(target=part.follow, args=[width], daemon=True) for part in started
    ]
    try:
        for follower in followers:
            follower.start()
        try:
            for part in started:
                part.process.wait()
        except KeyboardInterrupt:
            code = int(pytest.ExitCode.INTERRUPTED)
            _wait_for_the_end(started)
        # A process that a test left behind may keep the pipe open, so that it never ends.
        for follower in followers:
            follower.join(_GRACE)
    finally:
        for part in started:
            part.process.kill()
    total: Counter[str] = Counter()
    for part in started:
        counts, code_of_part = part.verdict(is_chosen=bool(options))
        total += counts
        code = code or code_of_part
        print(f"\n--- {part.name}: {part.closing or 'pytest ended without a closing line'}")
        if report := "\n".join(part.report).strip():
            print(report)
    if not total.keys() - {"deselected"}:
        code = code or int(pytest.ExitCode.NO_TESTS_COLLECTED)
    print(f"\n{closing_line(total, time.monotonic() - began)}", flush=True)
    return code


def _start(name: str, arguments: Sequence[str], options: Sequence[str]) -> subprocess.Popen[str]:
    # What failed last is noted by each for itself: in one place, the later would overwrite it.
    cache = f"cache_dir=.pytest_cache/{name}"
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-o", cache, *options, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _wait_for_the_end(started: Sequence[Part]) -> None:
    """After Ctrl-C, which a terminal sends to all of its processes: give them time to end."""
    deadline = time.monotonic() + _GRACE
    for part in started:
        try:
            part.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            part.process.terminate()
            part.process.wait()


def main(options: Sequence[str]) -> int:
    # So that nothing goes on when this is told to end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if "--full" in options:
        chosen = [option for option in options if option != "--full"]
        parts = {
            name: (*arguments, "-o", f"faulthandler_timeout={_SWEEP_TIMEOUT}")
            for name, arguments in PARTS.items()
        }
        return run(parts, chosen)
    return run({name: ("-m", "not full", *arguments) for name, arguments in PARTS.items()}, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
