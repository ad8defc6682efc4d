"""Workloads, parallel layouts, and plans, which are the estimated cost of both."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from mor_layers import DecoderConfig
from mor_layers.costs import Accounting, ModelShape, account
from mor_megatron.parallel import Arrangement, CarriedRows, PipelineLayout
from mor_tools.planner.memory import Recompute
from mor_tools.planner.stages import unrolled
from mor_tools.planner.traffic import Traffic

LARGEST = {"num_unrolled_layers": 1000, "sequence_length": 10**9, "global_batch_size": 10**9}
"""The largest sizes that are accepted, because planning larger ones would take minutes."""


@dataclass(frozen=True)
class Workload:
    """What is trained, independent of the layout."""

    model: DecoderConfig
    sequence_length: int
    global_batch_size: int
    is_bf16: bool = True
    distributed_optimizer: bool = False
    tokens_per_step: tuple[float, ...] | None = None
    """As for `account`. If neither this nor the settings determine them, the plan assumes that
    equally many tokens exit at each step, which is the target of the router's balancing."""
    documents: bool = False
    """Whether the sequences of a batch may have several documents, or padding. If so, stages that
    are recursion steps send more data."""

    def __post_init__(self) -> None:
        sizes = {
            "num_unrolled_layers": self.model.num_unrolled_layers,
            "sequence_length": self.sequence_length,
            "global_batch_size": self.global_batch_size,
        }
        for name, size in sizes.items():
            if not 1 <= size <= LARGEST[name]:
                raise ValueError(f"{name}={size} must be between 1 and {LARGEST[name]}.")

    @property
    def itemsize(self) -> int:
        return 2 if self.is_bf16 else 4

    @cached_property
    def shape(self) -> ModelShape:
        return unrolled(ModelShape.from_decoder(self.model))

    @cached_property
    def cost(self) -> Accounting:
        tokens = self.tokens_per_step or self.shape.planned_tokens(self.sequence_length)
        return account(self.shape, self.sequence_length, tokens, causal_half=False)

    @property
    def kv_bytes(self) -> float:
        """Bytes of the keys and values, or latent rows, of one sequence in generation."""
        return self.cost.kv_bytes(self.itemsize)

    def split_caches(self, tensor: int) -> int:
        """Number of parts that tensor-parallel ranks divide a cache into. All heads need the latent rows
        of latent attention, so every rank has all of them."""
        return 1 if self.model.latent_attention is not None else tensor

    @cached_property
    def first_run(self) -> tuple[int, ...]:
        """Index in `cost.steps` of the first step of each stack."""
        return (0, *accumulate(stack.num_recursions for stack in self.shape.stacks))[:-1]

    @cached_property
    def part_depths(self) -> tuple[int, ...]:
        """Unrolled layers of the parts that no pipeline stage may split."""
        return Arrangement(self.model.num_unrolled_layers, self.model.recursion).part_depths

    @cached_property
    def last_block(self) -> int:
        """Index of the stack that is the last recursion's last block."""
        return max(
            (i for i, stack in enumerate(self.shape.stacks) if stack.name == "block"), default=0
        )

    @cached_property
    def carried(self) -> CarriedRows:
        """The tensors sent between stages that are recursion steps, for one tensor-parallel rank."""
        recursion, size = self.model.effective_recursion, self.model.hidden_size
        return CarriedRows.of(recursion, size, self.itemsize, 1, self.documents)


@dataclass(frozen=True)
class Layout:
    """How a workload is distributed over devices."""

    tensor: int = 1
    pipeline: int = 1
    pipeline_layout: PipelineLayout = "one_stage"
    context: int = 1
    expert: int = 1
    data: int = 1
    micro_batch_size: int = 1
    recompute: Recompute = "none"
    sequence_parallel: bool = False

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class Memory:
    """Memory of a rank in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Largest size of the activations that are kept for the backward pass at any time."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StagePlan:
    """Memory, traffic and time of one rank of a pipeline stage in an optimizer step."""

    parameters: float
    memory: Memory
    traffic: Traffic
    """Bytes sent, by axis and collective."""
    compute: float
    """Seconds of matrix products."""
    busy: float
    """Seconds of matrix products and of communication between them, without that of gradients."""


@dataclass(frozen=True)
class Plan:
    """A layout and its cost."""

    layout: Layout
    stages: tuple[StagePlan, ...]
    makespan: float
    """Seconds from the start of the pipeline's first pass to the end of its last one."""
    times: dict[str, float]
    """Seconds of a step by purpose. They sum to `seconds`."""
    utilization: float
    """Model FLOPs relative to peak FLOPs (MFU)."""
    kv_bytes: float
    """Bytes of the keys and values of one sequence in generation, on a tensor-parallel rank."""

    @cached_property
    def fullest(self) -> StagePlan:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def memory(self) -> Memory:
        """Memory of the rank that needs the most."""
        return self.fullest.memory

    @property
    def parameters(self) -> float:
        """Number of parameters on the rank that needs the most memory."""
        return self.fullest.parameters

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes sent per step by the rank that sends the most, by axis and collective."""
        return max((stage.traffic for stage in self.stages), key=lambda sent: sum(sent.values()))

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time that stages spend waiting."""
        return 1 - sum(stage.busy for stage in self.stages) / (self.makespan * len(self.stages))

    @property
    def seconds(self) -> float:
        return sum(self.times.values())
