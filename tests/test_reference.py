"""Every backend gives what the published code gave: logits, losses, selections, gradients.

`--reference-dir DIR` compares with other cases of the same format, `--backend NAME` through one
backend only.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests import reference_cases
from tests.reference_cases import TOLERANCE, ReferenceResult, differences


def check(
    backend: str,
    case: dict[str, Any],
    tensors: dict[str, Any],
    result: ReferenceResult,
    report: Callable[[str, object], None],
) -> None:
    """Fail where a result differs from the published one; report the largest difference either way.

    Args:
        backend: what ran the case, as the terminal summary names it.
        report: pytest's `record_property`.
    """
    found = differences(case, tensors, result)
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    report("reference_difference", (case["name"], backend, found[worst], worst))
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
    assert not wrong, f"{case['name']} differs by more than {TOLERANCE}: {wrong}"


@pytest.mark.backend("core")
def test_the_core_reproduces_the_published_run(reference_case, record_property):
    case, tensors = reference_case
    result = reference_cases.run_case(case, tensors)
    check("core", case, tensors, result, record_property)


@pytest.mark.backend("megatron")
@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, True)], ids=["TP1", "TP2+SP"]
)
def test_megatron_reproduces_the_published_run(
    pool, reference_case, record_property, tp, sequence_parallel
):
    from tests.distributed import reference_megatron

    case, tensors = reference_case
    for result in pool.run(
        reference_megatron.run_case,
        tp,
        case=case,
        tensors=tensors,
        tp=tp,
        sequence_parallel=sequence_parallel,
    ):
        backend = f"megatron TP{tp}" + ("+SP" if sequence_parallel else "")
        check(backend, case, tensors, result, record_property)
