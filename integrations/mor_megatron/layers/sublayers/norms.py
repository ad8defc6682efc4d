"""A normalisation for layer specs that needs neither Transformer Engine nor Apex.

Megatron's own fallback, `WrappedTorchNorm`, refuses sequence parallelism, because plain torch
modules do not mark their parameters for the reduction over the tensor-parallel group.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from mor_megatron.platform import has_apex

_NORMALIZATIONS = ("RMSNorm", "LayerNorm")


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `config.normalization` says.

    The input is normalised in fp32 and cast back *before* it is multiplied by the weight, as in
    Hugging Face's Llama. It can be used wherever a spec takes a norm: `input_layernorm`,
    `pre_mlp_layernorm`, `q_layernorm`, `layer_norm`, ... With `config.sequence_parallel`, a rank
    sees only its part of the sequence, so the parameters are marked `sequence_parallel` and
    `finalize_model_grads` sums their gradients. `config.persist_layer_norm` selects among Apex
    kernels and has no effect here.

    Args:
        config: `normalization`, `sequence_parallel` and `params_dtype` are used.
        hidden_size: size of the last dimension.
        eps: added to the variance.

    Raises:
        ValueError: the normalization is unknown, or an option needs the kernels of another library.
    """

    _refused = ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm")

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in _NORMALIZATIONS:
            raise ValueError(
                f"normalization={config.normalization!r} must be one of {_NORMALIZATIONS}."
            )
        for option in self._refused:
            if getattr(config, option):
                raise ValueError(
                    f"{option}=True needs a norm from Transformer Engine or Apex. Set it to False."
                )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        else:
            self.register_parameter("bias", None)
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:  # [..., h] -> [..., h]
        shape = self.weight.shape
        if self.bias is None:
            return F.rms_norm(x.float(), shape, eps=self.eps).type_as(x) * self.weight
        return F.layer_norm(x.float(), shape, eps=self.eps).type_as(x) * self.weight + self.bias


class FusedNorm(Norm):
    """`Norm` in one kernel of NVIDIA's Apex, which multiplies by the weight before casting back.

    With `config.memory_efficient_layer_norm`, the backward pass uses the saved outputs instead of
    the inputs.
    """

    _refused = ("layernorm_zero_centered_gamma",)

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.memory_efficient = config.memory_efficient_layer_norm

    def forward(self, x: Tensor) -> Tensor:  # [..., h] -> [..., h]
        from apex.normalization import fused_layer_norm as apex  # type: ignore[import-not-found]

        shape, rest = self.weight.shape, (self.eps, self.memory_efficient)
        if self.bias is None:
            return apex.mixed_dtype_fused_rms_norm_affine(x, self.weight, shape, *rest)
        return apex.mixed_dtype_fused_layer_norm_affine(x, self.weight, self.bias, shape, *rest)


def local_norm() -> type[Norm]:
    """The norm for layers without Transformer Engine: Apex's on a GPU with Apex installed."""
    return FusedNorm if torch.cuda.is_available() and has_apex() else Norm
