"""Under every field of TransformerConfig a recursion computes what plain layers do, or refuses it."""

import math
import re
from itertools import batched

import pytest
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import L2Norm

from mor_megatron import default_layer_spec
from tests.distributed import megatron_setup as setup
from tests.distributed.fields import page
from tests.distributed.fields.comparison import Outcome, compare, said_later
from tests.distributed.fields.table import (
    DIFFERENT,
    EQUAL,
    EQUAL_TO_ONE_RANK,
    FURTHER,
    REFUSED,
    REJECTED,
    WITHOUT_EFFECT,
)
from tests.distributed.fields.trial import Trial
from tests.distributed.pool import WorkerPool
from tests.gpu.cases import CASES

ROWS = [*(EQUAL | WITHOUT_EFFECT | REFUSED | REJECTED).items(), *FURTHER]

# So that a run stays far from its timeout.
ROWS_OF_A_RUN = 40

# One of each kind of field, and those that were silently wrong.
DAILY = (
    "add_bias_linear",
    "distribute_saved_activations",
    "experimental_attention_variant",
    "hidden_dropout",
    "moe_aux_loss_coeff",
    "moe_layer_freq",
    "moe_token_dispatcher_type",
    "mtp_num_layers",
    "normalization",
    "overlap_moe_expert_parallel_comm",
    "persist_layer_norm",
    "sequence_parallel",
    "qk_layernorm",
    "qk_clip",
    "recompute_granularity",
)


def outcomes(rows: list[int]) -> list[Outcome]:
    """Of these of `ROWS`, which have one layout. Values are functions in part, so workers look them up
    by number."""
    layout = ROWS[rows[0]][1].layout
    setup.initialize(**layout)
    results = []
    for name, trial in (ROWS[row] for row in rows):
        fields = trial.given | {name: trial.value}
        if trial.is_set_later:
            results.append(said_later(trial.base, fields))
            continue
        results.append(
            compare(trial.base, fields, trial.model, trial.is_initial, is_spread=bool(layout))
        )
    return results


def fault(name: str, trial: Trial, outcome: Outcome) -> str | None:
    """What is not as the table says; None where everything is."""
    row = f"{name}={trial.value!r}"
    if REJECTED.get(name) is trial:
        said = outcome.refused_by_megatron or "nothing"
        return None if trial.says in said else f"{row} is taken by Megatron, or not so: {said}"
    if trial.says:
        said = outcome.refused or "nothing"
        is_clear = said.startswith("ValueError") and trial.says in said
        return None if is_clear else f"{row} is not refused, or not clearly: {said}"
    if outcome.refused or outcome.refused_by_megatron:
        return f"{row} is refused: {outcome}"
    is_equal = (
        outcome.loss_difference <= trial.tolerance
        and outcome.gradient_difference <= trial.gradient_tolerance
    )
    if not is_equal:
        return f"{row} is not equal: {outcome}"
    moves = outcome.effect > 1e-5
    if moves == (WITHOUT_EFFECT.get(name) is trial):
        return f"{row} {'moves' if moves else 'does not move'} plain layers: {outcome}"
    return None


def faults(pool: WorkerPool, rows: list[int]) -> list[str]:
    layouts: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for row in rows:
        layouts.setdefault(tuple(ROWS[row][1].layout.items()), []).append(row)
    found = []
    for layout, alike in layouts.items():
        num_ranks = math.prod(size for _, size in layout)
        for some in batched(alike, ROWS_OF_A_RUN):
            for results in pool.run(outcomes, num_ranks, rows=list(some)):
                found += [fault(*ROWS[row], one) for row, one in zip(some, results, strict=True)]
    return [each for each in found if each is not None]


def test_every_field_has_one_row() -> None:
    listed = [*EQUAL, *EQUAL_TO_ONE_RANK, *WITHOUT_EFFECT, *REFUSED, *REJECTED, *DIFFERENT]
    assert sorted(listed) == sorted(page.field_names())


def test_gpu_cases_that_the_page_names_are_there() -> None:
    notes = [trial.note for trial in (WITHOUT_EFFECT | REJECTED).values()]
    named = [name for note in notes for name in re.findall(r"GPU case: ([\w/ ]+)", note)]
    assert len(named) == 3 and {case.name for case in CASES} >= set(named)


@pytest.mark.parametrize("name", EQUAL_TO_ONE_RANK)
def test_what_one_rank_is_compared_with_elsewhere_is(name: str) -> None:
    source = (page.PAGE.parents[2] / EQUAL_TO_ONE_RANK[name]).read_text("utf-8")
    # Virtual stages overlap their exchange: `megatron_setup.tiny_config`.
    assert ('"cp": 2' if name == "context_parallel_size" else "vpp") in source


def test_the_page_is_made_of_the_table() -> None:
    written = page.PAGE.read_text("utf-8")
    assert written == page.page(), "write it anew: python -m tests.distributed.fields.page"


def test_a_recursion_obeys_fields_of_each_kind(pool: WorkerPool) -> None:
    names = [name for name, _ in ROWS]
    assert faults(pool, [names.index(name) for name in DAILY]) == []


def test_queries_and_keys_get_the_norm_that_qk_l2_norm_asks_for() -> None:
    # Compared in `EQUAL` too, where it takes half a minute of compilation.
    config = TransformerConfig(
        num_layers=8, hidden_size=32, num_attention_heads=4, qk_l2_norm=True, qk_layernorm=True
    )
    parts = default_layer_spec(config).submodules.self_attention.submodules
    assert parts.q_layernorm is parts.k_layernorm is L2Norm


@pytest.mark.full
def test_a_recursion_obeys_every_field_or_refuses_it(pool: WorkerPool) -> None:
    assert faults(pool, list(range(len(ROWS)))) == []
