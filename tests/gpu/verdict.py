"""Cases, what came of them, and the table that says so."""

import fnmatch
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Need = Literal["transformer_engine", "fp8", "mxfp8", "apex"]
Outcome = Literal["passed", "failed", "not available"]

PASSED, FAILED, NO_GPU, INCOMPLETE = 0, 1, 3, 4
"""Exit codes; 2 is a wrong argument."""

SHORTFALL = "shortfall"
"""The figure in which a check says that what it measured is not good enough. Its case fails, and keeps
its figures."""


@dataclass(frozen=True)
class Case:
    """One thing to be shown on GPUs."""

    name: str
    shows: str
    check: Callable[..., dict[str, Any]]
    """Runs on every rank, raises AssertionError, and returns figures of the first rank for the table.
    At the top level of a module: it travels by name."""
    arguments: dict[str, Any] = field(default_factory=dict)
    rehearsed_with: dict[str, Any] = field(default_factory=dict)
    """Other arguments for a CPU."""
    gpus: int = 1
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    name: str
    outcome: Outcome
    seconds: float
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    """What the check measured, by name."""


def chosen(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose names match any of the patterns (shell-style); all without a pattern.

    Raises:
        ValueError: a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(case.name, pattern) for case in cases):
            names = ", ".join(case.name for case in cases)
            raise ValueError(f"no case is named {pattern!r}. There are: {names}.")
    return [c for c in cases if not patterns or any(fnmatch.fnmatch(c.name, p) for p in patterns)]


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """`FAILED` if any case failed, `INCOMPLETE` if any could not run here, else `PASSED`."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if "failed" in outcomes:
        return FAILED
    return INCOMPLETE if "not available" in outcomes else PASSED


def table_of(verdicts: Sequence[Verdict], cases: Sequence[Case]) -> str:
    """One row a case, with what it shows and groups of figures below it.

    In plain text: a bare machine has nothing else.
    """
    shows = {case.name: case.shows for case in cases}
    width = max((len(v.name) for v in verdicts), default=0)
    lines = []
    for v in verdicts:
        first, *further = v.detail.splitlines() or [""]
        if further:
            first, further = "", [first, *further]
        lines.append(f"{v.name:{width}}  {v.outcome:13}  {v.seconds:6.1f} s  {first}".rstrip())
        lines.append(f"    {shows[v.name]}")
        lines += [f"        {line}" for line in further]
    return "\n".join(lines)


def write_report(path: Path, verdicts: Sequence[Verdict], machine: str, code: int) -> None:
    """The same as JSON."""
    report = {"machine": machine, "exit_code": code, "cases": [asdict(v) for v in verdicts]}
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
