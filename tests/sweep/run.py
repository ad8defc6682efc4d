"""Runs cases of the sweep and compares each layout with one rank."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tests.distributed.pool import WorkerPool
from tests.sweep import factors
from tests.sweep.draw import Case
from tests.sweep.train import Outcome, train

TOLERANCE = 1e-5
"""Largest difference relative to the numbers themselves, in fp32."""
SMALLEST = {"gradients": 2e-6, "weights": 1e-5}
"""Largest absolute difference of numbers near zero. Weights have taken two steps at a rate of 1."""
LAYOUT_FACTORS = ("layout", "recomputed", "data parallel")
"""What differs between the layout of a case and one rank."""


@dataclass(frozen=True)
class Result:
    """How a case ended."""

    number: int
    case: Case
    seconds: float
    failure: str = ""
    """What differs, or the error; empty where the layout computes what one rank computes."""


class Sweep:
    """Runs cases in a pool of worker processes, and remembers what one rank computes."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._alone: dict[tuple[str, ...], Outcome] = {}

    def run(self, cases: Iterable[tuple[int, Case]]) -> Iterator[Result]:
        """The result of each numbered case, as soon as it is known."""
        for number, case in cases:
            begun = time.monotonic()
            try:
                failure = self._compare(case)
            except (AssertionError, TimeoutError) as error:  # of a rank
                failure = _first_reason(str(error))
            yield Result(number, case, time.monotonic() - begun, failure)

    def _compare(self, case: Case) -> str:
        expected = self._on_one_rank(case)
        ranks = factors.LAYOUTS[case["layout"]].ranks
        for rank, outcome in enumerate(self._pool.run(train, ranks, case=case, alone=False)):
            for failure in differences(outcome, expected):
                return f"rank {rank}: {failure}"
        return ""

    def _on_one_rank(self, case: Case) -> Outcome:
        key = tuple(value for name, value in case.items() if name not in LAYOUT_FACTORS)
        if key not in self._alone:
            (self._alone[key],) = self._pool.run(train, 1, case=case, alone=True)
        return self._alone[key]


def _first_reason(failures: str) -> str:
    """What ended the first rank, and where: the others lost their connection to it."""
    ranks = failures.split("\n--- rank ")[1:]
    first = next((text for text in ranks if "closed by peer" not in text), failures)
    return first[-3000:]


def differences(outcome: Outcome, expected: Outcome) -> Iterator[str]:
    """What differs between two outcomes by more than rounding, in words."""
    for step, (loss, other) in enumerate(zip(outcome.losses, expected.losses, strict=True), 1):
        if not abs(loss - other) <= TOLERANCE * abs(other):
            yield f"the loss of step {step} is {loss:.7f}, on one rank {other:.7f}"
    for step, (norm, other) in enumerate(zip(outcome.norms, expected.norms, strict=True), 1):
        if not abs(norm - other) <= 10 * TOLERANCE * abs(other):
            yield f"the gradient's norm of step {step} is {norm:.7f}, on one rank {other:.7f}"
    if outcome.gradients:
        given = outcome.gradients, expected.gradients
        yield from _unequal("the gradient of", *given, SMALLEST["gradients"])
    given = outcome.parameters, expected.parameters
    yield from _unequal("after the last step,", *given, SMALLEST["weights"])


def _unequal(
    what: str,
    tensors: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    smallest: float,
) -> Iterator[str]:
    for name in sorted(tensors.keys() ^ expected.keys()):
        yield f"{what} {name} exists {'here' if name in tensors else 'on one rank'} only"
        return
    for name, tensor in tensors.items():
        off = (tensor - expected[name]).abs() - TOLERANCE * expected[name].abs()
        if not bool((off <= smallest).all()):
            yield f"{what} {name} is off by {(tensor - expected[name]).abs().max():.1e}"
