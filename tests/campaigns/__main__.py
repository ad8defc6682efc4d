"""`make campaign ARGUMENTS="--cases N --seed S"`: hostile cases, and how they ended."""

import argparse
import sys
import time

from tests.campaigns.campaign import LONGEST, run_case, run_cases, table
from tests.campaigns.kinds import KINDS, SELDOM


def main() -> None:
    """Run, print the table and every failure; exits with 1 where there is one."""
    options = argparse.ArgumentParser(prog="tests.campaigns", description=__doc__)
    add = options.add_argument
    add("--cases", type=int, default=2000, help="how many, of all kinds together (default: 2000)")
    add("--seed", type=int, default=0, help="other seeds, other cases (default: 0)")
    add("--only", metavar="KIND:NUMBER", help="one case, as a failure names it")
    chosen = options.parse_args()
    begun = time.monotonic()
    if chosen.only is not None:
        kind, _, number = chosen.only.rpartition(":")
        if kind not in KINDS or not number.isdigit():
            options.error(f"--only {chosen.only}: use KIND:NUMBER, KIND one of {', '.join(KINDS)}")
        outcomes = [run_case(kind, KINDS[kind], chosen.seed, int(number))]
        print(outcomes[0].ending, outcomes[0].reason)
    else:
        outcomes = list(run_cases(KINDS, chosen.cases, chosen.seed, SELDOM))
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.ending == "failed"]
    for outcome in failed if chosen.only is None else []:
        print(f"\n--only {outcome.name!r} --seed {chosen.seed}\n{outcome.reason[-3000:]}")
    took = time.monotonic() - begun
    print(
        f"\n{len(outcomes)} cases in {took:.0f} seconds; none may compute for more than {LONGEST:.0f}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
