"""What is measured of a run, and who is told."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from mor_tools.pretraining.settings.rules import require, require_at_least

WandbMode = Literal["online", "offline"]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured on held-out text, and how the model is shown at work."""

    every: int = 50
    """Steps between validation losses; there is always one at the end."""
    batches: int = 8
    """Global batches of held-out text per validation loss, always the same ones."""
    prompt: str = "def "
    """Beginning of the sample continuation."""
    sample_tokens: int = 96
    """Tokens of the sample continuation; with the prompt within `data.sequence_length`. 0: the
    trained model is not collected on one process, for a sample, depths and `output`/model."""
    temperature: float = 0.7
    """Of the sample continuation, in 0.001..1000. 0: the likeliest token each time."""

    def __post_init__(self) -> None:
        owner = "evaluation"
        require_at_least(1, owner, every=self.every, batches=self.batches)
        require_at_least(0, owner, sample_tokens=self.sample_tokens)
        # Beyond these, logits divided by it are all alike, or no number holds them.
        require(
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            f"{owner}.temperature={self.temperature} must lie in 0.001..1000, or be 0 for the "
            "likeliest token each time.",
        )
        require(self.prompt != "", f"{owner}.prompt is empty. Give it at least one character.")


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases, which then gets the numbers of each step that TensorBoard gets."""

    project: str
    """Project of wandb."""
    mode: WandbMode = "online"
    """`online`, or `offline`: kept in `output`/wandb, for `wandb sync`."""

    def __post_init__(self) -> None:
        require(self.project != "", "wandb.project is empty. Name one, or set wandb=null.")
        require(
            find_spec("wandb") is not None,
            f"wandb.project={self.project!r} needs the package wandb. Install it, or set wandb=null.",
        )
