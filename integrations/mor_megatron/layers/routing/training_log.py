"""Routing figures in the log line, TensorBoard and W&B of Megatron's own training loop.

`megatron.training` reports what a script's loss function returns, and has no place for figures of a
layer. It prints every entry of the dictionary of losses, though, as a mean since the last line, and
writes it to TensorBoard and W&B. So its `training_log` is wrapped, and gets a dictionary to which the
figures of the last batch are added.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from mor_megatron.layers.recursion import RecursionLayer
from mor_megatron.layers.routing.global_batch import global_experts, global_routing
from mor_megatron.layers.routing.updates import recursion_layers, update_routers_automatically

_LOOP, _GLOBALS = "megatron.training.training", "megatron.training.global_vars"


def log_routing(config: TransformerConfig) -> None:
    """Let Megatron's training loop report on routing after each batch.

    Its log line then contains, as means since the last line like all it prints,

    * `recursion step N share`: tokens that ran step N over tokens that entered;
    * `recursion dead positions`: share of positions whose tokens never ran the last step;
    * `recursion <metric>`, a mean over steps: `sampling_accuracy`, say, is how often the causal
      prediction agrees with the routing of training;
    * `recursion expert imbalance`: load of the busiest expert over the mean load.

    TensorBoard and W&B get these, and under `recursion/` the metrics of each step and the load of each
    step, layer and expert. With several recursions, names begin with `recursion 1`, `recursion 2`, ....

    It installs the updates of `update_routers_automatically`, which say when a batch has ended. Where
    Megatron's training loop is not set up, it does nothing else: use `routing_reports` there. All ranks
    must call it, because figures are reduced over them.

    Args:
        config: the one that the model is built with.
    """
    update_routers_automatically(config)
    hook: Any = config.finalize_model_grads_func
    if not _is_set_up() or any(isinstance(one, _RoutingLog) for one in hook.listeners):
        return
    log = _RoutingLog()
    loop: Any = sys.modules[_LOOP]
    # In a process that builds one model after another, the last one is reported on.
    original = getattr(loop.training_log, "without_routing", loop.training_log)
    parameters = list(inspect.signature(original).parameters)
    if parameters[:2] != ["loss_dict", "total_loss_dict"] or "iteration" not in parameters:
        warnings.warn(
            f"{_LOOP}.training_log takes {', '.join(parameters)}, and not loss_dict, total_loss_dict "
            "and iteration as in Megatron-Core 0.19: its log lines will not have routing figures.",
            stacklevel=2,
        )
        return
    loop.training_log = _with_figures(original, log)
    hook.listeners.append(log)


def _is_set_up() -> bool:
    """Whether this process runs Megatron's training loop: its arguments have been parsed.

    That a module is imported says less, and may not be so on all ranks.
    """
    variables: Any = sys.modules.get(_GLOBALS)
    return _LOOP in sys.modules and getattr(variables, "_GLOBAL_ARGS", None) is not None


@dataclass(frozen=True)
class _Figures:
    """Scalars by what follows `recursion` in their names. Those with a '/' are details, which are for
    TensorBoard and W&B only."""

    names: list[str]
    values: Tensor
    """fp32, on the model's device, in the order of `names`."""

    def line(self) -> dict[str, Tensor]:
        """What the log line says."""
        named = enumerate(self.names)
        return {f"recursion{name}": self.values[i] for i, name in named if "/" not in name}

    def details(self) -> dict[str, float]:
        """The others. It waits for the device."""
        named = zip(self.names, self.values.tolist(), strict=True)
        return {f"recursion{name}": value for name, value in named if "/" in name}


class _RoutingLog:
    """Figures of the last batch, of the recursions of all pipeline stages."""

    def __init__(self) -> None:
        self.figures = _Figures([], torch.zeros(0))
        self._names: list[list[str]] | None = None
        """Of each recursion of the model: what all stages have agreed on after the first batch."""
        self._first = 0
        """Recursions on earlier stages."""

    def __call__(self, model: Iterable[nn.Module]) -> None:
        """Collect the figures. Called on every rank after each batch."""
        own = [_figures(layer) for layer in recursion_layers(model) if layer.is_entry]
        group = parallel_state.get_pipeline_model_parallel_group()
        if self._names is None:
            stages: list[Any] = [None] * group.size()
            torch.distributed.all_gather_object(stages, [each.names for each in own], group=group)
            self._first = sum(map(len, stages[: group.rank()]))
            self._names = [names for stage in stages for names in stage]
        sizes = [len(names) for names in self._names]
        values = torch.zeros(sum(sizes), device=torch.cuda.current_device())
        places = values.split(sizes) if sizes else ()
        for index, figures in enumerate(own, start=self._first):
            if figures.names == self._names[index]:  # as in every batch, for all that is known
                places[index].copy_(figures.values)
        torch.distributed.all_reduce(values, group=group)
        self.figures = _Figures(self._titles(), values)

    def _titles(self) -> list[str]:
        names = self._names or []
        if len(names) == 1:
            return names[0]
        return [f" {number}{name}" for number, own in enumerate(names, start=1) for name in own]


def _with_figures(original: Callable[..., Any], log: _RoutingLog) -> Callable[..., Any]:
    """Megatron's `training_log`, which is handed our figures among its losses."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if given.arguments["loss_dict"]:  # on the last stage, which prints and writes
            given.arguments["loss_dict"] = given.arguments["loss_dict"] | log.figures.line()
        _write_details(log.figures, given.arguments["iteration"])
        return original(*given.args, **given.kwargs)

    training_log.without_routing = original  # type: ignore[attr-defined]
    return training_log


def _write_details(figures: _Figures, iteration: int) -> None:
    from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is None or iteration % get_args().tensorboard_log_interval:
        return
    for name, value in figures.details().items():
        writer.add_scalar(name, value, iteration)
        if wandb:
            wandb.log({name: value}, iteration)


def _figures(layer: RecursionLayer) -> _Figures:
    """Of one recursion in the global batch. It does not wait for the device."""
    routing, experts = global_routing(layer), global_experts(layer)
    names = [f" step {n} share" for n in range(1, len(routing.shares) + 1)]
    names.append(" dead positions")
    values = [routing.shares, routing.dead_positions[None]]
    for metric in sorted({name.partition("/")[2] for name in routing.metrics}):
        of_steps = [value for name, value in routing.metrics.items() if name.endswith(f"/{metric}")]
        names.append(f" {metric}")
        values.append(torch.stack(of_steps).mean()[None])
    names += [f"/{name}" for name in routing.metrics]
    values += [value[None] for value in routing.metrics.values()]
    if experts is not None:
        load = experts.load / experts.load.sum(dim=-1, keepdim=True).clamp(min=1)  # [r l e]
        names.append(" expert imbalance")
        values.append((load.amax(dim=-1) * load.shape[-1]).mean()[None])
        for step, layer_index, expert in product(*map(range, load.shape)):
            names.append(f"/step_{step + 1}/layer_{layer_index + 1}/expert_{expert}_load")
        values.append(load.flatten())
    return _Figures(names, torch.cat([value.float() for value in values]))
