"""Kernels over lists of tensors."""

import torch
from torch import Tensor

Lists = list[list[Tensor]]


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Lists, per_tensor: bool
) -> tuple[Tensor, None]:
    return torch.stack([x.float().norm() for x in lists[0]]).norm().view(1), None


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: Lists, lr: float, beta1: float, beta2: float, eps: float,
    step: int, adam_w_mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    assert adam_w_mode == 1, "Megatron asks for decoupled weight decay"
    assert bias_correction == 1
    for grad, value, mean, square in zip(*lists, strict=True):
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        value.sub_(lr * (update + weight_decay * value))
