"""Runs cases one after another, whatever becomes of them.

Each case has processes that no failed case has used: an error on a GPU outlives it in its process.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.distributed.pool import WorkerPool
from tests.gpu.machine import Machine
from tests.gpu.verdict import SHORTFALL, Case, Verdict

_FOLDER, _STAND_INS = (
    Path(__file__).parents[1] / "distributed" / "platform",
    ("te_stand_in", "apex_stand_in"),
)


def run_cases(
    cases: Sequence[Case],
    machine: Machine,
    pool: WorkerPool,
    tell: Callable[[Verdict], None],
    within: float | None = None,
) -> list[Verdict]:
    """A verdict on every case, in order; `tell` is told each as it comes.

    After `within` seconds no further case is begun, and those that remain are not available.
    """
    verdicts = []
    begin = time.monotonic()
    for case in cases:
        if within is not None and time.monotonic() - begin > within:
            verdict = Verdict(case.name, "not available", 0.0, f"{within:g} s had passed")
        else:
            verdict = _verdict_on(case, machine, pool)
        verdicts.append(verdict)
        tell(verdict)
    return verdicts


def pool_for(machine: Machine, timeout: float) -> WorkerPool:
    """Processes for cases, of which none may take longer than `timeout` seconds."""
    if machine.is_rehearsal:  # said to the processes before they import Triton
        os.environ["TRITON_INTERPRET"] = "1"
    stand_ins = [_FOLDER / name for name in _STAND_INS if machine.is_rehearsal]
    return WorkerPool(machine.gpus, timeout, not machine.is_rehearsal, stand_ins)


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
        pool.close()
        return Verdict(case.name, "failed", time.monotonic() - begin, str(error).strip())
    seconds, shortfall = time.monotonic() - begin, figures.pop(SHORTFALL, None)
    detail = _listed(figures)
    if shortfall is not None:
        return Verdict(case.name, "failed", seconds, f"{shortfall}\n{detail}", figures)
    return Verdict(case.name, "passed", seconds, detail, figures)


def _listed(figures: dict[str, Any]) -> str:
    """Figures in one line; a line for each group of figures."""
    if any(isinstance(value, dict) for value in figures.values()):
        return "\n".join(f"{name}: {_listed(group)}" for name, group in figures.items())
    shown = {name: value for name, value in figures.items() if value is not None}
    return ", ".join(f"{name} {_shown(value)}" for name, value in shown.items())


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
