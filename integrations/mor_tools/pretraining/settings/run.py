"""All settings of a run, and which of them fit together."""

import math
from dataclasses import dataclass, field

from mor_layers import RecursionConfig
from mor_layers.recursion import SharingSchedule
from mor_tools.pretraining.settings.data import DataSettings
from mor_tools.pretraining.settings.model import ModelSettings
from mor_tools.pretraining.settings.parallel import ParallelSettings
from mor_tools.pretraining.settings.reporting import EvaluationSettings, WandbSettings
from mor_tools.pretraining.settings.rules import require, require_at_least
from mor_tools.pretraining.settings.training import TrainingSettings, UptrainSettings


@dataclass(frozen=True)
class Settings:
    """A training run. Running it again with the same `output` resumes it."""

    output: str = "runs/tiny"
    """Folder for checkpoints, TensorBoard files, summary.json and report.html."""
    model: ModelSettings = field(default_factory=ModelSettings)
    recursion: RecursionConfig | None = None
    """How the layers are shared and routed; null: an ordinary GPT without recursion."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    wandb: WandbSettings | None = None
    """Weights & Biases beside TensorBoard; null: without."""
    uptrain: UptrainSettings | None = None
    """A dense model to begin with and to learn from; null: neither."""
    log_every: int = 5
    """Steps between log rows."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s at the chosen precision, for the utilization (MFU)."""

    def __post_init__(self) -> None:
        require(self.output != "", "output is empty. Name a folder, e.g. output=runs/mine.")
        require_at_least(1, "settings", log_every=self.log_every)
        require(
            self.peak_tflops is None or 0 < self.peak_tflops < math.inf,
            f"peak_tflops={self.peak_tflops} must be above 0 and finite, or null where it is not "
            "known.",
        )
        self._check_layers()
        self._check_tensor_parallel()
        self._check_context_parallel()
        self._check_experts()
        self._check_uptrain()
        require(
            self.evaluation.sample_tokens < self.data.sequence_length,
            f"evaluation.sample_tokens={self.evaluation.sample_tokens} leaves no room for the "
            f"prompt in data.sequence_length={self.data.sequence_length}. Use fewer.",
        )

    @property
    def last_step(self) -> int:
        """Step at which this process ends."""
        return self.training.stop_after or self.training.steps

    @property
    def schedule(self) -> SharingSchedule | None:
        """Which layer runs at which depth; None without recursion."""
        if self.recursion is None:
            return None
        return self.recursion.schedule(self.model.num_unrolled_layers)

    @property
    def virtual_stages(self) -> int | None:
        """Steps that are virtual pipeline stages; None where a recursion lies within one stage."""
        if self.recursion is None or self.parallel.pipeline_layout == "one_stage":
            return None
        return self.recursion.num_recursions

    @property
    def is_distilled(self) -> bool:
        """Whether a teacher runs beside the model."""
        return self.uptrain is not None and self.uptrain.distillation_coefficient > 0

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model among `world_size` processes.

        Raises:
            ValueError: the processes do not divide into the parallelism or the batch that is set.
        """
        parallel = self.parallel
        tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
        expert, model = parallel.expert, tensor * pipeline * context
        require(
            world_size % model == 0,
            f"{world_size} processes cannot hold copies of parallel.tensor={tensor} × "
            f"pipeline={pipeline} × context={context} processes. Start a multiple of {model} "
            "(torchrun --nproc-per-node), or lower these settings.",
        )
        copies = world_size // model
        require(
            world_size // pipeline % expert == 0,
            f"parallel.expert={expert} must divide the {world_size // pipeline} processes of a pipeline "
            f"stage ({world_size} processes, parallel.pipeline={pipeline}).",
        )
        micro = self.training.micro_batch_size
        require(
            self.training.global_batch_size % (micro * copies) == 0,
            f"training.global_batch_size={self.training.global_batch_size} is not a multiple of "
            f"micro_batch_size={micro} × {copies} data-parallel copies. "
            f"Use a multiple of {micro * copies}.",
        )
        microbatches = self.training.global_batch_size // (micro * copies)
        require(
            self.virtual_stages is None or microbatches % pipeline == 0,
            f"training.global_batch_size={self.training.global_batch_size} leaves {microbatches} "
            f"micro-batches of {micro} to each of {copies} data-parallel copies, which go round "
            f"parallel.pipeline={pipeline} stages in groups of {pipeline}. Use a multiple of "
            f"{micro * copies * pipeline}, or a smaller training.micro_batch_size.",
        )
        return copies

    def _check_layers(self) -> None:
        stages, layers = self.parallel.pipeline, self.model.num_unrolled_layers
        if self.parallel.pipeline_layout == "steps_as_stages":
            self._check_steps_as_stages()
            return
        if self.schedule is None:
            require(
                layers >= 3,
                f"model.num_unrolled_layers={layers} without recursion must be at least 3: the "
                "first, the last, and something between.",
            )
            require(
                layers % stages == 0,
                f"model.num_unrolled_layers={layers} must be a multiple of "
                f"parallel.pipeline={stages}.",
            )
            return
        blocks = 1 if self.schedule.is_cyclic else self.schedule.block_size
        parts = self.schedule.prelude + blocks + self.schedule.coda
        require(
            stages <= parts,
            f"parallel.pipeline={stages} exceeds the {parts} parts of the model: a recursion stays "
            f"within one stage. Use {parts} or fewer, or parallel.pipeline_layout=steps_as_stages.",
        )

    def _check_steps_as_stages(self) -> None:
        given, stages = "parallel.pipeline_layout='steps_as_stages'", self.parallel.pipeline
        instead = "or parallel.pipeline_layout=one_stage"
        if self.recursion is None or self.schedule is None:
            raise ValueError(f"{given} needs a recursion. Set recursion, {instead}.")
        steps, size = self.recursion.num_recursions, self.schedule.block_size
        require(
            self.schedule.is_cyclic and steps > 1,
            f"{given} with recursion.sharing={self.recursion.sharing!r}, num_recursions={steps}: "
            f"nothing goes round. Use 'cycle' or 'middle_cycle' and 2 recursions or more, "
            f"{instead}.",
        )
        require(
            self.recursion.kv_policy != "exit_state",
            f"{given} keeps only what step 1 makes for later steps, not recursion.kv_policy="
            f"'exit_state'. Use 'recursion_wise', 'recursive_sharing' or 'sharing_with_update', "
            f"{instead}.",
        )
        ends = self.schedule.prelude + self.schedule.coda
        fitting = [n * steps + ends for n in (size - size % stages, size - size % stages + stages)]
        require(
            size % stages == 0,
            f"{given} spreads the block's {size} layers over parallel.pipeline={stages} stages, "
            f"which is not even. Use model.num_unrolled_layers="
            f"{' or '.join(str(n) for n in fitting if n > ends)}, {instead}.",
        )

    def _check_tensor_parallel(self) -> None:
        size = self.parallel.tensor
        widths = {
            "model.num_heads": self.model.num_heads,
            "model.num_kv_heads": self.model.num_kv_heads,
            "model.ffn_hidden_size": self.model.ffn_hidden_size,
        }
        if self.model.moe is not None:
            widths["model.moe.ffn_hidden_size"] = self.model.moe.ffn_hidden_size
        if self.parallel.sequence_parallel:
            widths["data.sequence_length"] = self.data.sequence_length
        for name, value in widths.items():
            require(
                value % size == 0,
                f"{name}={value} must be a multiple of parallel.tensor={size}.",
            )

    def _check_context_parallel(self) -> None:
        context, tensor = self.parallel.context, self.parallel.tensor
        if context == 1:
            return
        length = self.data.sequence_length
        spread = tensor if self.parallel.sequence_parallel else 1
        multiple = math.lcm(2 * context, spread * context)
        require(
            length % multiple == 0,
            f"data.sequence_length={length} must be a multiple of {multiple}, for two chunks on each "
            f"of parallel.context={context} processes"
            + (f", which parallel.tensor={tensor} share." if spread > 1 else "."),
        )
        require(
            self.virtual_stages is None,
            f"parallel.context={context} cannot run with parallel.pipeline_layout='steps_as_stages'. "
            "Use one_stage, or parallel.tensor with sequence_parallel.",
        )

    def _check_experts(self) -> None:
        moe, expert = self.model.moe, self.parallel.expert
        if self.recursion is not None:
            self.recursion.require_experts(moe is not None)
        if moe is None:
            require(
                expert == 1,
                f"parallel.expert={expert} has no effect without experts. "
                "Set it to 1, or set model.moe.",
            )
            return
        require(
            moe.num_experts % expert == 0,
            f"parallel.expert={expert} must divide model.moe.num_experts={moe.num_experts}.",
        )
        require(
            self.parallel.tensor == 1 or self.parallel.sequence_parallel,
            f"model.moe with parallel.tensor={self.parallel.tensor} needs "
            "parallel.sequence_parallel=True: Megatron-Core trains experts under tensor "
            "parallelism only with it.",
        )

    def _check_uptrain(self) -> None:
        if self.uptrain is None:
            return
        require(
            self.recursion is not None,
            "uptrain makes a recursive model of a dense one, and recursion is null. Set recursion, "
            "or uptrain=null.",
        )
        require(
            self.model.moe is None,
            "uptrain begins with a dense model, which has no experts to give. Set model.moe=null, "
            "or uptrain=null.",
        )
        require(
            self.training.initial_weights is None,
            "training.initial_weights and uptrain.teacher both say where the weights come from. "
            "Set one of them to null.",
        )
        require(
            self.model.num_unrolled_layers >= 3,
            f"uptrain with model.num_unrolled_layers={self.model.num_unrolled_layers}: the dense "
            "model must have at least 3 layers.",
        )
