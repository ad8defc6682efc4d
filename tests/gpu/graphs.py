"""Checks of CUDA graphs on one GPU: a recursion that is replayed trains as one that is run.

In a rehearsal nothing is captured, and the same code runs twice.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.cuda_graphs import delete_cuda_graphs
from torch import Tensor, nn

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig
from mor_megatron import recursion_block_spec
from tests.distributed import megatron_setup as setup
from tests.gpu.layers import local_layer

Pass = tuple[float, dict[str, Tensor]]
"""Loss and gradients."""


def core_replays(recursion: RecursionConfig, length: int, hidden_size: int) -> dict[str, Any]:
    """Loss and gradients of a `MoRTransformer` whose forward and backward pass are one graph."""
    setup.initialize()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    config = DecoderConfig(
        64, hidden_size, 2 * hidden_size, num_unrolled_layers=8, num_heads=2, recursion=recursion
    )
    model = MoRTransformer(config).to(setup.device())
    batches = torch.randint(64, (3, 2, length), device=setup.device())
    ids = batches[0].clone()
    loss = torch.zeros((), device=ids.device)
    for parameter in model.parameters():  # where a graph can write them
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        found = model(ids, labels=ids).loss
        found.backward()
        loss.copy_(found.detach())

    def result() -> Pass:
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
        return loss.item(), gradients

    expected = []
    for batch in batches:
        ids.copy_(batch)
        run()
        expected.append(result())
    replay = _captured(run)
    found = []
    for batch in batches:
        ids.copy_(batch)
        replay()
        found.append(result())
    return _compared(expected, found, 1e-5)


def megatron_replays(
    recursion: RecursionConfig, impl: str, length: int, **settings: Any
) -> dict[str, Any]:
    """The same of a GPTModel under Megatron's own schedule, whose first passes run without graphs."""
    setup.initialize()
    torch.backends.cuda.matmul.allow_tf32 = False
    model_parallel_cuda_manual_seed(
        123, use_cudagraphable_rng=torch.cuda.is_available(), force_reset_rng=True
    )
    tokens = [setup.random_tokens(4, length) for _ in range(5)]
    results = {}
    for given in ("none", impl):
        config = setup.tiny_config(
            num_layers=8, cuda_graph_impl=given, cuda_graph_warmup_steps=2, **settings
        )
        chunks = setup.data_parallel(
            setup.tiny_gpt(config, lambda c, v: recursion_block_spec(c, recursion, local_layer(c)))
        )
        schedule = get_forward_backward_func()
        if given == "full_iteration":
            schedule = FullCudaGraphWrapper(schedule, cuda_graph_warmup_steps=2)
        results[given] = [_pass(schedule, chunks, batch) for batch in tokens]
        if isinstance(schedule, FullCudaGraphWrapper):
            schedule.reset_cuda_graph()
        if given == "local":
            delete_cuda_graphs()
    return _compared(results["none"], results[impl], 1e-5)


def _pass(schedule: Callable[..., Any], chunks: list[Any], tokens: Tensor) -> Pass:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    batches = [{"tokens": part} for part in tokens.to(setup.device()).split(2)]
    reports = schedule(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=2,
        forward_only=False,
    )
    gradients = {name: g.clone() for name, g in setup.gather_gradients(chunks).items()}
    return torch.stack(list(reports)).mean().item(), gradients


def _forward_step(
    batches: Iterator[dict[str, Tensor]], model: nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    tokens = next(batches)["tokens"]
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return output, lambda losses: (losses.mean(), losses.detach().mean())


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """A function that replays what `run` does, or `run` itself where there is no GPU."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _compared(expected: list[Pass], found: list[Pass], within: float) -> dict[str, Any]:
    worst = 0.0
    for (loss, gradients), (other, others) in zip(expected, found, strict=True):
        assert gradients.keys() == others.keys()
        worst = max(worst, abs(loss - other))
        for name, gradient in gradients.items():
            scale = gradient.abs().max().clamp(min=1e-8)
            error = ((gradient - others[name]).abs().max() / scale).item()
            assert error < within, f"gradients of {name} differ by {error:.2e}"
            worst = max(worst, error)
    assert worst < within, f"losses differ by {worst:.2e}"
    return {"passes": len(found), "largest relative difference": worst}
