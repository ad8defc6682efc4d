"""What a student learns from a teacher in addition to the text: distributions and hidden states.

    distiller = Distiller(teacher, student.config, Distillation(temperature=2.0))
    distilled = distiller(student, ids, labels)
    distilled.loss.backward()

Sources: Hinton et al. 2015 (arXiv 1503.02531) for softened distributions and the factor `T²`; Bae et
al. 2024 (arXiv 2410.20672), section 3.4, for recursive students of the dense model they come from.

Legend: `b` batch, `s` sequence, `k` tokens that run a layer, `h` hidden, `v` vocabulary.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor_layers.models import DecoderConfig, DecoderOutput, MoRTransformer
from mor_layers.recursion import StepContext
from mor_layers.routers import masked_mean
from mor_layers.selection import Tokens
from mor_layers.settings import require_choice
from mor_layers.weights import unrolled_layers

HiddenMeasure = Literal["cosine", "mse"]


@dataclass(frozen=True)
class Distillation:
    """The parts of the loss that a student learns from, and their weights.

    The loss is `language_model_coefficient · cross entropy + logits_coefficient · KL +
    hidden_coefficient · distance`, plus the routers' own losses.
    """

    language_model_coefficient: float = 1.0
    """Weight of the cross entropy with the text. 0: the text itself is not learned."""
    logits_coefficient: float = 1.0
    """Weight of the divergence between the teacher's distribution and the student's. 0: none."""
    temperature: float = 1.0
    """Divides both logits; the divergence is multiplied by its square. Above 0."""
    top_k: int | None = None
    """Only the teacher's k most likely tokens count, with renormalised probabilities. None: all."""
    hidden_coefficient: float = 0.0
    """Weight of the distance between hidden states, mean over the pairs of depths. 0: none."""
    hidden_depths: tuple[tuple[int, int], ...] = ()
    """Pairs of depths (student's, teacher's) whose states should agree. A depth is the number of layers
    that have run, counted with repeats, from 1."""
    hidden_measure: HiddenMeasure = "cosine"
    """How two states differ: `cosine` (1 - cosine similarity) or `mse` (mean squared difference)."""

    def __post_init__(self) -> None:
        for name in ("language_model_coefficient", "logits_coefficient", "hidden_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for all tokens.")
        measures = get_args(HiddenMeasure)
        require_choice("Distillation", "hidden_measure", self.hidden_measure, measures)
        if not (self.logits_coefficient or self.hidden_coefficient):
            raise ValueError(
                "logits_coefficient=0 and hidden_coefficient=0 leave nothing to learn from a "
                "teacher. Set one above 0, or train without a teacher."
            )
        if bool(self.hidden_coefficient) != bool(self.hidden_depths):
            raise ValueError(
                f"hidden_coefficient={self.hidden_coefficient} and hidden_depths="
                f"{self.hidden_depths} go together. Set both, or neither."
            )
        if not self.logits_coefficient and (self.temperature != 1.0 or self.top_k is not None):
            raise ValueError(
                f"temperature={self.temperature} and top_k={self.top_k} have no effect with "
                "logits_coefficient=0. Leave them out, or set it above 0."
            )


