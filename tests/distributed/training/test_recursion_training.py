"""Training with recursions: optimizers, precision, accumulation, masks, logs, checkpoints."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from mor_layers import (
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    RecursionConfig,
    TokenChoice,
)
from mor_megatron import (
    Norm,
    default_layer_spec,
    recursion_block_spec,
    recursion_layer_spec,
    recursion_layers,
    routing_reports,
    token_depths,
    update_routers,
)
from mor_megatron.checkpoints import runs
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

EXPERT = ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5)
SEQUENCE_LENGTH = 14
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}


def build(
    recursion: RecursionConfig, config: dict[str, Any], ddp: dict[str, Any] | None = None
) -> list[Any]:
    chunks = setup.tiny_gpt(
        setup.tiny_config(**({"num_layers": 8} | config)),
        block=lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    return setup.data_parallel(chunks, **(ddp or {}))


def losses_of_training(
    layout: dict[str, Any],
    recursion: RecursionConfig,
    config: dict[str, Any],
    ddp: dict[str, Any],
    steps: int = 3,
    **optimizer_options: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    setup.initialize(**layout)
    chunks = build(recursion, config, ddp)
    optimizer = setup.build_optimizer(chunks, **optimizer_options)
    losses = []
    for step in range(steps):
        tokens = setup.random_tokens(4, SEQUENCE_LENGTH, seed=step)
        losses.append(setup.train_step(chunks, optimizer, tokens))
        update_routers(chunks)
        routing_reports(chunks)
    if ddp.get("overlap_param_gather"):
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
    return losses, setup.gather_parameters(chunks)


@pytest.mark.parametrize(
    ("layout", "config", "ddp"),
    [
        ({}, {}, {"use_distributed_optimizer": True}),
        ({}, {}, {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
                  "overlap_param_gather": True, "bucket_size": 20000}),
        ({"tp": 2}, {"sequence_parallel": True}, {}),
        ({"pp": 2}, {}, {"overlap_grad_reduce": True}),
    ],
    ids=["distributed optimizer", "overlapped", "TP2+SP", "PP2"],
)  # fmt: skip
def test_several_optimizer_steps_equal_those_of_one_rank(
    pool: WorkerPool, layout: dict[str, Any], config: dict[str, Any], ddp: dict[str, Any]
) -> None:
    recursion = RecursionConfig(3, router=replace(EXPERT, warmup_steps=4))
    ((losses, weights),) = pool.run(
        losses_of_training, layout={}, recursion=recursion, config={}, ddp={}, adam_eps=1e-3
    )
    results = pool.run(
        losses_of_training,
        2,
        layout=layout,
        recursion=recursion,
        config=config,
        ddp=ddp,
        adam_eps=1e-3,
    )
    for other_losses, other_weights in results:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-5)


def test_random_loops_draw_anew_for_each_step_and_alike_on_all_ranks(pool: WorkerPool) -> None:
    loops = RandomLoops(seed=4)
    router, drawn = loops.build(8, 3), []
    for _ in range(3):
        drawn.append(router.num_loops)
        router.advance(torch.zeros(3))
    assert drawn == [1, 3, 1]
    run = partial(
        pool.run, losses_of_training, recursion=RecursionConfig(3, router=loops), adam_eps=1e-3
    )
    ((losses, weights),) = run(layout={}, config={}, ddp={})
    for other_losses, other_weights in run(
        world_size=2, layout={"tp": 2}, config={"sequence_parallel": True}, ddp={}
    ):
        assert other_losses == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-5)
    ((fixed, _),) = pool.run(
        losses_of_training,
        recursion=RecursionConfig(3),
        adam_eps=1e-3,
        layout={},
        config={},
        ddp={},
    )
    assert all(abs(own - other) > 1e-4 for own, other in zip(losses, fixed, strict=True))


def gradients(
    recursion: RecursionConfig,
    config: dict[str, Any],
    micro_batch_size: int = 1,
    num_sequences: int = 4,
    layout: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    setup.initialize(**(layout or {}))
    chunks = build(recursion, config)
    setup.forward_backward(
        chunks, setup.random_tokens(num_sequences, SEQUENCE_LENGTH), micro_batch_size
    )
    return setup.gather_gradients(chunks)


@pytest.mark.parametrize("router", [EXPERT, TokenChoice(z_loss_coefficient=0.01)], ids=["ec", "tc"])
def test_auxiliary_losses_weigh_the_same_however_a_batch_is_accumulated(
    pool: WorkerPool, router: Any
) -> None:
    recursion = RecursionConfig(3, router=router)
    if isinstance(router, TokenChoice):  # a balance loss is a product of means: z-loss only
        recursion = replace(recursion, router=replace(router, balancing="none"))
    run = partial(pool.run, gradients, recursion=recursion, config={})
    (whole,), (accumulated,) = run(micro_batch_size=4), run(micro_batch_size=1)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


BALANCED = MOE | {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    "moe_z_loss_coeff": 0.1,
}


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ({}, {}),
        ({}, BALANCED | {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
        ({"tp": 2}, BALANCED | {"sequence_parallel": True}),
    ],
)
def test_per_token_loss_scales_auxiliary_losses_like_the_language_model_loss(
    pool: WorkerPool, layout: dict[str, int], config: dict[str, Any]
) -> None:
    ranks = layout.get("tp", 1)
    (plain, per_token) = pool.run(per_token_gradients, ranks, layout=layout, config=config)[0]
    torch.testing.assert_close(per_token, plain, rtol=1e-4, atol=1e-6)


def per_token_gradients(
    layout: dict[str, int], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    setup.initialize(**layout)
    results = []
    tokens = setup.random_tokens(4, SEQUENCE_LENGTH)
    positions = torch.arange(SEQUENCE_LENGTH).expand(2, -1)

    def summed_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

    def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.mean(), {}

    for per_token in (False, True):
        chunks = build(
            RecursionConfig(3, router=EXPERT), config | {"calculate_per_token_loss": per_token}
        )

        def forward(batches: Any, model: Any, per_token: bool = per_token) -> tuple[Tensor, Any]:
            ids = next(batches)
            losses = model(ids[:, :-1], positions, None, labels=ids[:, 1:])
            return losses, summed_loss if per_token else mean_loss

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(tokens.chunk(2)),
            model=chunks,
            num_microbatches=2,
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=2,
        )
        results.append(setup.gather_gradients(chunks))
    return results[0], results[1]


def global_loads() -> tuple[list[float], list[float]]:
    """Micro-batches that routers over experts remember of a global batch: within it, and after it."""
    setup.initialize()
    chunks = build(RecursionConfig(3, router=EXPERT), BALANCED)
    (layer,) = recursion_layers(chunks)
    within: list[float] = []
    router = layer.expert_routers[0]
    chunks[0].register_forward_hook(
        lambda *_: within.append(router.global_load.batches.sum().item())
    )
    setup.forward_backward(chunks, setup.random_tokens(2, SEQUENCE_LENGTH))
    after = [each.global_load.batches.sum().item() for each in layer.expert_routers]
    return within, after


def test_the_global_balance_of_experts_begins_anew_with_each_batch(pool: WorkerPool) -> None:
    ((within, after),) = pool.run(global_loads)
    assert within == [3.0, 6.0]  # three steps in each of two micro-batches
    assert set(after) == {0.0}


def bf16_losses(layout: dict[str, Any], extra: dict[str, Any]) -> tuple[list[float], bool]:
    setup.initialize(**layout)
    router = TokenChoice(balancing="loss_free", balancing_coefficient=1e-3)
    config = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    chunks = build(RecursionConfig(3, router=router), config | extra)
    optimizer = setup.build_optimizer(chunks)
    losses = []
    tokens = setup.random_tokens(4, SEQUENCE_LENGTH)
    for _ in range(4):
        losses.append(setup.train_step(chunks, optimizer, tokens))
        update_routers(chunks)
        routing_reports(chunks)
    biases = [layer.recursion.router.depth_bias for layer in recursion_layers(chunks)]
    return losses, all(b.dtype == torch.float32 and b.abs().max() > 5e-4 for b in biases)


def test_bf16_training_learns_and_keeps_small_bias_steps_in_fp32(pool: WorkerPool) -> None:
    ((losses, keeps_fp32),) = pool.run(bf16_losses, layout={}, extra={})
    assert losses[-1] < losses[0] - 0.1
    assert keeps_fp32
    for other, other_keeps in pool.run(
        bf16_losses, 2, layout={"tp": 2}, extra={"sequence_parallel": True}
    ):
        assert other == pytest.approx(losses, abs=0.05)
        assert other_keeps


def masked_run(
    layout: dict[str, Any], config: dict[str, Any], router: Any, policy: str, changed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of two sequences of two documents each, the second padded; gradients of their sum."""
    setup.initialize(**layout)
    recursion = RecursionConfig(3, router=router, kv_policy=policy)  # type: ignore[arg-type]
    (model,) = build(recursion, config)
    length, first = 16, 9
    ids = setup.random_tokens(2, length - 1)
    is_padding = torch.zeros(2, length, dtype=torch.bool)
    is_padding[1, 13:] = True
    if changed:  # what no token of the first document may notice
        ids[:, first:] = (ids[:, first:] + 1) % setup.VOCAB_SIZE
    document = (torch.arange(length) >= first).long()
    barred = document[:, None] != document[None, :]
    barred = (barred | torch.ones(length, length).triu(1).bool()).expand(2, 1, length, length)
    positions = torch.arange(length).expand(2, -1)
    losses = model(ids, positions, barred, labels=ids, padding_mask=is_padding)
    losses.masked_fill(is_padding, 0).sum().backward()
    model.module.config.finalize_model_grads_func([model])
    return losses.detach(), setup.gather_gradients([model])


