"""Assigns layers and recursion steps to pipeline stages, without building a pipeline."""

from dataclasses import dataclass, replace

from mor_layers.costs import ModelShape, StackShape
from mor_megatron.parallel import PipelineLayout, even_stages


@dataclass(frozen=True)
class Part:
    """Layers that a chunk of a stage runs at one step."""

    index: int
    """Index of the stack in the model's shape."""
    stack: StackShape
    step: int
    """0-based recursion step."""
    layers: float
    """Number of the stack's layers in this part."""
    first: bool = True
    """Whether the routers of the stack are in this part."""


Stages = list[list[list[Part]]]
"""The parts by stage and virtual stage (chunk)."""


def unrolled(shape: ModelShape) -> ModelShape:
    """The same model with a separate stack for each layer outside of a recursion.

    These layers may be on different stages, whereas a recursion stays together.
    """
    stacks: list[StackShape] = []
    for stack in shape.stacks:
        alone = stack.num_recursions == 1
        stacks += [replace(stack, num_layers=1)] * stack.num_layers if alone else [stack]
    return replace(shape, stacks=tuple(stacks))


def place(
    shape: ModelShape, layout: PipelineLayout, stages: int, part_depths: tuple[int, ...]
) -> Stages:
    """Assign all layers and steps to stages.

    Args:
        part_depths: unrolled layers of the parts that stay together, see `Arrangement.part_depths`.

    Raises:
        ValueError: there are more stages than parts.
    """
    if layout == "steps_as_stages" and stages > 1:
        return _spread(shape, stages)
    stacks = list(enumerate(shape.stacks))[::-1]  # the next one is the last
    placed = []
    for depth in map(sum, even_stages(part_depths, stages)):
        parts = list[Part]()
        while depth > 0:
            index, stack = stacks.pop()
            steps = range(stack.num_recursions)
            parts += [Part(index, stack, step, stack.num_layers) for step in steps]
            depth -= stack.num_layers * stack.num_recursions
        placed.append([parts])
    return placed


def _spread(shape: ModelShape, stages: int) -> Stages:
    (middle,) = (i for i, s in enumerate(shape.stacks) if s.num_recursions > 1)
    block = shape.stacks[middle]
    steps, own = block.num_recursions, block.num_layers / stages
    placed = [[[Part(middle, block, v, own, p == 0)] for v in range(steps)] for p in range(stages)]
    ends = [Part(i, stack, 0, stack.num_layers) for i, stack in enumerate(shape.stacks)]
    placed[0][0] = ends[:middle] + placed[0][0]
    placed[-1][-1] = placed[-1][-1] + ends[middle + 1 :]
    return placed
