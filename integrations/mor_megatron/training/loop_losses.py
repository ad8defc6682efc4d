"""A loss after every loop of a recursion, in an unmodified GPTModel.

The states after all loops travel as one batch, loop by loop, from the recursion through the layers after
it, the last norm and the output layer. What a training loop gets is the loss of each token, `[b s]`, as
from any GPTModel: the mean over loops, weighted by the prior. With the recursion in one pipeline stage,
the batch of all loops is sent to the stages after it; with steps as stages, the rank of the output layer
keeps the states after each loop.

A router that learns where tokens should exit is taught here as well: which read-outs are right is known
as soon as there are logits.

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
from mor_megatron.layers.routing.auxiliary_loss import RouterLossScaler
from mor_megatron.step import in_sequence_order


def weigh_loops(model: nn.Module | Iterable[nn.Module]) -> None:
    """Let models whose recursion has a `loop_loss` train on it, in place; others stay as they are.

    Call it once on every rank, with all chunks of the rank, after the model is built. The loss of
    evaluation is that of the last loop. With the recursion on an earlier pipeline stage than the output
    layer, a model in training returns the logits of all loops if it gets no labels.

    Raises:
        ValueError: a recursion that is not the last one has a `loop_loss`, or its router learns exits
            and it is on an earlier pipeline stage than the output layer.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    own = list(recursion_layers(chunks))
    loop_losses = _on_all_stages([layer.loop_loss for layer in own if layer.is_entry])
    if not any(loop_losses):
        return
    if any(loop_losses[:-1]):
        raise ValueError(
            f"only the last of the {len(loop_losses)} recursions of a model can have a loop_loss: a "
            "batch of all loops would multiply at the next one. Leave it out elsewhere."
        )
    models: list[Any] = [unwrap_model(chunk) for chunk in chunks]
    assert all(isinstance(gpt, GPTModel) for gpt in models)
    outputs = [gpt for gpt in models if gpt.post_process]
    if any(_on_all_stages([not outputs and recursion.learns_exits for recursion in own])):
        raise ValueError(
            "an exit gate is taught by what is read out, but the output layer is on a later pipeline "
            "stage than its recursion. Use a pipeline_model_parallel_layout whose last stage has the "
            "whole recursion and all layers after it, or leave teaching out."
        )
    for recursion in own:
        recursion.returns_every_loop = not outputs
        for gpt in outputs:
            gpt.register_forward_pre_hook(partial(_announce, recursion), with_kwargs=True)
    for gpt in outputs:
        _weigh(gpt, loop_losses[-1], [recursion for recursion in own if recursion.learns_exits])
    for gpt in models:
        for layer in gpt.decoder.layers:
            if not isinstance(layer, AbsorbedLayer):
                layer.register_forward_pre_hook(_masks_of_all_loops, with_kwargs=True)


def _on_all_stages[T](own: list[T]) -> list[T]:
    """What the recursions of all pipeline stages have, in order."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return own
    stages: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(stages, own, group=group)
    return [each for stage in stages for each in stage]


def _announce(
    recursion: RecursionLayer, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    labels = named.get("labels", inputs[4] if len(inputs) > 4 else None)
    recursion.returns_every_loop = labels is not None


def _weigh(model: GPTModel, loop_loss: LoopLoss, taught: list[RecursionLayer]) -> None:
    loss_of_batch = model.compute_language_model_loss

    def weighted(labels: Tensor, logits: Tensor) -> Tensor:
        """`[b s], [s rb v] -> [b s]`."""
        loops = logits.shape[1] // labels.shape[0]
        if loops == 1:
            return loss_of_batch(labels, logits)
        # First, because Megatron's cross entropy works in place.
        lessons = [_lesson(recursion, labels, logits.detach()) for recursion in taught]
        losses = loss_of_batch(labels.repeat(loops, 1), logits)
        losses = expected_loss(losses, loop_loss.weights(loops))
        for lesson in lessons:
            losses = RouterLossScaler.apply(losses, lesson)
        return losses

    model.compute_language_model_loss = weighted  # type: ignore[method-assign]


def _lesson(recursion: RecursionLayer, labels: Tensor, logits: Tensor) -> Tensor:
    """The loss of a router that learns where tokens should exit, given what all loops read out."""
    guesses = _most_likely(logits, recursion.pg_collection.tp)  # [s rb]
    labels = labels.T
    is_right = (guesses.unflatten(1, (-1, labels.shape[1])) == labels[:, None]).int()  # [s r b]
    is_counted = (labels >= 0).int()
    if recursion.config.context_parallel_size > 1:
        is_right, is_counted = (
            in_sequence_order(part, recursion.pg_collection.cp) for part in (is_right, is_counted)
        )
    return recursion.teach(is_right.transpose(0, 1).bool(), is_counted.bool())


def _most_likely(logits: Tensor, group: Any) -> Tensor:
    """The tokens with the largest logits, `[s b v] -> [s b]`; this rank has a part of the vocabulary."""
    best = logits.max(dim=-1)
    rows = best.indices + group.rank() * logits.shape[-1]
    parts = torch.stack([best.values.double(), rows.double()])
    ranks = [torch.empty_like(parts) for _ in range(group.size())]
    torch.distributed.all_gather(ranks, parts, group=group)
    values, rows = torch.stack(ranks, dim=1)  # [rank s b] each
    return rows.gather(0, values.argmax(dim=0, keepdim=True))[0].long()


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
