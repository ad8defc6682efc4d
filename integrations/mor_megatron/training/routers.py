"""Functions that a training loop calls around its optimizer step, beside `update_routers`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mor_megatron.layers import RecursionLayer, RoutingReport, StepTopKRouter, recursion_layers
from mor_megatron.layers.routing.updates import data_group, tokens_per_step


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

    Call this on every rank. All ranks get the same list, with the recursions of all pipeline stages.
    """
    own = [(layer.is_entry, _report(layer)) for layer in recursion_layers(model)]
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
    statistics, group = layer.statistics, data_group()
    counts = tokens_per_step(layer)
    positions = statistics.last_step_positions
    positions = counts.new_zeros(1) if positions is None else positions.float()
    names = sorted(statistics.metrics)
    means = [statistics.metrics[n].float() / statistics.metric_counts[n] for n in names]
    metrics = torch.stack(means) if means else counts.new_zeros(0)
    for values in (counts, positions, metrics):
        torch.distributed.all_reduce(values, group=group)
    statistics.clear()
    return RoutingReport(
        shares=tuple((counts[1:] / counts[0].clamp(min=1)).tolist()),
        dead_positions=(positions == 0).float().mean().item(),
        metrics=dict(zip(names, (metrics / group.size()).tolist(), strict=True)),
        **_expert_report(layer.expert_routers),
    )


def _with_layers(report: RoutingReport, further: RoutingReport) -> RoutingReport:
    names = ("expert_load", "expert_drops", "expert_balance", "expert_z_loss")
    parts = {name: (getattr(report, name), getattr(further, name)) for name in names}
    return replace(report, **{n: torch.cat(p, dim=1) for n, p in parts.items() if p[0] is not None})


def _expert_report(routers: list[StepTopKRouter]) -> dict[str, Any]:
    if not routers:
        return {"expert_load": None}
    reports = []
    for router in routers:
        cells = {name: buffer.clone() for name, buffer in router.cells.named_buffers()}
        for value in cells.values():
            torch.distributed.all_reduce(value, group=router.tp_dp_cp_group)
        router.cells.clear()
        wanted, tokens = cells["load"] + cells["drops"], cells["tokens"].clamp(min=1)
        share = wanted / wanted.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = cells["scores"] / tokens[:, None]
        reports.append(
            {
                "expert_load": cells["load"],
                "expert_drops": cells["drops"],
                "expert_balance": wanted.shape[-1] * share * mean,
                "expert_z_loss": cells["squares"] / tokens,
            }
        )
    return {n: torch.stack([r[n] for r in reports], dim=1).cpu() for n in reports[0]}
