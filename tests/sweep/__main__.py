"""`make sweep`: every pair of settings that may be used together, in some layout, against one rank.

Cases are drawn so that any two values that may meet do meet: a router in every layout, with every KV
policy, recipe and kind of layer, and so on. Each takes two optimizer steps on up to 8 CPU processes;
losses, gradients and weights must be those of one rank. The last lines say how many pairs ran, and
which are refused and why.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tests.distributed.pool import WorkerPool
from tests.sweep import factors
from tests.sweep.draw import Drawn, described, draw
from tests.sweep.run import Result, Sweep
from tests.sweep.train import refusal

USUAL = {name: values[0] for name, values in factors.FACTORS.items()}
MOST_RANKS = 8
TIMEOUT = 90.0


def main() -> None:
    """Draw, run, report; exits with 1 where a case failed."""
    options = argparse.ArgumentParser(
        prog="tests.sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = options.add_argument
    add("--seed", type=int, default=0, help="other seeds, other cases (default: 0)")
    add("--only", type=int, nargs="+", metavar="NUMBER", help="these cases, as failures name them")
    add("--first", type=int, metavar="N", help="only the first N cases")
    add("--list", action="store_true", help="print the cases, run none")
    add("--report", type=Path, metavar="FILE", help="write the tables as Markdown too")
    chosen = options.parse_args()
    drawn = draw(factors.FACTORS, refusal, chosen.seed)
    numbered = list(enumerate(drawn.cases))[: chosen.first]
    if chosen.only:
        if unknown := [n for n in chosen.only if not 0 <= n < len(drawn.cases)]:
            options.error(f"--only {unknown[0]}: there are {len(drawn.cases)} cases, from 0 on")
        numbered = [numbered[number] for number in chosen.only]
    if chosen.list:
        for number, case in numbered:
            print(f"{number:4} {described(case, USUAL)}")
        return
    begun = time.monotonic()
    results: list[Result] = []
    pool = WorkerPool(MOST_RANKS, timeout=TIMEOUT)
    try:
        for result in Sweep(pool).run(numbered):
            results.append(result)
            told = described(result.case, USUAL)
            ended = "FAILED" if result.failure else "equal"
            print(f"{result.number:4} {ended} in {result.seconds:4.1f} s  {told}", flush=True)
            if result.failure:
                print(f"     {result.failure[-3000:]}", flush=True)
    finally:
        pool.close()
    text = report(drawn, results, time.monotonic() - begun)
    print(f"\n{text}")
    if chosen.report is not None:
        chosen.report.write_text(f"{text}\n", "utf-8")
    sys.exit(any(result.failure for result in results))


def report(drawn: Drawn, results: list[Result], seconds: float) -> str:
    """What ran, what failed, and what is refused, as Markdown."""
    failed = [result for result in results if result.failure]
    ran = drawn.num_pairs - len(drawn.refused)
    lines = [
        f"{len(results)} of {len(drawn.cases)} cases in {seconds / 60:.0f} minutes, {len(failed)} "
        f"failed. Together the cases have {ran} of {drawn.num_pairs} pairs of values; "
        f"{len(drawn.refused)} are refused.",
        "",
        "| pairs | refused, as in |",
        "|---|---|",
    ]
    reasons = Counter(str(refusal(case)) for case in drawn.refused.values())
    lines += [f"| {count} | {reason} |" for reason, count in reasons.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
