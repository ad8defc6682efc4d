"""A loss after every loop of a recursion, in an unmodified GPTModel.

The states after all loops travel as one batch, loop by loop, from the recursion through the layers after
it, the last norm and the output layer. What a training loop gets is the loss of each token, `[b s]`, as
from any GPTModel: the mean over loops, weighted by the prior.

Legend: `b` batch, `s` sequence, `r` loops, `v` vocabulary.
"""

from collections.abc import Iterable
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from mor_layers.recursion import expected_loss
from mor_megatron.layers import AbsorbedLayer, RecursionLayer, recursion_layers


def weigh_loops(model: nn.Module | Iterable[nn.Module]) -> None:
    """Let models whose recursion has a `loop_loss` train on it, in place; others stay as they are.

    Call it once, after the model is built. The loss of evaluation is that of the last loop.

    Raises:
        ValueError: a recursion that is not the last one has a `loop_loss`.
    """
    for chunk in [model] if isinstance(model, nn.Module) else model:
        layers = list(recursion_layers(chunk))
        if not any(layer.loop_loss is not None for layer in layers):
            continue
        if any(layer.loop_loss is not None for layer in layers[:-1]):
            raise ValueError(
                f"only the last of the {len(layers)} recursions of a model can have a loop_loss: a "
                "batch of all loops would multiply at the next one. Leave it out elsewhere."
            )
        gpt: Any = unwrap_model(chunk)
        assert isinstance(gpt, GPTModel)
        _weigh(gpt, layers[-1])


def _weigh(model: GPTModel, recursion: RecursionLayer) -> None:
    loop_loss = recursion.loop_loss
    assert loop_loss is not None
    loss_of_batch = model.compute_language_model_loss

    def announce(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        labels = named.get("labels", inputs[4] if len(inputs) > 4 else None)
        recursion.returns_every_loop = labels is not None

    def weighted(labels: Tensor, logits: Tensor) -> Tensor:
        """`[b s], [s rb v] -> [b s]`."""
        loops = logits.shape[1] // labels.shape[0]
        losses = loss_of_batch(labels.repeat(loops, 1), logits)
        return losses if loops == 1 else expected_loss(losses, loop_loss.weights(loops))

    recursion.returns_every_loop = False
    model.register_forward_pre_hook(announce, with_kwargs=True)
    model.compute_language_model_loss = weighted  # type: ignore[method-assign]
    layers = list(model.decoder.layers)
    for layer in layers[layers.index(recursion) + 1 :]:
        if not isinstance(layer, AbsorbedLayer):
            layer.register_forward_pre_hook(_masks_of_all_loops, with_kwargs=True)


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
