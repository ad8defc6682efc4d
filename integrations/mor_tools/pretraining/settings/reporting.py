"""What a run measures, and where it is reported."""

from dataclasses import dataclass
from typing import Literal

from mor_tools.pretraining.settings.rules import require, require_at_least

WandbMode = Literal["online", "offline"]


@dataclass(frozen=True)
class EvaluationSettings:
    """Measurements on held-out text, and the sample that shows the model at work."""

    every: int = 50
    """Steps between validation losses; there is always one at the end."""
    batches: int = 8
    """Global batches of held-out text per validation loss, always the same ones."""
    prompt: str = "def "
    """Prompt of the sample continuation."""
    sample_tokens: int = 96
    """Length of the sample continuation; together with the prompt at most `data.sequence_length`. 0: no
    sample, depths or `output`/model, so the trained model is not collected on one process."""
    temperature: float = 0.7
    """Temperature of the sample continuation, in 0.001..1000. 0: always the most likely token."""

    def __post_init__(self) -> None:
        owner = "evaluation"
        require_at_least(1, owner, every=self.every, batches=self.batches)
        require_at_least(0, owner, sample_tokens=self.sample_tokens)
        # Outside this range, the logits divided by it become all equal or overflow.
        require(
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            f"{owner}.temperature={self.temperature} must lie in 0.001..1000, or be 0 to take the "
            "most likely token each time.",
        )
        require(self.prompt != "", f"{owner}.prompt is empty. Give it at least one character.")


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases, which gets the same numbers per step as TensorBoard."""

    project: str
    """The wandb project."""
    mode: WandbMode = "online"
    """`online`, or `offline` (kept in `output`/wandb, for `wandb sync`)."""

    def __post_init__(self) -> None:
        require(self.project != "", "wandb.project is empty. Name one, or set wandb=null.")
