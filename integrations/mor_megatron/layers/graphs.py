"""Recursions in Megatron's CUDA graphs.

With `cuda_graph_impl="local"` Megatron captures each layer, and a RecursionLayer is one: all its steps
are one graph, and the layers inside capture nothing of their own. With "full_iteration" the graph of
Megatron's training loop holds it with everything else. A graph replays kernels with the same shapes,
and no Python. So capacities must be fixed, nothing may wait for the device, and routing statistics,
which Python adds up, are not kept.
"""

from typing import Any, cast

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import CudaGraphModule

from mor_layers import RecursionConfig


def is_graphed(config: TransformerConfig) -> bool:
    """Whether training runs in a CUDA graph."""
    return config.cuda_graph_impl != "none"


def graph_rules(
    config: TransformerConfig, recursion: RecursionConfig
) -> list[tuple[bool, str, str]]:
    """What cannot be captured, as entries of `validation`."""
    if not is_graphed(config):
        return []
    impl = f"cuda_graph_impl={config.cuda_graph_impl!r}"
    router = type(recursion.router).__name__
    modules = cast(
        "list[CudaGraphModule]", config.cuda_graph_modules
    )  # after Megatron's own checks
    with torch.device("meta"):
        draws = recursion.router.build(1, recursion.num_recursions).draws
    return [
        (
            config.cuda_graph_impl == "transformer_engine",
            impl,
            "Transformer Engine captures the parts of plain layers. Use 'local' or 'full_iteration'.",
        ),
        (
            not recursion.router.has_fixed_capacities,
            f"{impl} with {router}",
            "the number of selected tokens varies, and a graph replays a fixed one. Use ExpertChoice "
            "with warmup_steps=0, FixedDepth, or cuda_graph_impl='none'.",
        ),
        (
            draws,
            f"{impl} with {router}",
            "Megatron swaps the state of the generator that it draws from, which a graph does not "
            "replay. Use ExpertChoice, FixedDepth, or cuda_graph_impl='none'.",
        ),
        (
            config.num_moe_experts is not None,
            f"{impl} with num_moe_experts={config.num_moe_experts}",
            "each expert gets a number of tokens that is only known at run time. Use dense layers, or "
            "cuda_graph_impl='none'.",
        ),
        (
            bool(modules),
            f"{impl} with cuda_graph_modules={[m.name for m in modules]}",
            "it is captured as a whole. Leave cuda_graph_modules empty.",
        ),
        (
            config.context_parallel_size > 1,
            f"{impl} with context_parallel_size={config.context_parallel_size}",
            "the sizes of its exchanges are read on the host. Use context_parallel_size=1, or "
            "cuda_graph_impl='none'.",
        ),
        (
            bool(config.fp8 or config.fp4),
            f"{impl} with fp8={config.fp8!r}, fp4={config.fp4!r}",
            "quantized weights of shared layers have not been captured yet. Use bf16, or "
            "cuda_graph_impl='none'.",
        ),
        (
            recursion.loop_loss is not None,
            f"{impl} with loop_loss",
            "its hooks on the layers behind the recursion would not run in a graph. Use "
            "cuda_graph_impl='none'.",
        ),
    ]


def require_whole_block(config: TransformerConfig, is_whole: bool) -> None:
    """Raise ValueError if a part of a block, whose steps are pipeline stages, is to be captured."""
    if is_graphed(config) and not is_whole:
        raise ValueError(
            f"cuda_graph_impl={config.cuda_graph_impl!r} cannot be used with recursion steps as virtual "
            "stages: Python passes the state of routing between them. Keep the recursion inside one "
            "stage, or use cuda_graph_impl='none'."
        )


def require_equal_sequences(config: TransformerConfig, **inputs: Any) -> None:
    """Raise ValueError for the first of these inputs, by which sequences differ, that is not None."""
    for name, given in inputs.items():
        if given is not None:
            raise ValueError(
                f"{name} cannot be used with cuda_graph_impl={config.cuda_graph_impl!r}: how "
                "many tokens are selected would depend on it. Train on sequences of one document "
                "without padding (create_attention_mask=False), or use cuda_graph_impl='none'."
            )
