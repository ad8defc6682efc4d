"""A model whose training step is timed: GPTModel with a recursion, or the plain stack.

A step is a forward and a backward pass. Data parallelism and the optimizer are left out: they read
parameters, not tokens, so that routing changes nothing about them.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_all_rng_states
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from mor_layers import DecoderConfig, RecursionConfig
from mor_layers.costs import account
from mor_megatron import RecursionLayer, recursion_block_spec, recursion_layers, token_depths
from mor_megatron.training import compile_recursions
from tests.distributed import megatron_setup as setup
from tests.distributed.platform.engine_models import engine_layer, local_layer
from tests.gpu.layers import BF16

PLAIN = RecursionConfig(1, sharing="cycle")
"""The plain stack: every layer has weights of its own, and every token runs all of them."""
WARM_UP = 3
"""Steps before a graph is captured: kernels are chosen and compiled in the first ones."""


@dataclass(frozen=True)
class Execution:
    """How a step is run."""

    is_compiled: bool = False
    """The recursion as one graph of torch.compile; layers of the plain stack one by one."""
    is_static: bool = False
    """Shapes are fixed, so that a CUDA graph can hold the step."""
    has_engine: bool = False
    """Layers are Transformer Engine's, not Megatron's local ones."""


class Contender:
    """A model, built and warm.

    Args:
        decoder: sizes.
        recursion: `PLAIN` for the plain stack.
        ids: token ids `[b s+1]`: inputs and their labels.
        execution: how it is run.
    """

    def __init__(
        self, decoder: DecoderConfig, recursion: RecursionConfig, ids: Tensor, execution: Execution
    ) -> None:
        self.decoder = replace(decoder, recursion=recursion)
        self.ids, self.execution = ids, execution
        self.positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
        before = _start_of_peak()
        self.model = _model(self.decoder, execution).to(ids.device)
        if execution.is_compiled:
            _compile(self.model)
        for parameter in self.model.parameters():  # where a graph can write them
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(WARM_UP):
            self.step()
        self.peak_gib = _peak_since(before)
        """GiB at the peak of a step: parameters, gradients and what the backward pass needs."""

    def step(self) -> None:
        """Run a forward and a backward pass."""
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        ids, labels = self.ids[:, :-1], self.ids[:, 1:]
        self.model(ids, self.positions, None, labels=labels).mean().backward()

    def replayed(self) -> Callable[[], None]:
        """A function that replays a step as one CUDA graph; the step itself where there is no GPU."""
        assert self.execution.is_static
        if not self.ids.is_cuda:
            return self.step
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # Of this thread alone: NCCL's watchdog, which asks whether collectives are done, may go on.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        return graph.replay

    def flops(self) -> float:
        """Training FLOPs of a step with the tokens that ran in the last one.

        Attention counts the pairs that a causal kernel computes, so that a saving of pairs which no
        kernel would have computed is not expected of the clock.
        """
        length, tokens = self.ids.shape[1] - 1, None
        recursion = self.decoder.recursion
        assert recursion is not None
        if not recursion.router.has_fixed_capacities:
            depths = token_depths(self.model)  # [b s]
            # A step runs as many rows as the widest sequence needs.
            tokens = [
                int((depths > step).sum(dim=1).amax()) for step in range(recursion.num_recursions)
            ]
        cost = account(self.decoder, length, tokens, causal_half=True)
        return cost.training.total * len(self.ids)


def _model(decoder: DecoderConfig, execution: Execution) -> GPTModel:
    on_gpu = torch.cuda.is_available()
    config = setup.tiny_config(
        num_layers=decoder.num_unrolled_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_query_groups=decoder.kv_heads,
        ffn_hidden_size=decoder.ffn_hidden_size,
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu and not execution.is_compiled,  # then Inductor fuses it
        cuda_graph_impl="full_iteration" if execution.is_static else "none",
        **BF16,
    )
    torch.manual_seed(0)
    return GPTModel(
        config,
        _block(config, decoder, engine_layer if execution.has_engine else local_layer),
        vocab_size=decoder.vocab_size,
        max_sequence_length=8192,
        position_embedding_type="rope",
    ).bfloat16()


def _block(
    config: TransformerConfig,
    decoder: DecoderConfig,
    layer: Callable[[TransformerConfig], ModuleSpec],
) -> TransformerBlockSubmodules:
    assert decoder.recursion is not None
    block = recursion_block_spec(config, decoder.recursion, layer(config))
    if decoder.recursion != PLAIN:
        return block
    layers: list[Any] = []  # ordinary Megatron layers, not a recursion of one step
    for spec in block.layer_specs or []:
        if spec.module is RecursionLayer:
            layers += spec.submodules.layer_specs  # type: ignore[union-attr]
    return replace(block, layer_specs=layers)


def _compile(model: GPTModel) -> None:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    if any(True for _ in recursion_layers(model)):
        compile_recursions([model], backend=backend)
        return
    torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
    for layer in model.decoder.layers:
        layer.compile(backend=backend)


def _start_of_peak() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_since(before: int) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
