"""How the work of a run is distributed over processes."""

from dataclasses import dataclass

from mor_megatron.parallel import PipelineLayout
from mor_tools.pretraining.settings.rules import require, require_at_least


@dataclass(frozen=True)
class ParallelSettings:
    """How the work is distributed over processes; all remaining processes are data parallel."""

    tensor: int = 1
    """Processes that share each layer's matrices."""
    sequence_parallel: bool = False
    """Whether these processes also share the sequence outside the matrices."""
    pipeline: int = 1
    """Processes that share the layers, which are the pipeline stages."""
    pipeline_layout: PipelineLayout = "one_stage"
    """Where a recursion runs: in `one_stage`, or, with `steps_as_stages`, in all of them: its layers
    are divided over the stages, and each step is a virtual stage."""
    context: int = 1
    """Processes that share each sequence. `data.sequence_length` must be a multiple of twice this."""
    expert: int = 1
    """Processes that share the experts; must divide `model.moe.num_experts`."""
    distributed_optimizer: bool = False
    """Whether the optimizer's state is sharded over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced while the backward pass still runs."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            "parallel",
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
        )
        require(
            self.tensor > 1 or not self.sequence_parallel,
            "parallel.sequence_parallel=True has no effect with parallel.tensor=1. "
            "Set it to False, or parallel.tensor to 2 or more.",
        )
