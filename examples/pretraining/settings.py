"""Every setting of `pretrain_gpt_mor.py`: what it means, and which values fit together.

A YAML file and `key=value` overrides become one frozen `Settings`. Whatever is wrong with it is
found here, before a process group, a file or a model exists.
"""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import mor_dali
from mor_layers import RecursionConfig, SharingSchedule
from mor_layers.pipeline_accounting import PipelineLayout
from mor_layers.uptraining import Initialization

WandbMode = Literal["online", "offline"]
Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "full", "selective"]
Dispatcher = Literal["allgather", "alltoall"]
Loader = Literal["megatron", "dali"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(minimum: float, owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"{owner}.{name}={value} must be at least {minimum}.")


def _require_share(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{owner}.{name}={value} must lie in (0, 1).")


@dataclass(frozen=True)
class MoESettings:
    """A mixture of experts in place of the MLP, but for the unshared first and last layer."""

    num_experts: int = 4
    """Experts per layer."""
    experts_per_token: int = 2
    """Experts each token is sent to. From 1 to `num_experts`."""
    ffn_hidden_size: int = 256
    """Inner width of one expert."""
    balance_coefficient: float = 0.01
    """Weight of the load balancing loss. 0: none."""
    z_loss_coefficient: float = 0.001
    """Weight of the z-loss on the expert router's logits. 0: none."""
    dispatcher: Dispatcher = "alltoall"
    """How tokens reach their experts: `allgather` or `alltoall`."""

    def __post_init__(self) -> None:
        owner = "model.moe"
        _require_at_least(2, owner, num_experts=self.num_experts)
        _require_at_least(1, owner, ffn_hidden_size=self.ffn_hidden_size)
        _require_at_least(
            0,
            owner,
            balance_coefficient=self.balance_coefficient,
            z_loss_coefficient=self.z_loss_coefficient,
        )
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"{owner}.experts_per_token={self.experts_per_token} must lie between 1 and "
            f"num_experts={self.num_experts}.",
        )


@dataclass(frozen=True)
class ModelSettings:
    """A GPT in the Llama layout: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases."""

    hidden_size: int = 192
    """Width of the residual stream; a multiple of `num_heads`."""
    ffn_hidden_size: int = 512
    """Inner width of the dense MLPs."""
    num_unrolled_layers: int = 8
    """Depth counted with repeats: every run of a shared layer counts."""
    num_heads: int = 6
    """Query heads; a multiple of `num_kv_heads`."""
    num_kv_heads: int = 2
    """Key-value heads."""
    head_dim: int | None = None
    """Numbers per head, even. null: `hidden_size / num_heads`."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, as in Qwen3."""
    rms_norm_epsilon: float = 1e-5
    """Added to the mean square before the root."""
    rope_base: int = 10000
    """Base of the rotary position embedding."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    moe: MoESettings | None = None
    """Mixture of experts; null: dense MLPs everywhere."""

    def __post_init__(self) -> None:
        owner = "model"
        for name in ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "rope_base"):
            _require_at_least(1, owner, **{name: getattr(self, name)})
        _require_at_least(1, owner, num_unrolled_layers=self.num_unrolled_layers)
        _require(
            self.head_dim is not None or self.hidden_size % (2 * self.num_heads) == 0,
            f"{owner}.hidden_size={self.hidden_size} must be an even multiple of "
            f"num_heads={self.num_heads}, since RoPE turns pairs of a head's numbers.",
        )
        _require(
            self.head_dim is None or (self.head_dim > 0 and self.head_dim % 2 == 0),
            f"{owner}.head_dim={self.head_dim} must be even and at least 2.",
        )
        _require(
            self.rms_norm_epsilon > 0,
            f"{owner}.rms_norm_epsilon={self.rms_norm_epsilon} must be above 0.",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"{owner}.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}.",
        )


@dataclass(frozen=True)
class ParallelSettings:
    """How the work is spread over processes; what they leave over is data parallel."""

    tensor: int = 1
    """Processes that share each layer's matrices."""
    sequence_parallel: bool = False
    """Whether these processes also share the sequence outside the matrices."""
    pipeline: int = 1
    """Processes that share the layers: stages."""
    pipeline_layout: PipelineLayout = "one_stage"
    """Where a recursion lies: within `one_stage`, or `steps_as_stages`: its layers are spread over
    all stages, and each step is a virtual stage."""
    context: int = 1
    """Processes that share each sequence; `data.sequence_length` is a multiple of twice as many."""
    expert: int = 1
    """Processes that share the experts; divides `model.moe.num_experts`."""
    distributed_optimizer: bool = False
    """Whether optimizer state is spread over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced while the backward pass still runs."""

    def __post_init__(self) -> None:
        _require_at_least(
            1,
            "parallel",
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
        )
        _require(
            self.tensor > 1 or not self.sequence_parallel,
            "parallel.sequence_parallel=True has no effect with parallel.tensor=1. "
            "Set it to False, or parallel.tensor to 2 or more.",
        )
        _require(
            self.pipeline > 1 or self.pipeline_layout == "one_stage",
            f"parallel.pipeline_layout={self.pipeline_layout!r} has no effect with "
            "parallel.pipeline=1. Use 'one_stage', or set parallel.pipeline to 2 or more.",
        )


@dataclass(frozen=True)
class DataSettings:
    """The text, and how it becomes token ids."""

    path: str | None = None
    """A text file, a folder of .txt files, a .jsonl file with a `text` field a line, or the prefix
    of an existing .bin/.idx pair. null: the documentation and source code that ship with Python."""
    tokenizer: str | None = None
    """A tokenizer.json of the `tokenizers` library. null: a byte-level BPE is trained on the text,
    which an existing .bin/.idx pair does not have."""
    vocabulary_size: int = 4096
    """Size of the BPE that is trained. At least 257: the bytes and the end of a document."""
    end_of_document: str = "<|endoftext|>"
    """Token between documents; `tokenizer` must have it."""
    sequence_length: int = 256
    """Tokens in a training sequence, of as many documents as it takes."""
    reset_attention_mask: bool = True
    """Whether a token attends and is routed within its own document alone. False: across those
    before it in the sequence too."""
    held_out_share: float = 0.05
    """Share of the documents kept for validation. In (0, 1)."""
    prepared_folder: str = "runs/prepared-text"
    """Where token ids and tokenizers are kept for later runs."""
    workers: int = 0
    """Processes that read ahead. 0: the training process reads."""
    loader: Loader = "megatron"
    """What makes batches: `megatron`, its dataset's samples collated by PyTorch, or `dali`, the same
    batches through NVIDIA DALI, made ahead on the GPU where there is one."""

    def __post_init__(self) -> None:
        owner = "data"
        _require(
            self.loader != "dali" or mor_dali.is_installed(),
            f"{owner}.loader='dali': {mor_dali.INSTALL} That is {owner}.loader=megatron.",
        )
        _require_at_least(0, owner, workers=self.workers)
        _require_at_least(1, owner, sequence_length=self.sequence_length)
        _require_at_least(257, owner, vocabulary_size=self.vocabulary_size)
        _require_share(owner, held_out_share=self.held_out_share)


@dataclass(frozen=True)
class TrainingSettings:
    """Optimization with AdamW and a warmup-stable-decay schedule."""

    steps: int = 500
    """Optimizer steps of the whole run."""
    stop_after: int | None = None
    """Stop, with a checkpoint, once this step of the run is done; run again to go on. null: at
    `steps`."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Sequences that one process runs at once."""
    learning_rate: float = 3e-3
    """Learning rate between warmup and decay."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 20
    """Steps of linear warmup from 0."""
    decay_steps: int = 200
    """Steps of linear decay at the end."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment. In (0, 1)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient. 0: not clipped."""
    precision: Precision = "fp32"
    """Numbers the layers compute with: `fp32` or `bf16` (with fp32 master weights)."""
    recompute: Recompute = "none"
    """Activations computed again in the backward pass: `none`, `full`, or `selective`: those of
    the attention core."""
    seed: int = 1
    """Of the initial weights and of the order of the text."""
    initial_weights: str | None = None
    """Folder of the weights to start from: a model of ours, or a Megatron checkpoint in any layout
    (`mor convert` makes both). null: random ones."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is always one at the end."""
    timeout_seconds: float = 600.0
    """Longest that a micro-batch, with its communication, or a checkpoint may take. After it the run
    ends, and says which rank hangs."""

    def __post_init__(self) -> None:
        owner = "training"
        _require_at_least(
            1,
            owner,
            steps=self.steps,
            stop_after=self.stop_after,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            checkpoint_every=self.checkpoint_every,
        )
        _require_at_least(
            0,
            owner,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            final_learning_rate=self.final_learning_rate,
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
            seed=self.seed,
        )
        _require(
            0 < self.timeout_seconds < math.inf,
            f"{owner}.timeout_seconds={self.timeout_seconds} must be above 0, and finite.",
        )
        _require(self.learning_rate > 0, f"{owner}.learning_rate={self.learning_rate} must be > 0.")
        _require_share(owner, adam_beta2=self.adam_beta2)
        _require(
            self.final_learning_rate <= self.learning_rate,
            f"{owner}.final_learning_rate={self.final_learning_rate} must not exceed "
            f"learning_rate={self.learning_rate}.",
        )
        _require(
            self.warmup_steps + max(self.decay_steps, 1) <= self.steps,
            f"{owner}.warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not "
            f"fit into steps={self.steps}. Shorten them, or train longer.",
        )
        _require(
            self.stop_after is None or self.stop_after <= self.steps,
            f"{owner}.stop_after={self.stop_after} is beyond steps={self.steps}. "
            "Use a smaller number, or null.",
        )


@dataclass(frozen=True)
class UptrainSettings:
    """Beginning with a dense model's weights and learning from it; null: fresh weights."""

    teacher: str
    """Folder of the dense model, in our format or a Llama's, whose tokenizer the data has. It says
    the sizes of the model: `model.*` and, but for their recursion, the layers are the same."""
    initialization: Initialization = "stepwise"
    """Where shared layers come from: `stepwise`, `average`, `lower`, `upper` or `random`. The rest
    is the dense model's."""
    distillation_coefficient: float = 1.0
    """Weight of the divergence between the dense model's distribution of each next token and this
    one's. 0: the dense model gives its weights and is not run."""
    language_model_coefficient: float = 1.0
    """Weight of the language-model loss beside it."""
    temperature: float = 1.0
    """What both logits are divided by; the divergence is multiplied by its square. Above 0."""

    def __post_init__(self) -> None:
        owner, distillation = "uptrain", self.distillation_coefficient
        _require(
            self.teacher != "", f"{owner}.teacher is empty. Name a folder, or set uptrain=null."
        )
        _require_at_least(
            0,
            owner,
            distillation_coefficient=distillation,
            language_model_coefficient=self.language_model_coefficient,
        )
        _require(self.temperature > 0, f"{owner}.temperature={self.temperature} must be above 0.")
        _require(
            distillation > 0 or self.temperature == 1.0,
            f"{owner}.temperature={self.temperature} has no effect with "
            "distillation_coefficient=0. Leave it out, or set the coefficient above 0.",
        )
        _require(
            distillation > 0 or self.language_model_coefficient == 1.0,
            f"{owner}.language_model_coefficient={self.language_model_coefficient} weighs nothing "
            "against distillation_coefficient=0. Leave it out, or set that above 0.",
        )


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
    """Of the sample continuation. 0: the likeliest token each time."""

    def __post_init__(self) -> None:
        owner = "evaluation"
        _require_at_least(1, owner, every=self.every, batches=self.batches)
        _require_at_least(0, owner, sample_tokens=self.sample_tokens, temperature=self.temperature)
        _require(self.prompt != "", f"{owner}.prompt is empty. Give it at least one character.")


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases, which then gets the numbers of each step that TensorBoard gets."""

    project: str
    """Project of wandb."""
    mode: WandbMode = "online"
    """`online`, or `offline`: kept in `output`/wandb, for `wandb sync`."""

    def __post_init__(self) -> None:
        _require(self.project != "", "wandb.project is empty. Name one, or set wandb=null.")
        _require(
            find_spec("wandb") is not None,
            f"wandb.project={self.project!r} needs the package wandb. Install it, or set wandb=null.",
        )


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
        _require(self.output != "", "output is empty. Name a folder, e.g. output=runs/mine.")
        _require_at_least(1, "settings", log_every=self.log_every)
        _require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"peak_tflops={self.peak_tflops} must be above 0, or null where it is not known.",
        )
        self._check_layers()
        self._check_tensor_parallel()
        self._check_context_parallel()
        self._check_experts()
        self._check_uptrain()
        _require(
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
        _require(
            world_size % model == 0,
            f"{world_size} processes cannot hold copies of parallel.tensor={tensor} × "
            f"pipeline={pipeline} × context={context} processes. Start a multiple of {model} "
            "(torchrun --nproc-per-node), or lower these settings.",
        )
        copies = world_size // model
        _require(
            world_size // pipeline % expert == 0,
            f"parallel.expert={expert} must divide the {world_size // pipeline} processes of a pipeline "
            f"stage ({world_size} processes, parallel.pipeline={pipeline}).",
        )
        micro = self.training.micro_batch_size
        _require(
            self.training.global_batch_size % (micro * copies) == 0,
            f"training.global_batch_size={self.training.global_batch_size} is not a multiple of "
            f"micro_batch_size={micro} × {copies} data-parallel copies. "
            f"Use a multiple of {micro * copies}.",
        )
        microbatches = self.training.global_batch_size // (micro * copies)
        _require(
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
            _require(
                layers >= 3,
                f"model.num_unrolled_layers={layers} without recursion must be at least 3: the "
                "first, the last, and something between.",
            )
            _require(
                layers % stages == 0,
                f"model.num_unrolled_layers={layers} must be a multiple of "
                f"parallel.pipeline={stages}.",
            )
            return
        blocks = 1 if self.schedule.is_cyclic else self.schedule.block_size
        parts = self.schedule.prelude + blocks + self.schedule.coda
        _require(
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
        _require(
            self.schedule.is_cyclic and steps > 1,
            f"{given} with recursion.sharing={self.recursion.sharing!r}, num_recursions={steps}: "
            f"nothing goes round. Use 'cycle' or 'middle_cycle' and 2 recursions or more, "
            f"{instead}.",
        )
        _require(
            self.recursion.kv_policy != "exit_state",
            f"{given} keeps only what step 1 makes for later steps, not recursion.kv_policy="
            f"'exit_state'. Use 'recursion_wise', 'recursive_sharing' or 'sharing_with_update', "
            f"{instead}.",
        )
        ends = self.schedule.prelude + self.schedule.coda
        fitting = [n * steps + ends for n in (size - size % stages, size - size % stages + stages)]
        _require(
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
            _require(
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
        _require(
            length % multiple == 0,
            f"data.sequence_length={length} must be a multiple of {multiple}, for two chunks on each "
            f"of parallel.context={context} processes"
            + (f", which parallel.tensor={tensor} share." if spread > 1 else "."),
        )
        _require(
            self.virtual_stages is None,
            f"parallel.context={context} cannot run with parallel.pipeline_layout='steps_as_stages'. "
            "Use one_stage, or parallel.tensor with sequence_parallel.",
        )

    def _check_experts(self) -> None:
        moe, expert = self.model.moe, self.parallel.expert
        if self.recursion is not None:
            self.recursion.require_experts(moe is not None)
        if moe is None:
            _require(
                expert == 1,
                f"parallel.expert={expert} has no effect without experts. "
                "Set it to 1, or set model.moe.",
            )
            return
        _require(
            moe.num_experts % expert == 0,
            f"parallel.expert={expert} must divide model.moe.num_experts={moe.num_experts}.",
        )
        _require(
            self.parallel.tensor == 1 or self.parallel.sequence_parallel,
            f"model.moe with parallel.tensor={self.parallel.tensor} needs "
            "parallel.sequence_parallel=True: Megatron-Core trains experts under tensor "
            "parallelism only with it.",
        )

    def _check_uptrain(self) -> None:
        if self.uptrain is None:
            return
        _require(
            self.recursion is not None,
            "uptrain makes a recursive model of a dense one, and recursion is null. Set recursion, "
            "or uptrain=null.",
        )
        _require(
            self.model.moe is None,
            "uptrain begins with a dense model, which has no experts to give. Set model.moe=null, "
            "or uptrain=null.",
        )
        _require(
            self.training.initial_weights is None,
            "training.initial_weights and uptrain.teacher both say where the weights come from. "
            "Set one of them to null.",
        )
        _require(
            self.model.num_unrolled_layers >= 3,
            f"uptrain with model.num_unrolled_layers={self.model.num_unrolled_layers}: the dense "
            "model must have at least 3 layers.",
        )