@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing"])
@pytest.mark.parametrize("router", [EXPERT, TokenChoice()], ids=["expert", "token"])
def test_documents_and_padding_are_kept_apart_under_sequence_parallelism(
    pool: WorkerPool, router: Any, policy: str
) -> None:
    arguments = {"router": router, "policy": policy}
    ((losses, grads),) = pool.run(masked_run, layout={}, config={}, changed=False, **arguments)
    for other_losses, other_grads in pool.run(
        masked_run,
        2,
        layout={"tp": 2},
        config={"sequence_parallel": True},
        changed=False,
        **arguments,
    ):
        torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_grads, grads, rtol=1e-4, atol=1e-5)
    ((changed, _),) = pool.run(masked_run, layout={}, config={}, changed=True, **arguments)
    # The first document's tokens but its last. Rows may be padded to another width, so products
    # may round differently.
    torch.testing.assert_close(changed[:, :8], losses[:, :8], rtol=1e-6, atol=1e-6)


def two_recursions(layout: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    setup.initialize(**layout)

    def block(c: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
        dense = default_layer_spec(c)
        first = recursion_layer_spec([dense], RecursionConfig(2, router=EXPERT))
        second = recursion_layer_spec([dense, dense], RecursionConfig(3, router=TokenChoice()))
        return TransformerBlockSubmodules(
            layer_specs=[dense, first, dense, second, dense], layer_norm=Norm
        )

    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=11, **config), block))
    setup.forward_backward(chunks, setup.random_tokens(4, SEQUENCE_LENGTH))
    assert len(routing_reports(chunks)) == 2
    return setup.gather_gradients(chunks)


