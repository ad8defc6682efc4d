"""FP8 in a recursion, as far as a CPU goes: row counts that divide, and one precision per weight."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from mor_megatron import recursion_block_spec
from mor_megatron.layers import validate
from mor_megatron.layers.quantization import filled, require_one_precision
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

LENGTH, BATCH = 16, 3


def row_counts_and_outcome(recursion: RecursionConfig, is_quantized: bool, experts: int | None):
    """Row counts of every matrix product of the shared layers, the loss, and gradients.

    The setting is given after the model is built on local layers: only what the recursion makes of
    it is seen here, and numbers stay those of fp32.
    """
    setup.initialize()
    moe: dict[str, Any] = {}
    if experts is not None:
        moe = {"num_moe_experts": experts, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}
        moe["moe_token_dispatcher_type"] = "alltoall"
    config = setup.tiny_config(num_layers=8, **moe)
    config.fp8 = "hybrid" if is_quantized else None  # TransformerConfig would ask for TE
    config.fp8_recipe = "tensorwise"
    model = setup.tiny_gpt(config, lambda config, v: recursion_block_spec(config, recursion))
    config.fp8 = None  # Megatron's own contexts need TE
    stack = model[0].decoder.layers[1].recursion.layers
    counts: list[int] = []
    for module in stack.modules():
        is_expert = getattr(module, "is_expert", False)  # Megatron fills experts' rows itself
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and not is_expert:
            module.register_forward_pre_hook(
                lambda _, arguments: counts.append(arguments[0].shape[:-1].numel())
            )
    chunks = setup.data_parallel(model)
    loss = setup.forward_backward(chunks, setup.random_tokens(BATCH, LENGTH), BATCH)
    return counts, loss, setup.gather_gradients(chunks)


@pytest.mark.parametrize(
    "experts", [pytest.param(None, marks=pytest.mark.full), 4], ids=["dense", "moe"]
)
@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing", "exit_state"])
@pytest.mark.parametrize(
    "router", [ExpertChoice(alpha=0.5), TokenChoice()], ids=["expert", "token"]
)
def test_steps_run_rows_that_divide_and_compute_the_same(
    pool: WorkerPool, router: Any, policy: Any, experts: int | None
) -> None:
    recursion = RecursionConfig(3, router=router, kv_policy=policy)
    outcomes = [
        pool.run(row_counts_and_outcome, recursion=recursion, is_quantized=flag, experts=experts)[0]
        for flag in (False, True)
    ]
    (plain, loss, grads), (aligned, quantized_loss, quantized_grads) = outcomes
    assert len(aligned) > 0
    assert any(count % 16 for count in plain)  # else there is nothing to fill
    assert not any(count % 16 for count in aligned)
    assert quantized_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(quantized_grads, grads, rtol=1e-4, atol=1e-6)


def test_rows_are_filled_with_as_few_zeros_as_divide() -> None:
    rows = torch.ones(5, 6, 2)
    assert filled(rows, 1) is rows
    out = filled(rows, 16)
    assert out.shape == (8, 6, 2)
    assert torch.equal(out[:5], rows)
    assert not out[5:].any()


def refusals() -> list[str]:
    setup.initialize()
    config = setup.tiny_config(num_layers=8, first_last_layers_bf16=True)
    messages = []
    for start, end, fp8 in ((1, 1, "hybrid"), (2, 1, "hybrid"), (1, 2, None)):
        config.fp8, config.fp4 = fp8, None if fp8 else "e2m1"
        config.fp8_recipe = "tensorwise" if fp8 else "delayed"  # the default, which fp4 ignores
        config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16 = start, end
        try:
            require_one_precision(config, 1, 6)
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    config.sequence_parallel = True
    try:
        validate(config, RecursionConfig(3))
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_weights_of_two_precisions_are_refused(pool: WorkerPool) -> None:
    ((kept, at_start, at_end, spread),) = pool.run(refusals)
    assert kept == "accepted"
    for message in (at_start, at_end):
        assert "layers 2 to 7 of 8" in message
        assert "Use at most 1 at the start and 1 at the end" in message
    assert "sequence_parallel=False" in spread
