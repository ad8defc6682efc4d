"""Runs of the published implementation, and how a backend's run is compared with one.

A backend is a function `run_case(case, tensors) -> ReferenceResult`: `case` is what NAME.json
holds, `tensors` what NAME.safetensors holds (tests/reference/README.md explains both). `run_case`
below is the backend of `mor_layers`.

Legend: `b` batch, `s` sequence, `v` vocabulary, `r` depths.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from mor_layers import DecoderOutput, ExpertChoice, MoRTransformer
from mor_tools.formats import config_from_published, load_published, published_names

TOLERANCE = 1e-5
"""Largest absolute difference allowed, in fp32."""


@dataclass(frozen=True)
class ReferenceResult:
    """What a backend computes for a case."""

    logits: Float[Tensor, "b s v"]
    """Logits of the next token."""
    lm_loss: Float[Tensor, ""]
    """Mean cross entropy of all tokens but each sequence's first."""
    total_loss: Float[Tensor, ""]
    """`lm_loss`, and while training the auxiliary losses other than an aux router's own."""
    gradients: dict[str, Tensor]
    """Gradient of each parameter by published name; empty where the case does not train."""
    router_losses: dict[str, Tensor]
    """`sampling_loss`, `balancing_loss` and `router_z_loss` where the router has them: summed over
    steps, without their coefficients."""
    depths: Int[Tensor, "b s"] | None
    """Steps each token took, which says what was selected; None where nothing is routed."""

    @property
    def balancing_ratio(self) -> Float[Tensor, " r"]:
        """Share of the tokens that ended at each depth."""
        assert self.depths is not None
        return torch.bincount(self.depths.flatten() - 1) / self.depths.numel()


def load_case(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of the case whose NAME.json is `path`."""
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def labels_of(ids: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """The id that follows each; -1 after the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1)


def published_parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a case by published name."""
    return {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}


def run_case(case: dict[str, Any], tensors: dict[str, Tensor]) -> ReferenceResult:
    """The case through `MoRTransformer`."""
    model = MoRTransformer(config_from_published(case))
    load_published(model, published_parameters(tensors))
    model.train(case["train_mode"])
    router = None if model.config.recursion is None else model.config.recursion.router
    if isinstance(router, ExpertChoice):
        # The published warm-up counts a pass before it runs, and is over in evaluation.
        steps = 1 if case["train_mode"] else router.warmup_steps
        model.recursions[0].router.training_steps.fill_(steps)
    output = model(tensors["input_ids"], labels_of(tensors["input_ids"]))
    assert output.lm_loss is not None
    gradients, total_loss = {}, output.lm_loss
    if case["train_mode"]:
        output.loss.backward()
        total_loss = output.loss
        if isinstance(router, ExpertChoice) and router.predictor == "aux_router":
            total_loss = total_loss - output.losses["sampling_loss"]
        parameters = dict(model.named_parameters())
        gradients = {
            theirs: parameters[ours].grad
            for ours, theirs in published_names(model.config).items()
            if ours in parameters
        }
    return ReferenceResult(
        logits=output.logits.detach(),
        lm_loss=output.lm_loss.detach(),
        total_loss=total_loss.detach(),
        gradients={
            name: torch.zeros_like(tensors[f"grad.{name}"]) if g is None else g
            for name, g in gradients.items()
        },
        router_losses=_router_losses(output),
        depths=output.depths if case["mor"]["enable"] else None,
    )


def _router_losses(output: DecoderOutput) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = {}
    for recursion in output.recursions:
        for decision in recursion.decisions:
            for name, value in decision.metrics.items():
                losses[name] = losses.get(name, torch.zeros(())) + value
    return losses


def differences(
    case: dict[str, Any], tensors: dict[str, Tensor], result: ReferenceResult
) -> dict[str, float]:
    """Largest absolute difference of each thing compared; infinite where selections differ.

    Raises:
        AssertionError: a gradient is missing, or one has no counterpart.
    """
    pairs = {
        "logits": (result.logits, tensors["logits"]),
        "lm_loss": (result.lm_loss, tensors["lm_loss"]),
        "total_loss": (result.total_loss, tensors["total_loss"]),
    }
    for name in ("sampling_loss", "balancing_loss", "router_z_loss"):
        # Without a balancing loss the published implementation reports 0 for it.
        balanced = name != "balancing_loss" or case["mor"]["token"]["balancing"] == "loss"
        if name in tensors and balanced:
            pairs[name] = (result.router_losses[name], tensors[name])
    if "balancing_ratio" in tensors:
        pairs["balancing_ratio"] = (result.balancing_ratio, tensors["balancing_ratio"])
    if case["train_mode"]:
        expected = {n.removeprefix("grad."): t for n, t in tensors.items() if n.startswith("grad.")}
        assert set(result.gradients) == set(expected), (
            "gradients of other parameters than published"
        )
        pairs |= {f"gradient of {n}": (result.gradients[n], t) for n, t in expected.items()}
    found = {name: _largest(ours, theirs) for name, (ours, theirs) in pairs.items()}
    if case["mor"]["enable"]:
        assert result.depths is not None
        same = torch.equal(result.depths, published_depths(case, tensors))
        found["selected tokens"] = 0.0 if same else torch.inf
    return found


def published_depths(case: dict[str, Any], tensors: dict[str, Tensor]) -> Int[Tensor, "b s"]:
    """Steps each token took in the published run."""
    depths = torch.zeros_like(tensors["input_ids"])
    if case["mor"]["type"] == "expert":
        for name, positions in tensors.items():
            if name.startswith("trace.selected_tokens."):
                depths.scatter_add_(1, positions, torch.ones_like(positions))
        return depths
    (name,) = (name for name in tensors if name.startswith("trace.router_logits."))
    settings, logits = case["mor"]["token"], tensors[name]
    scores = settings["alpha"] * logits.sigmoid()
    if settings["router_func"] == "softmax":
        scores = logits.softmax(dim=-1)
    biases = [bias for name, bias in tensors.items() if name.endswith(".router_bias")]
    return sum(biases, scores).argmax(dim=-1) + 1


def _largest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    return (ours - theirs).abs().max().item()