def test_several_recursions_stand_between_ordinary_layers(pool: WorkerPool) -> None:
    (one,) = pool.run(two_recursions, layout={}, config={})
    assert any(".layers.1.recursion.router" in name for name in one)
    assert any(".layers.3.recursion.layers.1." in name for name in one)
    for other in pool.run(two_recursions, 2, layout={"tp": 2}, config={"sequence_parallel": True}):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def moe_logs(recompute: dict[str, Any]) -> tuple[dict[str, Tensor], Any, int]:
    setup.initialize()
    recursion = RecursionConfig(3, router=replace(EXPERT, warmup_steps=10))
    chunks = build(recursion, MOE | recompute)
    setup.forward_backward(chunks, setup.random_tokens(4, SEQUENCE_LENGTH), 4)
    logged = {
        name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()
    }
    update_routers(chunks)
    (layer,) = recursion_layers(chunks)
    steps = int(layer.recursion.router.training_steps)
    (report,) = routing_reports(chunks)
    return logged, report, steps


RECOMPUTE = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
}


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["full", "moe"])
def test_recomputation_bumps_no_count_twice(pool: WorkerPool, recompute: str) -> None:
    ((logged, report, steps),) = pool.run(moe_logs, recompute={})
    ((again, other, other_steps),) = pool.run(moe_logs, recompute=RECOMPUTE[recompute])
    torch.testing.assert_close(again, logged)
    assert other.shares == report.shares == (1.0, 1.0, 1.0)  # warm-up: everything, at first
    assert other.metrics == pytest.approx(report.metrics)
    assert torch.equal(other.expert_load, report.expert_load)
    assert other_steps == steps == 1


