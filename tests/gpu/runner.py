"""Runs cases one after another, whatever becomes of them.

Each case has processes that no failed case has used: an error on a GPU outlives it in its process.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.pool import WorkerPool
from tests.gpu.machine import Machine
from tests.gpu.verdict import Case, Verdict

_FOLDER, _STAND_INS = Path(__file__).parents[1] / "distributed", ("te_stand_in", "apex_stand_in")


def run_cases(
    cases: Sequence[Case], machine: Machine, timeout: float, tell: Callable[[Verdict], None]
) -> list[Verdict]:
    """A verdict on every case, in order.

    Args:
        timeout: seconds that a case may take.
        tell: is told each verdict as it comes.
    """
    verdicts = []
    with _search_path(machine):
        pool = WorkerPool(machine.gpus, timeout, on_gpus=not machine.is_rehearsal)
        for case in cases:
            verdict = _verdict_on(case, machine, pool)
            if verdict.outcome == "failed":
                pool.close()
            verdicts.append(verdict)
            tell(verdict)
        pool.close()
    return verdicts


def _verdict_on(case: Case, machine: Machine, pool: WorkerPool) -> Verdict:
    reasons = [machine.missing.get(n, f"no {n}") for n in case.needs if n not in machine.has]
    if case.gpus > machine.gpus:
        reasons.append(f"needs {case.gpus} GPUs, there are {machine.gpus}")
    if reasons:
        return Verdict(case.name, "not available", 0.0, "; ".join(dict.fromkeys(reasons)))
    begin = time.monotonic()
    try:
        changes = case.rehearsed_with if machine.is_rehearsal else {}
        figures = pool.run(case.check, case.gpus, **(case.arguments | changes))[0]
    except (AssertionError, TimeoutError) as error:
        return Verdict(case.name, "failed", time.monotonic() - begin, str(error).strip())
    detail = ", ".join(f"{name} {_shown(value)}" for name, value in figures.items())
    return Verdict(case.name, "passed", time.monotonic() - begin, detail)


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def _search_path(machine: Machine) -> Iterator[None]:
    """Processes of a rehearsal find the stand-ins first."""
    added = [str(_FOLDER / name) for name in _STAND_INS if machine.is_rehearsal]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)
