"""Thousands of hostile cases, each of which must end well: correct, or refused with a reason.

A case is a function of a generator of random numbers and of an empty folder. It returns None where
what it tried worked as it should, and the reason where it was refused. Whatever else happens is a
failure: any exception that users would see as a traceback, a wrong result, a reason that says
nothing, or one that takes too long. Kind, seed and number name a case, and so repeat it.
"""

import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Literal

Case = Callable[[random.Random, Path], str | None]
Ending = Literal["correct", "refused", "failed"]
ENDINGS: tuple[Ending, ...] = ("correct", "refused", "failed")
LONGEST = 5.0
"""Seconds of computing that a case may take, of which most need milliseconds."""
LONGEST_REASON = 3000
"""Characters of a reason: nobody reads a value of megabytes that is repeated in full."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    kind: str
    seed: int
    number: int
    ending: Ending
    reason: str = ""
    """Why it was refused, or what failed."""

    @property
    def name(self) -> str:
        """What `--only` takes to run it again."""
        return f"{self.kind}:{self.number}"


def run_case(kind: str, case: Case, seed: int, number: int) -> Outcome:
    """One case, in a folder of its own."""
    begun = time.process_time()  # whatever else the machine does
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reason = case(random.Random(f"{seed} {kind} {number}"), Path(folder))
        except Exception:
            return Outcome(kind, seed, number, "failed", traceback.format_exc())
    took = time.process_time() - begun
    if took > LONGEST:
        return Outcome(kind, seed, number, "failed", f"took {took:.1f} seconds: {reason}")
    if reason is None:
        return Outcome(kind, seed, number, "correct")
    if len(reason.split()) < 3 or len(reason) > LONGEST_REASON:
        said = f"a reason of {len(reason)} characters: {reason[:200]!r}"
        return Outcome(kind, seed, number, "failed", said)
    return Outcome(kind, seed, number, "refused", reason)


def run_cases(
    kinds: dict[str, Case], number: int, seed: int, seldom: Collection[str] = ()
) -> Iterator[Outcome]:
    """So many cases, spread evenly over the kinds, but for those that come every fourth time."""
    turns = (
        (kind, turn // 4 if kind in seldom else turn)
        for turn in count()
        for kind in kinds
        if kind not in seldom or turn % 4 == 0
    )
    for kind, index in islice(turns, number):
        yield run_case(kind, kinds[kind], seed, index)


def table(outcomes: list[Outcome]) -> str:
    """How many cases of each kind ended how, as Markdown."""
    counts = Counter((outcome.kind, outcome.ending) for outcome in outcomes)
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    rows = [[kind, *(str(counts[kind, ending]) for ending in ENDINGS)] for kind in kinds]
    lines = [["kind", *ENDINGS], ["---", *["---:"] * len(ENDINGS)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
