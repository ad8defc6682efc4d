"""Compares a model that is divided over tensor-parallel ranks with the whole one; runs on each rank."""

from copy import deepcopy

import torch
from torch import Tensor
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mor_layers import DecoderConfig, MoRTransformer
from mor_titan.tensor_parallel import divide


def compare(config: DecoderConfig, recompute: bool = False) -> dict[str, Tensor]:
    """Assert that loss, logits and gradients of the divided model are those of the whole one.

    Args:
        recompute: whether the divided model recomputes its layers.

    Returns:
        This rank's own gradients of the parameters that are whole on every rank.
    """
    torch.manual_seed(0)
    whole = MoRTransformer(config)
    with torch.no_grad():
        for parameter in whole.parameters():  # some begin at 0 and would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    parts = deepcopy(whole)
    for recursion in parts.recursions:
        recursion.recompute = recompute
    divide(parts, init_device_mesh("cpu", (get_world_size(),), mesh_dim_names=("tp",)))
    expected = _run(whole)
    found = _run(parts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    named, own = dict(whole.named_parameters()), {}
    for name, parameter in parts.named_parameters():
        assert isinstance(parameter, DTensor)
        wanted = named[name].grad
        if wanted is None:
            assert parameter.grad is None, name
            continue
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(
            parameter.grad.full_tensor(),
            wanted,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        if parameter.placements[0].is_replicate() and parameter.grad.placements[0].is_replicate():
            own[name] = parameter.grad.to_local()
    return own


def _run(model: MoRTransformer) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (2, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    output = model(ids, labels=ids.roll(-1, 1), documents=documents)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach()
