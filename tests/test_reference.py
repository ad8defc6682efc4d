"""Every backend gives what the published code gave: logits, losses, selections, gradients.

`--reference-dir DIR` compares with other cases of the same format, `--backend NAME` through one
backend only.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests import reference_cases
from tests.distributed.pool import WorkerPool
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
def test_megatron_on_two_ranks_reproduces_the_published_run(pool, reference_case, record_property):
    check_megatron(pool, reference_case, record_property, tp=2, sequence_parallel=True)


@pytest.mark.backend("megatron")
@pytest.mark.daily(
    "expert_choice_middle_cycle_r3_kv_sharing_update",
    "expert_choice_cycle_r2_tanh_mlp_aux_router",
    "recursive_sequence_r3",
    "token_choice_middle_cycle_r3_kv_sharing",
)
def test_megatron_on_one_rank_reproduces_the_published_run(pool, reference_case, record_property):
    check_megatron(pool, reference_case, record_property, tp=1, sequence_parallel=False)


def check_megatron(
    pool: WorkerPool,
    reference_case: tuple[dict[str, Any], dict[str, Any]],
    report: Callable[[str, object], None],
    tp: int,
    sequence_parallel: bool,
) -> None:
    """What `check` does, for a run of Megatron on `tp` ranks."""
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
        check(backend, case, tensors, result, report)