def logits_divergence(
    student: Float[Tensor, "*tokens v"],
    teacher: Float[Tensor, "*tokens v"],
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Float[Tensor, "*tokens"]:
    """`T² · KL(teacher ‖ student)` of each token in nats, in fp32.

    With `top_k`, the teacher's distribution is renormalised over its most likely tokens. The student's
    distribution still covers the whole vocabulary, so the divergence is 0 only if the student gives no
    probability to any other token.
    """
    log_q = (student.float() / temperature).log_softmax(dim=-1)
    scaled = teacher.float() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        scaled, kept = scaled.topk(top_k, dim=-1)
        log_q = log_q.gather(-1, kept)
    log_p = scaled.log_softmax(dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def hidden_distance(
    student: Float[Tensor, "*tokens h"],
    teacher: Float[Tensor, "*tokens h"],
    measure: HiddenMeasure = "cosine",
) -> Float[Tensor, "*tokens"]:
    """Distance of each token's states, in fp32: `1 - cosine`, or the mean squared difference."""
    student, teacher = student.float(), teacher.float()
    if measure == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(dim=-1)


@dataclass(frozen=True)
class LayerState:
    """Hidden states after a layer, for the tokens that ran it."""

    hidden: Float[Tensor, "k b h"]
    tokens: Tokens


@contextmanager
def recorded_states(
    model: MoRTransformer, depths: Collection[int]
) -> Iterator[dict[int, LayerState]]:
    """Records the states after the layers at these depths (from 1) in a forward pass."""
    layers: dict[str, list[int]] = {}
    for depth, (name, _) in enumerate(unrolled_layers(model.config), start=1):
        layers.setdefault(name, []).append(depth)
    found: dict[int, LayerState] = {}

    def record(own: list[int]) -> Any:
        runs = iter(own)

        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            depth, context = next(runs, None), arguments[1]
            assert isinstance(context, StepContext)
            if depth in depths:  # None once all runs are over: recomputation
                found[depth] = LayerState(output, context.tokens)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(record(own))
        for name, own in layers.items()
        if set(own) & set(depths)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class DistilledOutput:
    """The result of a forward pass of a student and its teacher."""

    student: DecoderOutput
    settings: Distillation
    parts: dict[str, Float[Tensor, ""]]
    """`logits` and `hidden` without coefficients, mean over the tokens that count."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss to minimise."""
        assert self.student.lm_loss is not None
        total = self.settings.language_model_coefficient * self.student.lm_loss
        for name, value in self.parts.items():
            total = total + getattr(self.settings, f"{name}_coefficient") * value
        return sum(self.student.losses.values(), total)


class Distiller:
    """A frozen teacher, and what a student learns from it.

    Args:
        teacher: frozen in place, which means no gradients and evaluation mode.
        student: the student's settings.
        settings: the parts of the loss.

    Raises:
        ValueError: the vocabularies differ, or a model has no such depth.
    """

    def __init__(
        self, teacher: MoRTransformer, student: DecoderConfig, settings: Distillation
    ) -> None:
        if teacher.config.vocab_size != student.vocab_size:
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.config.vocab_size} tokens, the student "
                f"one of {student.vocab_size}. They must share a tokenizer."
            )
        for place, (who, config) in enumerate((("student", student), ("teacher", teacher.config))):
            for pair in settings.hidden_depths:
                if not 1 <= pair[place] <= config.num_unrolled_layers:
                    raise ValueError(
                        f"hidden_depths has {pair}, but the depths of the {who} are 1 to "
                        f"{config.num_unrolled_layers}."
                    )
        last = student.parts[-1].effective_recursion
        if settings.hidden_depths and last.loop_loss is not None:
            raise ValueError(
                f"hidden_depths={settings.hidden_depths} cannot be matched with a loop_loss, under "
                "which layers after the recursion run on the state of every loop. Leave one of them out."
            )
        self.teacher = teacher.requires_grad_(False).eval()
        self.settings = settings
        widths = student.hidden_size, teacher.config.hidden_size
        device = teacher.embedding.weight.device
        self.projections = nn.ModuleList(
            nn.Linear(*widths, bias=False, device=device)
            if widths[0] != widths[1]
            else nn.Identity()
            for _ in settings.hidden_depths
        )
        """Per pair, a projection from the student's width to the teacher's, trained with the student."""

    def __call__(
        self,
        student: MoRTransformer,
        ids: Int[Tensor, "b s"],
        labels: Int[Tensor, "b s"],
        documents: Int[Tensor, "b s"] | None = None,
        is_padding: Bool[Tensor, "b s"] | None = None,
    ) -> DistilledOutput:
        """Run both forward passes. Tokens without a label, and padding, do not count.

        Arguments are those of `MoRTransformer.forward`.
        """
        ours = {own for own, _ in self.settings.hidden_depths}
        theirs = {other for _, other in self.settings.hidden_depths}
        with recorded_states(student, ours) as states:
            output = student(ids, labels, documents, is_padding)
        with torch.no_grad(), recorded_states(self.teacher, theirs) as targets:
            teacher = self.teacher(ids, None, documents, is_padding)
        counts = labels >= 0
        if is_padding is not None:
            counts = counts & ~is_padding
        parts: dict[str, Tensor] = {}
        if self.settings.logits_coefficient:
            apart = logits_divergence(
                output.logits, teacher.logits, self.settings.temperature, self.settings.top_k
            )
            parts["logits"] = masked_mean(apart, counts.float())
        if self.settings.hidden_depths:
            pairs = zip(self.settings.hidden_depths, self.projections, strict=True)
            distances = [
                self._distance(states[own], targets[other], projection, counts)
                for (own, other), projection in pairs
            ]
            parts["hidden"] = torch.stack(distances).mean()
        return DistilledOutput(output, self.settings, parts)

    def _distance(
        self, ours: LayerState, theirs: LayerState, projection: nn.Module, counts: Tensor
    ) -> Tensor:
        """Mean over the tokens that count and ran both layers; a teacher's layers run on all."""
        positions = ours.tokens.positions  # [k b]
        weights = counts.T.gather(0, positions).float()
        if ours.tokens.is_padding is not None:
            weights = weights * ~ours.tokens.is_padding
        places = positions[..., None].expand(-1, -1, theirs.hidden.shape[-1])
        target = theirs.hidden.gather(0, places)
        apart = hidden_distance(projection(ours.hidden), target, self.settings.hidden_measure)
        return masked_mean(apart, weights)
