"""Models on Transformer Engine's layers, run in a process where the stand-in is imported in its place.

Every function runs on a rank of the `engine_pool` (see `test_engine_layers`).
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from mor_layers import RecursionConfig
from mor_megatron import default_layer_spec, recursion_block_spec
from tests.distributed import megatron_setup as setup


@dataclass(frozen=True)
class Outcome:
    """What one pass over a batch gave."""

    loss: float
    gradients: dict[str, Tensor]
    attention: list[Any] = field(default_factory=list)
    """Calls of Transformer Engine's attention, in order (`te_stand_in`'s `calls.Attention`)."""
    recipes: list[str] = field(default_factory=list)
    quantized_rows: list[int] = field(default_factory=list)
    rotations: list[Any] = field(default_factory=list)
    """Shapes that the fused rotary embedding turned, and of its tables."""


def engine_layer(config: TransformerConfig) -> ModuleSpec:
    """What `default_layer_spec` chooses on a machine with a GPU and Transformer Engine."""
    saved = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        return default_layer_spec(config)
    finally:
        torch.cuda.is_available = saved


def local_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron's own layers, whatever the machine has."""
    return default_layer_spec(replace(config, transformer_impl="local", moe_grouped_gemm=False))


def run(
    recursion: RecursionConfig, engine: bool, batch: int = 3, length: int = 14, **settings: Any
) -> Outcome:
    """`one_pass` on the stand-in, with what it was called with."""
    from transformer_engine import calls  # the stand-in

    setup.initialize()
    calls.clear()
    loss, gradients = one_pass(recursion, engine, batch, length, **settings)
    return Outcome(
        loss,
        gradients,
        [SimpleNamespace(**vars(call)) for call in calls.attention],
        [type(recipe).__name__ for recipe in calls.recipes],
        list(calls.quantized_rows),
        list(calls.rotations),
    )


def one_pass(
    recursion: RecursionConfig,
    engine: bool,
    batch: int,
    length: int,
    with_documents: bool = False,
    fused_gradients: bool = False,
    experts: int | None = None,
    **settings: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a forward and backward pass.

    Args:
        engine: on Transformer Engine's layers, or on local ones.
        with_documents: of 1, 2, 3, ... documents the sequences.
        fused_gradients: let linear layers add to `main_grad` themselves, as
            `gradient_accumulation_fusion` does.
        experts: how many instead of a dense MLP.
        settings: fields of the TransformerConfig.
    """
    if experts is not None:
        settings |= {
            "num_moe_experts": experts,
            "moe_router_topk": 2,
            "moe_aux_loss_coeff": 0.1,
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": engine,
        }
    config = setup.tiny_config(
        **({"num_layers": 8, "transformer_impl": "transformer_engine"} | settings)
    )

    def block(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        layer = engine_layer(config) if engine else local_layer(config)
        return recursion_block_spec(config, recursion, layer, vp_stage)

    chunks = setup.data_parallel(setup.tiny_gpt(config, block))
    if fused_gradients:
        for module in chunks[0].modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    tokens = setup.random_tokens(batch, length)
    if with_documents:
        loss = pass_over_documents(chunks[0], tokens)
    else:
        loss = setup.forward_backward(chunks, tokens, batch)
    return loss, setup.gather_gradients(chunks)


def pass_over_documents(model: Any, tokens: Tensor) -> float:
    """As `reset_attention_mask` masks them: causal within each document."""
    tokens = tokens.to(setup.device())
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    positions = torch.arange(length, device=tokens.device).expand(batch, -1)
    count = torch.arange(1, batch + 1, device=tokens.device)[:, None]
    numbers = positions * count // length  # [b s]
    barred = numbers[:, :, None] != numbers[:, None, :]
    barred = (barred | torch.ones_like(barred).triu(1))[:, None]
    model.zero_grad_buffer()
    loss = model(tokens[:, :-1], positions, barred, labels=tokens[:, 1:]).mean()
    loss.backward()
    return loss.item()
