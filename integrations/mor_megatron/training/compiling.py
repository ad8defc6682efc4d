"""The recursions of a model as graphs of torch.compile."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mor_megatron.layers import RecursionLayer, recursion_layers


def compile_recursions(chunks: Sequence[nn.Module], **options: Any) -> None:
    """Compile every recursion of the model: in training, all its steps are one graph.

    Capacities must be fixed, so that shapes are. During a router's warm-up each new capacity is
    compiled once more; call this afterwards, or pass `dynamic=True`. Evaluation with causal routing
    and generation are not compiled. Losses of routers and statistics stay outside of the graph.

    Megatron's local row-parallel layers warn in every call, which no graph can hold: this function
    tells torch.compile to leave calls of `warnings.warn` out of all graphs of this process.

    Args:
        chunks: the chunks of this rank, wrapped or not.
        options: of `torch.compile`, except `fullgraph`.

    Raises:
        ValueError: a recursion cannot be one graph, with the reason.
    """
    for layer in recursion_layers(chunks):
        _require_one_graph(layer)
        torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
        layer.compiled = (torch.compile(layer.recursion, fullgraph=True, **options),)


def _require_one_graph(layer: RecursionLayer) -> None:
    config, router = layer.config, type(layer.recursion.router).__name__
    ranks = config.tensor_model_parallel_size * config.context_parallel_size
    rules = (
        (
            type(layer) is not RecursionLayer,
            "recursion steps as virtual stages",
            "run one at a time. Keep the recursion inside one stage.",
        ),
        (
            not layer.has_fixed_capacities,
            router,
            "selects a number of tokens that depends on them, so shapes do too. Use ExpertChoice or "
            "FixedDepth.",
        ),
        (
            layer.recursion.router.draws,
            router,
            "draws random numbers, for which Megatron swaps the generator's state. Use ExpertChoice or "
            "FixedDepth.",
        ),
        (
            config.num_moe_experts is not None,
            f"num_moe_experts={config.num_moe_experts}",
            "sends each expert a number of tokens that is only known at run time. Use dense layers.",
        ),
        (
            ranks > 1,
            f"tensor_model_parallel_size={config.tensor_model_parallel_size} with "
            f"context_parallel_size={config.context_parallel_size}",
            "exchanges rows inside the recursion, which has not been compiled. Use data or pipeline "
            "parallelism.",
        ),
    )
    for is_wrong, given, reason in rules:
        if is_wrong:
            raise ValueError(f"{given} cannot be compiled as one graph: it {reason}")
