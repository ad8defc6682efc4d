"""All settings of a run, and which of them work together."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec

import mor_dali
from mor_layers import RecursionConfig
from mor_layers.recursion import SharingSchedule
from mor_megatron.parallel import (
    BATCH_RULES,
    LAYOUT_RULES,
    Arrangement,
    Names,
    require_rules,
)
from mor_tools.pretraining.settings.data import DataSettings
from mor_tools.pretraining.settings.model import ModelSettings
from mor_tools.pretraining.settings.parallel import ParallelSettings
from mor_tools.pretraining.settings.reporting import EvaluationSettings, WandbSettings
from mor_tools.pretraining.settings.rules import require, require_at_least
from mor_tools.pretraining.settings.training import TrainingSettings, UptrainSettings

NAMES = Names(
    num_unrolled_layers="model.num_unrolled_layers",
    num_heads="model.num_heads",
    num_kv_heads="model.num_kv_heads",
    ffn_hidden_size="model.ffn_hidden_size",
    expert_ffn_hidden_size="model.moe.ffn_hidden_size",
    num_experts="model.moe.num_experts",
    experts="model.moe",
    sharing="recursion.sharing",
    num_recursions="recursion.num_recursions",
    kv_policy="recursion.kv_policy",
    sequence_length="data.sequence_length",
    tensor="parallel.tensor",
    sequence_parallel="parallel.sequence_parallel",
    pipeline="parallel.pipeline",
    context="parallel.context",
    expert="parallel.expert",
    global_batch_size="training.global_batch_size",
    micro_batch_size="training.micro_batch_size",
    steps_as_stages="parallel.pipeline_layout='steps_as_stages'",
    one_stage="parallel.pipeline_layout=one_stage",
    to_steps_as_stages="parallel.pipeline_layout=steps_as_stages",
)
"""What the rules on layouts call each setting in their messages."""


@dataclass(frozen=True)
class Settings:
    """A training run. Running it again with the same `output` resumes it."""

    output: str = "runs/tiny"
    """Folder for checkpoints, TensorBoard files, summary.json and report.html."""
    model: ModelSettings = field(default_factory=ModelSettings)
    recursion: RecursionConfig | tuple[RecursionConfig, ...] | None = None
    """How layers are shared and tokens routed; a list: several recursions, one after another; null: an
    ordinary GPT without recursion."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    wandb: WandbSettings | None = None
    """Weights & Biases in addition to TensorBoard; null: TensorBoard only."""
    uptrain: UptrainSettings | None = None
    """A dense model to start from and to learn from; null: random weights and no teacher."""
    log_every: int = 5
    """Steps between log rows."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s at the chosen precision, for the utilization (MFU)."""

    def __post_init__(self) -> None:
        if isinstance(self.recursion, tuple) and len(self.recursion) == 1:
            object.__setattr__(self, "recursion", self.recursion[0])
        require(
            self.recursion != (),
            "recursion=[] is empty. List one or more recursions, or set it to null.",
        )
        require(self.output != "", "output is empty. Name a folder, e.g. output=runs/mine.")
        require_at_least(1, "settings", log_every=self.log_every)
        require(
            self.peak_tflops is None or 0 < self.peak_tflops < math.inf,
            f"peak_tflops={self.peak_tflops} must be above 0 and finite, or null if it is not "
            "known.",
        )
        require(
            self.recursion is not None or self.model.num_unrolled_layers >= 3,
            f"model.num_unrolled_layers={self.model.num_unrolled_layers} without recursion must be "
            "at least 3: the first layer, the last, and at least one between them.",
        )
        require_rules(self.arrangement(), LAYOUT_RULES, NAMES)
        for recursion in self.recursions:
            recursion.require_experts(self.model.moe is not None)
        self._check_uptrain()
        require(
            self.training.optimizer == "adamw" or not self.parallel.distributed_optimizer,
            "training.optimizer='muon' needs whole matrices, and parallel.distributed_optimizer=True "
            "shards them. Set it to False, or use adamw.",
        )
        require(
            self.evaluation.sample_tokens < self.data.sequence_length,
            f"evaluation.sample_tokens={self.evaluation.sample_tokens} leaves no room for the "
            f"prompt in data.sequence_length={self.data.sequence_length}. Use fewer.",
        )

    @property
    def last_step(self) -> int:
        """The step after which this process stops."""
        return self.training.stop_after or self.training.steps

    @property
    def recursions(self) -> tuple[RecursionConfig, ...]:
        """All recursions, in order; empty for an ordinary GPT."""
        return self.arrangement().recursions

    @property
    def schedules(self) -> tuple[SharingSchedule, ...]:
        """For each recursion, which layer runs at which depth of its part of the model."""
        return self.arrangement().schedules

    @property
    def schedule(self) -> SharingSchedule | None:
        """That of the only recursion; None without recursion, or with several."""
        return self.arrangement().schedule

    @property
    def routes_by_layer(self) -> bool:
        """Whether the layers of a recursion have routers of their own, as in Mixture-of-Depths."""
        return any(recursion.routes_by_layer for recursion in self.recursions)

    @property
    def virtual_stages(self) -> int | None:
        """Number of virtual pipeline stages per rank, one per step; None if each recursion is within
        one stage.
        """
        recursion = self.arrangement().only
        if recursion is None or self.parallel.pipeline_layout == "one_stage":
            return None
        return recursion.num_recursions

    @property
    def is_distilled(self) -> bool:
        """Whether a teacher runs along with the model."""
        return self.uptrain is not None and self.uptrain.distillation_coefficient > 0

    def data_parallel_size(self, world_size: int) -> int:
        """Number of replicas of the model among `world_size` processes.

        Raises:
            ValueError: the number of processes is not divisible by the parallelism, or the batch
                not by the number of replicas.
        """
        arrangement = self.arrangement(world_size)
        require_rules(arrangement, BATCH_RULES, NAMES)
        return arrangement.copies

    def arrangement(self, world_size: int = 1) -> Arrangement:
        """The model and its parallel layout, in the form that the rules on layouts expect."""
        model, parallel, moe = self.model, self.parallel, self.model.moe
        return Arrangement(
            num_unrolled_layers=model.num_unrolled_layers,
            recursion=self.recursion,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            ffn_hidden_size=model.ffn_hidden_size,
            expert_ffn_hidden_size=moe.ffn_hidden_size if moe else None,
            num_experts=moe.num_experts if moe else None,
            sequence_length=self.data.sequence_length,
            tensor=parallel.tensor,
            sequence_parallel=parallel.sequence_parallel,
            pipeline=parallel.pipeline,
            pipeline_layout=parallel.pipeline_layout,
            context=parallel.context,
            expert=parallel.expert,
            devices=world_size,
            global_batch_size=self.training.global_batch_size,
            micro_batch_size=self.training.micro_batch_size,
        )

    def require_installed(self) -> None:
        """Raise ValueError if a package that the run needs is not installed.

        This is not part of validating the settings, because machines that only plan a run read them
        too.
        """
        require(
            self.data.loader != "dali" or mor_dali.is_installed(),
            f"data.loader='dali': {mor_dali.INSTALL} That is data.loader=megatron.",
        )
        require(
            self.wandb is None or find_spec("wandb") is not None,
            f"wandb.project={self.wandb and self.wandb.project!r} needs the package wandb. Install "
            "it, or set wandb=null.",
        )
        require(
            self.training.optimizer != "muon" or find_spec("emerging_optimizers") is not None,
            "training.optimizer='muon' needs the package emerging-optimizers. Install it with pip "
            'install "mor-layers[muon]", or use adamw.',
        )

    def _check_uptrain(self) -> None:
        if self.uptrain is None:
            return
        require(
            self.recursion is not None,
            "uptrain turns a dense model into a recursive one, but recursion is null. Set "
            "recursion, or uptrain=null.",
        )
        require(
            len(self.recursions) == 1,
            f"uptrain turns a dense model into one with a single recursion, but recursion lists "
            f"{len(self.recursions)}. Set a single one, or uptrain=null.",
        )
        require(
            self.model.moe is None,
            "uptrain starts from a dense model, which has no experts. Set model.moe=null, or "
            "uptrain=null.",
        )
        require(
            self.training.initial_weights is None,
            "training.initial_weights and uptrain.teacher both set the initial weights. Set one "
            "of them to null.",
        )
        require(
            not any(r.loop_loss for r in self.recursions) or not self.is_distilled,
            "recursion.loop_loss weighs losses of labels, and with a teacher they are compared with its "
            "answers. Set uptrain.distillation_coefficient=0, or leave loop_loss out.",
        )
        require(
            self.model.num_unrolled_layers >= 3,
            f"uptrain with model.num_unrolled_layers={self.model.num_unrolled_layers}: the dense "
            "model must have at least 3 layers.",
        )
