"""A normalisation for layer specs that needs neither Transformer Engine nor Apex.

Megatron's own fallback, `WrappedTorchNorm`, refuses sequence parallelism, because plain torch
modules do not mark their parameters for the reduction over the tensor-parallel group.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

_NORMALIZATIONS = ("RMSNorm", "LayerNorm")


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `config.normalization` says.

    The input is normalised in fp32 and cast back *before* the weight is applied, as in Hugging
    Face's Llama. Usable wherever a spec takes a norm: `input_layernorm`, `pre_mlp_layernorm`,
    `q_layernorm`, `layer_norm`, ... With `config.sequence_parallel` a rank sees a part of the
    sequence, so the parameters are marked `sequence_parallel` and `finalize_model_grads` sums their
    gradients. `config.persist_layer_norm` chooses between kernels of Apex and means nothing here.

    Args:
        config: gives `normalization` and `sequence_parallel`.
        hidden_size: size of the last dimension.
        eps: added to the variance.

    Raises:
        ValueError: for another normalization, or an option that needs other kernels.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in _NORMALIZATIONS:
            raise ValueError(
                f"normalization={config.normalization!r} is not one of {_NORMALIZATIONS}"
            )
        for option in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, option):
                raise ValueError(
                    f"{option}=True needs a norm of Transformer Engine or Apex. Set it to False."
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
