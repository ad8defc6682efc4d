"""Under every field of TransformerConfig a recursion computes what plain layers do, or refuses it."""

import pytest
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import L2Norm

from mor_layers import RecursionConfig
from mor_megatron import default_layer_spec
from mor_megatron.layers import validate
from tests.distributed import megatron_setup as setup
from tests.distributed.fields import page
from tests.distributed.fields.comparison import Outcome, compare
from tests.distributed.fields.table import EQUAL, FURTHER, NOT_RUN, REFUSED, WITHOUT_EFFECT, Trial
from tests.distributed.pool import WorkerPool

ROWS = [*(EQUAL | WITHOUT_EFFECT | REFUSED).items(), *FURTHER]

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
    "qk_layernorm",
    "qk_clip",
    "recompute_granularity",
)


def outcomes(rows: list[int]) -> list[Outcome]:
    """Of these of `ROWS`. Values are functions in part, so workers look them up by number."""
    setup.initialize()
    return [
        compare(trial.base, trial.given | {name: trial.value}, trial.model, trial.is_initial)
        for name, trial in (ROWS[row] for row in rows)
    ]


def fault(name: str, trial: Trial, outcome: Outcome) -> str | None:
    """What is not as the table says; None where everything is."""
    row = f"{name}={trial.value!r}"
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
    (results,) = pool.run(outcomes, rows=rows)
    found = [fault(*ROWS[row], outcome) for row, outcome in zip(rows, results, strict=True)]
    return [each for each in found if each is not None]


def test_every_field_has_one_row() -> None:
    listed = [*EQUAL, *WITHOUT_EFFECT, *REFUSED, *NOT_RUN]
    assert sorted(listed) == sorted(page.field_names())


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


def test_an_overlap_that_takes_layers_apart_is_refused() -> None:
    config = TransformerConfig(num_layers=8, hidden_size=32, num_attention_heads=4)
    config.overlap_moe_expert_parallel_comm = True  # which asks for several ranks when it is made
    with pytest.raises(ValueError, match="overlap_moe_expert_parallel_comm=True cannot be used"):
        validate(config, RecursionConfig(3))


@pytest.mark.full
def test_a_recursion_obeys_every_field_or_refuses_it(pool: WorkerPool) -> None:
    assert faults(pool, list(range(len(ROWS)))) == []
