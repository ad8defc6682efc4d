"""Megatron's own GPTModel computes the same on several CPU ranks as on one."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mor_megatron import Norm
from mor_megatron.platform import cpu
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

Options = dict[str, Any]
Outcome = tuple[float, dict[str, Tensor]]

SEQUENCE_PARALLEL = {"sequence_parallel": True}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.01,
    "moe_shared_expert_intermediate_size": 16,
}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def loss_and_gradients(layout: Options, config: Options, ddp: Options, tied: bool) -> Outcome:
    setup.initialize(**layout)
    model = setup.tiny_gpt(setup.tiny_config(num_layers=4, **config), tied=tied)
    chunks = setup.data_parallel(model, **ddp)
    loss = setup.forward_backward(chunks, setup.random_tokens(4, 12))
    return loss, setup.gather_gradients(chunks)


def loss_and_trained_parameters(layout: Options, config: Options, ddp: Options) -> Outcome:
    setup.initialize(**layout)
    model = setup.tiny_gpt(setup.tiny_config(**config))
    chunks = setup.data_parallel(model, grad_reduce_in_fp32=True, **ddp)
    # Without an epsilon above the rounding error, Adam turns the sign of noise into whole steps.
    optimizer = setup.build_optimizer(chunks, adam_eps=1e-3)
    for step in range(3):
        loss = setup.train_step(chunks, optimizer, setup.random_tokens(4, 12, seed=step))
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return loss, setup.gather_parameters(chunks)


@pytest.fixture(scope="module")
def on_one_rank(pool: WorkerPool) -> Callable[..., Outcome]:
    """Outcomes of the one-rank layout, computed once each."""
    outcomes: dict[str, Outcome] = {}

    def run(function: Callable[..., Outcome], **kwargs: Any) -> Outcome:
        key = f"{function.__name__}{kwargs}"
        if key not in outcomes:
            outcomes[key] = pool.run(function, layout={}, ddp={}, **kwargs)[0]
        return outcomes[key]

    return run


def assert_same(outcomes: list[Outcome], expected: Outcome) -> None:
    for loss, tensors in outcomes:
        assert loss == pytest.approx(expected[0], abs=1e-6)
        torch.testing.assert_close(tensors, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "config", "ddp", "tied"),
    [
        pytest.param({"tp": 2}, {}, {}, False, id="TP"),
        pytest.param({"tp": 2}, SEQUENCE_PARALLEL, {}, False, id="TP, sequence parallel"),
        pytest.param({"tp": 2}, SEQUENCE_PARALLEL | FULL_RECOMPUTE, {}, False, id="recompute"),
        pytest.param({"pp": 2}, {}, {}, False, id="PP"),
        pytest.param({"pp": 2}, {}, {}, True, id="PP, tied embeddings"),
        pytest.param({"pp": 2, "vpp": 2}, {}, {}, False, id="PP, interleaved"),
        pytest.param({}, {}, {}, False, id="DP"),
        pytest.param(
            {}, {}, {"overlap_grad_reduce": True, "bucket_size": 5000}, False, id="DP, overlapped"
        ),
    ],
)
def test_dense_model_on_two_ranks_equals_one_rank(
    pool: WorkerPool,
    on_one_rank: Callable[..., Outcome],
    layout: Options,
    config: Options,
    ddp: Options,
    tied: bool,
) -> None:
    outcomes = pool.run(loss_and_gradients, 2, layout=layout, config=config, ddp=ddp, tied=tied)
    assert_same(outcomes, on_one_rank(loss_and_gradients, config={}, tied=tied))


@pytest.mark.parametrize(
    "dispatcher", ["alltoall", pytest.param("allgather", marks=pytest.mark.full)]
)
@pytest.mark.parametrize(
    ("layout", "config"),
    [
        pytest.param({"ep": 2}, {}, id="EP"),
        pytest.param({"tp": 2, "etp": 2}, SEQUENCE_PARALLEL, id="TP and ETP"),
        pytest.param({"tp": 2, "ep": 2, "etp": 1}, SEQUENCE_PARALLEL, id="TP and EP"),
    ],
)
def test_mixture_of_experts_on_two_ranks_equals_one_rank(
    pool: WorkerPool,
    on_one_rank: Callable[..., Outcome],
    layout: Options,
    config: Options,
    dispatcher: str,
) -> None:
    config = config | MOE | {"moe_token_dispatcher_type": dispatcher}
    outcomes = pool.run(loss_and_gradients, 2, layout=layout, config=config, ddp={}, tied=False)
    assert_same(outcomes, on_one_rank(loss_and_gradients, config=MOE, tied=False))


@pytest.mark.parametrize("config", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "ddp",
    [
        {},
        {"use_distributed_optimizer": True},
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "bucket_size": 5000,
        },
    ],
    ids=["plain", "distributed", "distributed, overlapped"],
)
def test_training_on_two_data_parallel_ranks_equals_one_rank(
    pool: WorkerPool, on_one_rank: Callable[..., Outcome], config: Options, ddp: Options
) -> None:
    outcomes = pool.run(loss_and_trained_parameters, 2, layout={}, config=config, ddp=ddp)
    assert_same(outcomes, on_one_rank(loss_and_trained_parameters, config=config))


def decode_with_a_cache() -> tuple[Tensor, Tensor]:
    """Logits of the last token: of one full pass, and after prefill and decoding."""
    setup.initialize()
    (model,) = setup.tiny_gpt(setup.tiny_config())
    tokens = setup.random_tokens(2, 8)[:, :8]
    positions = torch.arange(8).expand(2, -1)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=8)
    model.eval()
    with torch.no_grad():
        full = model(tokens, positions, None)
        for start, end in [(0, 6), (6, 7), (7, 8)]:
            part = slice(start, end)
            logits = model(tokens[:, part], positions[:, part], None, inference_context=context)
            context.increment_sequence_len_offset(end - start)
    return full[:, -1], logits[:, -1]


def test_decoding_with_a_static_cache_equals_a_full_pass(pool: WorkerPool) -> None:
    full, cached = pool.run(decode_with_a_cache)[0]
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-6)


def build_a_paged_cache() -> int:
    setup.initialize()
    config = InferenceConfig(max_sequence_length=64, buffer_size_gb=0.01, block_size_tokens=16)
    return DynamicInferenceContext(setup.tiny_config(), config).max_requests


def test_a_paged_cache_can_be_built(pool: WorkerPool) -> None:
    assert pool.run(build_a_paged_cache)[0] > 0


def test_norm_equals_its_definition_in_each_precision() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for normalization, dtype in itertools.product(
        ["RMSNorm", "LayerNorm"], [torch.float32, torch.bfloat16]
    ):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            normalization=normalization,
            params_dtype=dtype,
        )
        norm = Norm(config, 8, eps=1e-3)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.linspace(-1, 1, 8, dtype=dtype))
        y = x.to(dtype).float()
        if normalization == "LayerNorm":
            y = y - y.mean(-1, keepdim=True)
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()).to(dtype) * norm.weight
        expected = y if norm.bias is None else y + norm.bias
        torch.testing.assert_close(norm(x.to(dtype)), expected)


def test_norm_refuses_what_it_cannot_do() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="normalization='L2Norm' must be one of"):
        Norm(config, 8)
    config.normalization, config.layernorm_zero_centered_gamma = "RMSNorm", True
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma=True needs"):
        Norm(config, 8)


def test_importing_the_platform_changes_nothing() -> None:
    program = (
        "import torch\n"
        "before = {k: v for k, v in vars(torch.cuda).items() if callable(v)}\n"
        "import mor_megatron.platform.cpu\n"
        "assert all(getattr(torch.cuda, name) is value for name, value in before.items())"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_the_platform_refuses_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="only for machines without a GPU"):
        cpu.enable()


def test_the_platform_refuses_another_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match=r"version is 0\.20\.0. Install megatron-core"):
        cpu.enable()
