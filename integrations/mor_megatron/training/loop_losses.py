"""A loss after every loop of a recursion, in an unmodified GPTModel.

The states after all loops travel as one batch, loop by loop, from the recursion through the layers after
it, the last norm and the output layer. What a training loop gets is the loss of each token, `[b s]`, as
from any GPTModel: the mean over loops, weighted by the prior. With the recursion in one pipeline stage,
the batch of all loops is sent to the stages after it; with steps as stages, the rank of the output layer
keeps the states after each loop.

Legend: `b` batch, `s` sequence, `r` loops, `v` vocabulary.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from mor_layers.recursion import LoopLoss, expected_loss
from mor_megatron.layers import AbsorbedLayer, RecursionLayer, recursion_layers


def weigh_loops(model: nn.Module | Iterable[nn.Module]) -> None:
    """Let models whose recursion has a `loop_loss` train on it, in place; others stay as they are.

    Call it once on every rank, with all chunks of the rank, after the model is built. The loss of
    evaluation is that of the last loop. With the recursion on an earlier pipeline stage than the output
    layer, a model in training returns the logits of all loops if it gets no labels.

    Raises:
        ValueError: the model has several recursions.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    own = list(recursion_layers(chunks))
    loop_losses = _on_all_stages([layer.loop_loss for layer in own if layer.is_entry])
    if not any(loop_losses):
        return
    if len(loop_losses) > 1:
        raise ValueError(
            f"loop_loss needs a model with one recursion, not {len(loop_losses)}: a batch of all loops "
            "would multiply at each. Leave it out."
        )
    models: list[Any] = [unwrap_model(chunk) for chunk in chunks]
    assert all(isinstance(gpt, GPTModel) for gpt in models)
    outputs = [gpt for gpt in models if gpt.post_process]
    for recursion in own:
        recursion.returns_every_loop = not outputs
        for gpt in outputs:
            gpt.register_forward_pre_hook(partial(_announce, recursion), with_kwargs=True)
    for gpt in outputs:
        _weigh(gpt, loop_losses[0])
    for gpt in models:
        for layer in gpt.decoder.layers:
            if not isinstance(layer, AbsorbedLayer):
                layer.register_forward_pre_hook(_masks_of_all_loops, with_kwargs=True)


def _on_all_stages(own: list[LoopLoss | None]) -> list[LoopLoss | None]:
    """What the recursions of all pipeline stages have, in order."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return own
    stages: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(stages, own, group=group)
    return [loop_loss for stage in stages for loop_loss in stage]


def _announce(
    recursion: RecursionLayer, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    labels = named.get("labels", inputs[4] if len(inputs) > 4 else None)
    recursion.returns_every_loop = labels is not None


def _weigh(model: GPTModel, loop_loss: LoopLoss) -> None:
    loss_of_batch = model.compute_language_model_loss

    def weighted(labels: Tensor, logits: Tensor) -> Tensor:
        """`[b s], [s rb v] -> [b s]`."""
        loops = logits.shape[1] // labels.shape[0]
        losses = loss_of_batch(labels.repeat(loops, 1), logits)
        return losses if loops == 1 else expected_loss(losses, loop_loss.weights(loops))

    model.compute_language_model_loss = weighted  # type: ignore[method-assign]


def _masks_of_all_loops(
    _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's inputs with masks for each of the loops that are in its batch."""
    hidden = named["hidden_states"] if "hidden_states" in named else inputs[0]
    for name in ("attention_mask", "padding_mask"):
        mask = named.get(name)
        if mask is not None and len(mask) < hidden.shape[1]:
            named[name] = mask.repeat(hidden.shape[1] // len(mask), *[1] * (mask.dim() - 1))
    return inputs, named
