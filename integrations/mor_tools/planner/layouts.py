"""What is trained, how it is spread over devices, and what that costs."""

from dataclasses import dataclass
from functools import cached_property

from mor_layers import DecoderConfig
from mor_layers.costs import Accounting, ModelShape, account
from mor_tools.planner.memory import Recompute
from mor_tools.planner.pipeline import PipelineLayout
from mor_tools.planner.stages import unrolled
from mor_tools.planner.traffic import Traffic


@dataclass(frozen=True)
class Workload:
    """What is trained, whatever the layout."""

    model: DecoderConfig
    sequence_length: int
    global_batch_size: int
    is_bf16: bool = True
    distributed_optimizer: bool = False
    tokens_per_step: tuple[float, ...] | None = None
    """As for `account`, where the settings do not fix them."""

    @property
    def itemsize(self) -> int:
        return 2 if self.is_bf16 else 4

    @cached_property
    def shape(self) -> ModelShape:
        return unrolled(ModelShape.from_decoder(self.model))

    @cached_property
    def cost(self) -> Accounting:
        return account(self.shape, self.sequence_length, self.tokens_per_step, causal_half=False)


@dataclass(frozen=True)
class Layout:
    """How the work is spread over devices."""

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
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """A layout and what it costs."""

    layout: Layout
    memory: Memory
    parameters: float
    """Held by the fullest rank."""
    traffic: Traffic
    """Sent per step by the rank that sends most, bytes by axis and collective."""
    bubble: float
    """Share of the pipeline's time in which stages wait."""
    times: dict[str, float]
    """Seconds of a step by what they go into; they sum to `seconds`."""
    utilization: float
    """Model FLOPs over peak FLOPs (MFU)."""
    kv_bytes: float
    """Keys and values of one sequence in generation, on a tensor-parallel rank."""

    @property
    def seconds(self) -> float:
        return sum(self.times.values())