@pytest.mark.full
def test_each_steps_expert_losses_are_logged_under_their_own_layer(pool: WorkerPool) -> None:
    ((logged, report, _),) = pool.run(moe_logs, recompute={})
    for name in ("load_balancing_loss", "z_loss"):
        assert logged[name].shape == (8,)
        assert (logged[name] > 0).all()  # prelude, three steps of two layers, coda
    assert (logged["load_balancing_loss"] < 2.5).all()  # about 1 each, not divided by the steps
    tokens = 4 * SEQUENCE_LENGTH
    assert report.expert_load.shape == (3, 2, 4)
    assert report.expert_load.sum(dim=-1).eq(2 * tokens).all()  # top-2, everything runs


def expert_router_gradient(coefficient_only: bool, num_recursions: int) -> Tensor:
    """Gradient of the shared layer's expert router from expert losses alone."""
    setup.initialize()
    recursion = RecursionConfig(num_recursions, sharing="cycle", router=FixedDepth())
    config = {"num_layers": num_recursions, "moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 1.0}
    (model,) = build(recursion, MOE | config)
    ids = setup.random_tokens(2, SEQUENCE_LENGTH - 1)
    loss = model(ids, torch.arange(SEQUENCE_LENGTH).expand(2, -1), None, labels=ids)
    (loss * 0.0).sum().backward()
    return setup.gather_gradients([model])["decoder.layers.0.recursion.layers.0.mlp.router.weight"]


@pytest.mark.full
def test_a_repeated_layers_expert_losses_count_once_in_the_graph(pool: WorkerPool) -> None:
    run = partial(pool.run, expert_router_gradient, coefficient_only=True)
    (once,), (thrice,) = run(num_recursions=1), run(num_recursions=3)
    ratio = thrice.norm() / once.norm()
    assert 0.3 < ratio < 1.7  # a mean over steps; a sum would be about 3


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "TP2+SP": (2, {"tp": 2}, {"sequence_parallel": True}),
    "PP2": (2, {"pp": 2}, {}),
    "EP2": (2, {"ep": 2}, {}),
}


def save_or_resume(
    directory: str, layout: dict[str, Any], config: dict[str, Any], saves: bool
) -> tuple[float, dict[str, Tensor]]:
    """Two steps and a checkpoint, or from it: then the loss and weights after one more step."""
    setup.initialize(**layout)
    recursion = RecursionConfig(3, router=replace(EXPERT, warmup_steps=8))
    chunks = build(recursion, MOE | config)
    optimizer = setup.build_optimizer(chunks, adam_eps=1e-3)
    if saves:
        for step in range(2):
            tokens = setup.random_tokens(4, SEQUENCE_LENGTH, seed=step)
            setup.train_step(chunks, optimizer, tokens)
            update_routers(chunks)
            routing_reports(chunks)
        runs.save(directory, 2, chunks, optimizer)
    else:
        runs.load(directory, chunks, optimizer)
    for layer in recursion_layers(chunks):
        assert int(layer.recursion.router.training_steps) == 2
    loss = setup.train_step(chunks, optimizer, setup.random_tokens(4, SEQUENCE_LENGTH, seed=2))
    return loss, setup.gather_parameters(chunks)


