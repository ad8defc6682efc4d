"""Early exit for a model that was trained without one."""

from torch import Tensor

from mor_layers.models import MoRTransformer
from mor_layers.routers import Criterion, EarlyExitRouter, FixedDepthRouter


def with_early_exit(model: MoRTransformer, criterion: Criterion) -> None:
    """Let tokens of a fixed-depth model exit early, in place.

    States between steps are turned into logits by the model's last norm and output matrix. This skips
    the layers after the recursion, which run on the final state as usual.

    Raises:
        ValueError: the model already has a router that decides, or it does not loop as a whole.
    """
    recursion = model.config.only_recursion("early exit")
    if recursion is None or len(model.recursions) != 1:
        raise ValueError("early exit needs a model with sharing 'cycle' or 'middle_cycle'.")
    (block,) = model.recursions
    if not isinstance(block.router, FixedDepthRouter | EarlyExitRouter):
        raise ValueError(
            f"{type(block.router).__name__} already decides the depth of tokens. Early exit is for "
            "models trained with FixedDepth."
        )

    def read_out(hidden: Tensor) -> Tensor:
        return model.output(model.norm(hidden))

    block.router = EarlyExitRouter(criterion, read_out, recursion.num_recursions)
