"""`make test-gpu`: what has to be shown on GPUs, unattended, with a verdict at the end.

Exit codes: 0 every case passed; 1 a case failed; 2 a wrong argument; 3 there is no GPU, and nothing
was run; 4 what could run passed, but some cases are not available on this machine.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.gpu import bare_machine
from tests.gpu.cases import CASES
from tests.gpu.machine import rehearsal, this_machine
from tests.gpu.runner import pool_for, run_cases
from tests.gpu.verdict import NO_GPU, Case, Verdict, chosen, exit_code, table_of, write_report


def main(arguments: Sequence[str], cases: Sequence[Case] = CASES) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser("make test-gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cases by name")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a case may take")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="begin no case after them")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the verdict as JSON too")
    parser.add_argument(
        "--rehearse", action="store_true", help="on CPUs, with stand-ins: shows that cases run"
    )
    given = parser.parse_args(arguments)
    try:
        cases = chosen(cases, given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        for case in cases:
            needs = ", ".join([f"{case.gpus} GPU{'s' * (case.gpus > 1)}", *case.needs])
            print(f"{case.name}: {case.shows} ({needs})")
        return 0
    machine = rehearsal() if given.rehearse else this_machine()
    if machine.gpus == 0:
        print(
            f"There is no GPU: none of {len(cases)} cases was run, and nothing was shown. "
            "--rehearse runs them on CPUs with stand-ins."
        )
        return NO_GPU
    print(machine.description)
    if bare_machine.lacks_jaxtyping:
        print("jaxtyping is not installed: a stand-in takes its place.")

    def tell(verdict: Verdict) -> None:
        print(f"{verdict.outcome}: {verdict.name} ({verdict.seconds:.0f} s)", flush=True)
        if verdict.outcome == "failed":
            print(verdict.detail, flush=True)

    pool = pool_for(machine, given.timeout)
    try:
        verdicts = run_cases(cases, machine, pool, tell, given.within)
    finally:
        pool.close()
    code = exit_code(verdicts)
    print(f"\n{machine.description}")
    print(table_of([_brief(verdict) for verdict in verdicts], cases))
    counts = {
        o: sum(v.outcome == o for v in verdicts) for o in ("passed", "failed", "not available")
    }
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if given.report is not None:
        write_report(given.report, verdicts, machine.description, code)
    return code


def _brief(verdict: Verdict) -> Verdict:
    """With one line of an error's detail: the last, which says what it was."""
    if verdict.figures:
        return verdict
    line = (verdict.detail.splitlines() or [""])[-1]
    return replace(verdict, detail=line)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
