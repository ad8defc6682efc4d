"""How the model is optimized, and what it starts from."""

import math
from dataclasses import dataclass
from typing import Literal

from mor_layers.weights import Initialization
from mor_tools.planner.memory import Recompute
from mor_tools.pretraining.settings.rules import (
    require,
    require_at_least,
    require_at_most,
    require_share,
)

Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "muon"]
LONGEST_TIMEOUT = 30 * 24 * 3600.0


@dataclass(frozen=True)
class TrainingSettings:
    """Optimization with a warmup-stable-decay schedule."""

    steps: int = 500
    """Optimizer steps of the whole run. A larger number extends a run, also one that is complete."""
    stop_after: int | None = None
    """Stop with a checkpoint after this step; run the command again to continue. null: run all
    `steps`."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Sequences that one process runs at once."""
    optimizer: Optimizer = "adamw"
    """`adamw`, or `muon` (arXiv 2502.16982): matrices are updated by their orthogonalized momentum,
    and everything else, embeddings, the output layer and routers included, by AdamW. Needs the extra
    `muon`."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum. In [0, 1)."""
    learning_rate: float = 3e-3
    """Learning rate between warmup and decay."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 20
    """Steps of linear warmup from 0."""
    decay_steps: int = 200
    """Steps of linear decay at the end. May change when a run is extended."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment. In (0, 1)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient. 0: not clipped."""
    precision: Precision = "fp32"
    """Precision of the layers' computation: `fp32` or `bf16` (with fp32 master weights)."""
    recompute: Recompute = "none"
    """Activations that are recomputed in the backward pass: `none`, `full`, or `selective` (those of
    the attention core)."""
    seed: int = 1
    """Seed of the initial weights and of the order of the text."""
    initial_weights: str | None = None
    """Folder of the weights to start from: a model in any format that `mor convert` reads, such as a
    Megatron checkpoint in any layout, or the folder of another run, of which this one is then a
    branch. Optimizer and schedule start anew. null: random weights."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the start of the decay and the end of a run always write one."""
    checkpoint_in_background: bool = False
    """Whether training goes on while a process forked from each rank writes a checkpoint. The memory of
    the host must have room for a copy of the weights and the state of the optimizer."""
    timeout_seconds: float = 600.0
    """Longest time for a micro-batch, including communication, or for a checkpoint. After this time the
    run ends and reports which rank hangs. At most 30 days."""

    @property
    def decay_start(self) -> int:
        """The last step before the learning rate decays."""
        return self.steps - self.decay_steps

    def __post_init__(self) -> None:
        owner = "training"
        require_at_least(
            1,
            owner,
            steps=self.steps,
            stop_after=self.stop_after,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            checkpoint_every=self.checkpoint_every,
        )
        require_at_least(
            0,
            owner,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            final_learning_rate=self.final_learning_rate,
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
            seed=self.seed,
        )
        require_at_most(2**32 - 1, owner, seed=self.seed)  # the range of NumPy's generators
        require(
            0 < self.timeout_seconds <= LONGEST_TIMEOUT,
            f"{owner}.timeout_seconds={self.timeout_seconds} must be above 0, and at most "
            f"{LONGEST_TIMEOUT:.0f}, which is 30 days.",
        )
        require(
            0 < self.learning_rate < math.inf,
            f"{owner}.learning_rate={self.learning_rate} must be > 0, and finite.",
        )
        require(
            self.initial_weights != "",
            f"{owner}.initial_weights is empty. Name a folder, or set it to null.",
        )
        require_share(owner, adam_beta2=self.adam_beta2)
        require(
            0 <= self.muon_momentum < 1,
            f"{owner}.muon_momentum={self.muon_momentum} must be at least 0 and below 1.",
        )
        require(
            self.final_learning_rate <= self.learning_rate,
            f"{owner}.final_learning_rate={self.final_learning_rate} must not exceed "
            f"learning_rate={self.learning_rate}.",
        )
        require(
            self.warmup_steps + max(self.decay_steps, 1) <= self.steps,
            f"{owner}.warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not "
            f"fit into steps={self.steps}. Shorten them, or train longer.",
        )
        require(
            self.stop_after is None or self.stop_after <= self.steps,
            f"{owner}.stop_after={self.stop_after} is beyond steps={self.steps}. "
            "Use a smaller number, or null.",
        )


@dataclass(frozen=True)
class UptrainSettings:
    """Starting from a dense model's weights, and learning from that model."""

    teacher: str
    """Folder of the dense model, in any format that `mor convert` reads. The data must use its
    tokenizer. `model.*` must be the dense model's sizes; the layers differ only in the recursion."""
    initialization: Initialization = "stepwise"
    """Source of the shared layers: `stepwise`, `average`, `lower`, `upper` or `random`. All other
    weights are those of the dense model."""
    distillation_coefficient: float = 1.0
    """Weight of the divergence between the two models' distributions of each next token. 0: only the
    weights of the dense model are used, and it is not run."""
    language_model_coefficient: float = 1.0
    """Weight of the language-model loss."""
    temperature: float = 1.0
    """Divides both logits; the divergence is multiplied by its square. Above 0."""

    def __post_init__(self) -> None:
        owner, distillation = "uptrain", self.distillation_coefficient
        require(
            self.teacher != "", f"{owner}.teacher is empty. Name a folder, or set uptrain=null."
        )
        require_at_least(
            0,
            owner,
            distillation_coefficient=distillation,
            language_model_coefficient=self.language_model_coefficient,
        )
        require(
            0 < self.temperature < math.inf,
            f"{owner}.temperature={self.temperature} must be above 0, and finite.",
        )
        require(
            distillation > 0 or self.temperature == 1.0,
            f"{owner}.temperature={self.temperature} has no effect with "
            "distillation_coefficient=0. Leave it out, or set the coefficient above 0.",
        )
        require(
            distillation > 0 or self.language_model_coefficient == 1.0,
            f"{owner}.language_model_coefficient={self.language_model_coefficient} has no effect "
            "with distillation_coefficient=0, which leaves only one loss. Leave it out, or set "
            "that coefficient above 0.",
        )