@pytest.mark.full
@pytest.mark.parametrize("saved", ["one rank", "TP2+SP"])
def test_a_checkpoint_of_one_layout_goes_on_at_any_other(
    pool: WorkerPool, tmp_path: Path, saved: str
) -> None:
    world_size, layout, config = LAYOUTS[saved]
    arguments = {"directory": str(tmp_path)}
    results = pool.run(
        save_or_resume, world_size, layout=layout, config=config, saves=True, **arguments
    )
    loss, weights = results[0]
    for name, (size, other, extra) in LAYOUTS.items():
        resumed = pool.run(
            save_or_resume, size, layout=other, config=extra, saves=False, **arguments
        )
        for other_loss, other_weights in resumed:
            assert other_loss == pytest.approx(loss, abs=1e-5), name
            torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-5)
            if name == saved:
                assert other_loss == loss
                torch.testing.assert_close(other_weights, weights, rtol=0, atol=0)


def refusal(layout: dict[str, Any], config: dict[str, Any], recursion: RecursionConfig) -> str:
    setup.initialize(**layout)
    try:
        recursion_block_spec(made := setup.tiny_config(**({"num_layers": 8} | config)), recursion)
        build(recursion, config)
    except ValueError as error:
        return str(error)
    return f"accepted {made}"


PLAIN = RecursionConfig(3, router=EXPERT)
REFUSALS: dict[str, tuple[dict[str, Any], RecursionConfig, str]] = {
    "layers that do not divide": ({"num_layers": 9}, PLAIN, "Use 8 or 11"),
    "interleaved rotary": ({"rotary_interleaved": True}, PLAIN, "rotary_interleaved=True"),
    "per-layer RoPE": ({"no_rope_freq": [0] * 8}, PLAIN, "no_rope_freq"),
    "gated attention": ({"attention_output_gate": True}, PLAIN, "attention_output_gate"),
    "grouped products without TE": (MOE | {"moe_grouped_gemm": True}, PLAIN, "moe_grouped_gemm"),
    "recomputed norms without TE": (
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        PLAIN,
        "Leave 'layernorm' out",
    ),
    "variable lengths": ({"variable_seq_lengths": True}, PLAIN, "alltoall"),
    "query-key scaling": ({"apply_query_key_layer_scaling": True}, PLAIN, "query_key"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_is_refused_with_the_fix_named(pool: WorkerPool, name: str) -> None:
    config, recursion, expected = REFUSALS[name]
    (message,) = pool.run(refusal, layout={}, config=config, recursion=recursion)
    assert re.search(re.escape(expected), message), message


def pipeline_refusal(layout: str | None) -> str:
    setup.initialize(pp=2)
    config = setup.tiny_config(num_layers=8, pipeline_model_parallel_layout=layout)
    try:
        recursion_block_spec(config, PLAIN)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_stage_that_would_cut_a_recursion_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(pipeline_refusal, 2, layout="Et*4|t*4L"):
        assert "splits a recursion" in message
        assert "1, 6, 1 unrolled layers" in message
        assert "'Et|t*6,tL'" in message
    assert pool.run(pipeline_refusal, 2, layout="Et|t*6,tL") == ["accepted"] * 2
    assert pool.run(pipeline_refusal, 2, layout="Et|t*7L") == ["accepted"] * 2
    assert pool.run(pipeline_refusal, 2, layout=None) == ["accepted"] * 2


def test_lengths_of_prelude_and_coda_are_refused_where_layers_are_listed() -> None:
    with pytest.raises(ValueError, match=r"prelude_layers=2 .* no effect if you list the layers"):
        recursion_layer_spec([ModuleSpec(module=object)], RecursionConfig(3, prelude_layers=2))


def random_depths(layout: dict[str, Any], config: dict[str, Any]) -> Tensor:
    setup.initialize(**layout)
    (model,) = build(RecursionConfig(3, router=RandomDepth()), config)
    ids = setup.random_tokens(2, SEQUENCE_LENGTH - 1)
    model(ids, torch.arange(SEQUENCE_LENGTH).expand(2, -1), None, labels=ids)
    return token_depths(model)


def test_random_depths_are_the_same_on_all_tensor_parallel_ranks(pool: WorkerPool) -> None:
    (one,) = pool.run(random_depths, layout={}, config={})
    for sequence_parallel in (False, True):
        for other in pool.run(
            random_depths, 2, layout={"tp": 2}, config={"sequence_parallel": sequence_parallel}
        ):
            assert torch.equal(other, one)
