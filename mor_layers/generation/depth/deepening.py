"""More recursion steps than a model was trained with.

    deeper = deepened(model, extra_steps=2)

A cyclic recursion runs the same block at every step, so it can run more steps without any change of
weights. The additional steps are inserted before the last one. The rule of the last step decides which
tokens run them, and these tokens are combined as in the step before the last. Whatever exists per step
(norms, deltas, embeddings, routers over experts, their biases and thresholds) is that of the last step.
Whether more steps help depends on the model: measure it with the full forward pass, which makes the
same decisions as generation.

Legend: `b` batch, `n` candidates of a step, `k` tokens selected, `h` hidden.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from mor_layers.models import MoRTransformer
from mor_layers.routers import Deepened, FixedDepth


def deepened(model: MoRTransformer, extra_steps: int) -> MoRTransformer:
    """A model with more recursion steps, which shares its parameters with the given one.

    Args:
        extra_steps: number of steps beyond those that the model was trained with. At least 1.

    Raises:
        ValueError: the recursion is not cyclic, or `extra_steps` is below 1.
    """
    recursion = model.config.only_recursion("deepening")
    if recursion is None or not model.config.schedule.is_cyclic:
        raise ValueError(
            "additional steps need a recursion with sharing 'cycle' or 'middle_cycle', whose steps "
            "run the whole block."
        )
    if recursion.router.has_loop_state:
        raise ValueError(
            f"router={recursion.router} ends every token at its last step, so there is nobody to run "
            "additional ones. Train with more steps."
        )
    if extra_steps < 1:
        raise ValueError(f"extra_steps={extra_steps} must be at least 1.")
    router = recursion.router
    if isinstance(router, Deepened):
        router = replace(router, extra_steps=router.extra_steps + extra_steps)
    elif not isinstance(router, FixedDepth):
        router = Deepened(router, extra_steps)
    steps = recursion.num_recursions + extra_steps
    layers = model.config.num_unrolled_layers + extra_steps * model.config.schedule.block_size
    scale = recursion.residual_scale
    if scale is not None:  # the factor of the branches stays what it was in training
        scale *= steps / recursion.num_recursions
    config = replace(
        model.config,
        num_unrolled_layers=layers,
        recursion=replace(recursion, num_recursions=steps, router=router, residual_scale=scale),
    )
    with torch.device("meta"):
        deeper = MoRTransformer(config)
    trained = {**model.state_dict(keep_vars=True)}
    wraps = isinstance(router, Deepened) and not isinstance(recursion.router, Deepened)
    state = {}
    for name, wanted in deeper.state_dict().items():
        source = name.replace(".router.trained.", ".router.") if wraps else name
        found = trained[_of_last_step(source, trained)]
        if found.shape != wanted.shape:  # one row per step: biases and thresholds over experts
            rest = found[-1:].expand(len(wanted) - len(found), *found.shape[1:])
            found = torch.cat([found, rest])
        state[name] = found
    deeper.load_state_dict(state, assign=True)
    return deeper.train(model.training)


_STEP = re.compile(
    r"\.(?:weights|biases|deltas|embeddings|gains|mixers)\.(\d+)"
    r"(?=$|\.(?:a|b|magnitude|weight|scale|bias)$)"
)


def _of_last_step(name: str, trained: dict[str, Tensor]) -> str:
    """The name itself, or that of the last step's tensor if an additional step has none."""
    while name not in trained:
        step = _STEP.search(name)
        assert step is not None, f"{name} is not among the trained model's tensors"
        name = f"{name[: step.start(1)]}{int(step[1]) - 1}{name[step.end() :]}"
    return name
