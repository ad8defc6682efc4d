"""RouterUpdates: a callback for transformers' Trainer that updates routers after each step."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from mor_huggingface.modeling import MoRForCausalLM
from mor_layers import DecoderOutput, MoRTransformer
from mor_layers.recursion import ExpertUse


class RouterUpdates(TrainerCallback):
    """Updates capacity warm-up, thresholds, and loss-free biases over depths and experts.

        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RouterUpdates()])

    Routers are updated once per optimizer step, from the tokens of all micro-batches and all processes,
    so all replicas stay equal. The updated state is in buffers, so checkpoints contain it.

    Raises (when training begins):
        ValueError: the model is not a MoRForCausalLM.
    """

    def __init__(self) -> None:
        self._counts: Counts | None = None
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given.get("model")
        if not isinstance(model, MoRForCausalLM):
            raise ValueError(
                f"RouterUpdates needs a MoRForCausalLM, not a {type(model).__name__}. Leave the "
                "callback out, or load the model after `import mor_huggingface`."
            )
        self._detach()
        self._counts = Counts(model.model)
        self._hook = model.model.register_forward_hook(self._counts.add)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self._counts is not None
        self._counts.advance()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._counts = self._hook = None


class Counts:
    """Sums the counts of the forward passes of an optimizer step, without their autograd graphs.

    Args:
        group: the processes among which the tokens of a step are divided; None: all processes.
    """

    def __init__(self, model: MoRTransformer, group: ProcessGroup | None = None) -> None:
        self.model, self.group = model, group
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, module: MoRTransformer, arguments: Any, output: DecoderOutput) -> None:
        """Add the counts of a forward pass. This is a forward hook. It ignores evaluation mode."""
        if not module.training:
            return
        for i, run in enumerate(output.recursions):
            self._add(f"{i} tokens", torch.stack([d.tokens.count for d in run.decisions]))
            for name, value in run.observations.items():
                self._add(f"{i} seen {name}", value)
            for step, uses in enumerate(run.expert_use):
                self._add_experts(f"{i} {step}", uses)
        self._add_experts("prelude", output.prelude_experts)
        for i, uses in enumerate(output.between_experts):
            self._add_experts(f"between {i}", uses)
        self._add_experts("coda", output.coda_experts)

    @torch.no_grad()
    def advance(self) -> None:
        """Update all routers from the counts of all processes of the group, and reset the counts.

        Every process must have run a forward pass in training mode since the last call.
        """
        sums, self._sums = self._sums, {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name in sorted(sums):  # the same order on every process
                torch.distributed.all_reduce(sums[name], group=self.group)
        model = self.model
        for i, recursion in enumerate(model.recursions):
            recursion.router.advance(sums[f"{i} tokens"])
            start = f"{i} seen "
            seen = {n.removeprefix(start): v for n, v in sums.items() if n.startswith(start)}
            recursion.router.adjust(seen)
            for step in range(recursion.router.num_recursions):
                recursion.layers.advance(step, [_experts(sums, f"{i} {step}")])
        model.prelude.advance(0, [_experts(sums, "prelude")])
        for i, stack in enumerate(model.between):
            stack.advance(0, [_experts(sums, f"between {i}")])
        model.coda.advance(0, [_experts(sums, "coda")])

    def _add_experts(self, where: str, uses: dict[int, ExpertUse]) -> None:
        for layer, use in uses.items():
            self._add(f"{where} load {layer}", use.load + use.dropped)
            if use.histogram is not None:
                self._add(f"{where} histogram {layer}", use.histogram)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()


def _experts(sums: dict[str, Tensor], where: str) -> dict[int, ExpertUse]:
    """The summed use of the experts of each layer of a stack."""
    start = f"{where} load "
    uses = {}
    for name, load in sums.items():
        if name.startswith(start):
            layer = name.removeprefix(start)
            histogram = sums.get(f"{where} histogram {layer}")
            uses[int(layer)] = ExpertUse(load, torch.zeros_like(load), {}, {}, histogram)
    return uses
