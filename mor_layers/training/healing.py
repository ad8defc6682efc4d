"""Healing: training a model that was made from the weights of another one, with or without a
teacher.

    for step in heal(student, batches, Healing(steps=300), distiller):
        print(step.number, step.lm_loss)

`heal` is a generator, so that the caller can look at the model between two steps. It can train any
`MoRTransformer`, including a dense one from scratch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mor_layers.models import DecoderOutput, MoRTransformer
from mor_layers.training.distillation import DistilledOutput, Distiller


@dataclass(frozen=True)
class Healing:
    """AdamW with linear warmup, a constant learning rate, and linear decay to 0."""

    steps: int
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Learning rate between warmup and decay. Above 0."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    decay_steps: int = 0
    """Steps of linear decay at the end."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment. In (0, 1)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient. Above 0."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("warmup_steps", "decay_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if not 0 < self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2={self.adam_beta2} must lie in (0, 1).")
        if self.steps < max(1, self.warmup_steps + self.decay_steps):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit "
                f"into steps={self.steps}. Shorten them, or train longer."
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        rising = (step + 1) / (self.warmup_steps + 1)
        falling = (self.steps - step) / (self.decay_steps + 1)
        return self.learning_rate * min(1.0, rising, falling)


@dataclass(frozen=True)
class Batch:
    """The input of a step; see `MoRTransformer.forward`."""

    ids: Int[Tensor, "b s"]
    labels: Int[Tensor, "b s"]
    documents: Int[Tensor, "b s"] | None = None
    is_padding: Bool[Tensor, "b s"] | None = None


@dataclass(frozen=True)
class HealingStep:
    """The result of one optimizer step; losses are those before the step."""

    number: int
    """Number of the step, 1-based."""
    loss: float
    """The loss that was minimised."""
    lm_loss: float
    """Language-model loss in nats per token."""
    parts: dict[str, float]
    """Distances from the teacher, without coefficients; empty without a teacher."""
    learning_rate: float
    gradient_norm: float
    """Norm of the gradient before clipping."""


def heal(
    student: MoRTransformer,
    batches: Iterator[Batch],
    settings: Healing,
    distiller: Distiller | None = None,
) -> Iterator[HealingStep]:
    """Train the student in place; each iteration takes one step.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; that step is not taken.
        ValueError: there are fewer batches than steps.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    if distiller is not None:
        trained += distiller.projections.parameters()
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    student.train()
    for step in range(settings.steps):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"the batches end after {step} of steps={settings.steps}. Give more batches, or "
                "lower steps."
            )
        rate = settings.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        output = _forward(student, batch, distiller)
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.gradient_clip)
        loss = output.loss.item()
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {norm.item()}. Lower "
                f"learning_rate={settings.learning_rate}."
            )
        optimizer.step()
        is_distilled = isinstance(output, DistilledOutput)
        decoded = output.student if is_distilled else output
        student.advance([decoded])
        parts = {name: value.item() for name, value in output.parts.items()} if is_distilled else {}
        yield HealingStep(step + 1, loss, decoded.lm_loss.item(), parts, rate, norm.item())
        student.train()


def _forward(
    student: MoRTransformer, batch: Batch, distiller: Distiller | None
) -> DecoderOutput | DistilledOutput:
    run = student if distiller is None else distiller
    first = () if distiller is None else (student,)
    return run(*first, batch.ids, batch.labels, batch.documents, batch.is_padding)
