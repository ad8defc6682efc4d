"""Functions that a training loop calls around its optimizer step, beside `update_routers`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.layers import RecursionLayer, RoutingReport, recursion_layers
from mor_megatron.layers.routing.global_batch import global_experts, global_routing


@contextmanager
def causal_routing(model: nn.Module | Iterable[nn.Module]) -> Iterator[None]:
    """Context manager in which no token's depth depends on later tokens, as in generation.

    Expert choice then follows its predictor instead of comparing all tokens of a sequence.
    """
    layers = list(recursion_layers(model))
    before = [layer.causal_routing for layer in layers]
    try:
        for layer in layers:
            layer.causal_routing = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.causal_routing = was


@torch.no_grad()
def routing_reports(model: nn.Module | Iterable[nn.Module]) -> list[RoutingReport]:
    """Report on every recursion since the last call, over the global batch, and reset the counts.

    Call this on every rank. All ranks get the same list, with the recursions of all pipeline stages,
    except those that train in a CUDA graph: Python, which does the counting, does not run there.
    """
    layers = [layer for layer in recursion_layers(model) if not layer.is_graphed]
    own = [(layer.is_entry, _report(layer)) for layer in layers]
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[list[tuple[bool, RoutingReport]] | None] = [None] * group.size()
    torch.distributed.all_gather_object(stages, own, group=group)
    reports: list[RoutingReport] = []
    for is_entry, report in (part for stage in stages if stage for part in stage):
        if is_entry:
            reports.append(report)
        else:  # further layers of the same block
            reports[-1] = _with_layers(reports[-1], report)
    return reports


def token_depths(model: nn.Module | Iterable[nn.Module]) -> Tensor:
    """Number of steps that each token took in this rank's last forward pass, `[b s]`.

    With several recursions, the steps are summed.

    Raises:
        ValueError: this rank holds no recursion, or none has run.
    """
    depths = [layer.statistics.depths for layer in recursion_layers(model)]
    if not depths or any(d is None for d in depths):
        raise ValueError(
            f"no depths to report: {len(depths)} recursions on this rank, and not all have run. "
            "Run the model first, on the pipeline stage that holds the recursion."
        )
    return torch.stack(depths).sum(dim=0)  # type: ignore[arg-type]


def _report(layer: RecursionLayer) -> RoutingReport:
    routing, experts = global_routing(layer), global_experts(layer)
    layer.statistics.clear()
    for router in layer.expert_routers:
        router.cells.clear()
    return RoutingReport(
        shares=tuple(routing.shares.tolist()),
        dead_positions=routing.dead_positions.item(),
        metrics={name: value.item() for name, value in routing.metrics.items()},
        expert_load=None if experts is None else experts.load.cpu(),
        expert_drops=None if experts is None else experts.drops.cpu(),
        expert_balance=None if experts is None else experts.balance.cpu(),
        expert_z_loss=None if experts is None else experts.z_loss.cpu(),
    )


def _with_layers(report: RoutingReport, further: RoutingReport) -> RoutingReport:
    names = ("expert_load", "expert_drops", "expert_balance", "expert_z_loss")
    parts = {name: (getattr(report, name), getattr(further, name)) for name in names}
    return replace(report, **{n: torch.cat(p, dim=1) for n, p in parts.items() if p[0] is not None})
