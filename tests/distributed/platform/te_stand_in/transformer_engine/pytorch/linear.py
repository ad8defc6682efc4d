"""Linear layers: plain, after a norm, and one a group of rows. One rank only.

Gradients follow Transformer Engine's rule under `fuse_wgrad_accumulation`: they go into the weight's
`main_grad`, added to what is there, or **in its place** where the call said `is_first_microbatch=True`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.norm import normalized
from transformer_engine.signatures import bound


class _FusedProduct(torch.autograd.Function):
    """`x @ w.T`, whose weight gradient goes into `w.main_grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, overwrites: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.overwrites = weight, overwrites
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2).T @ x.flatten(0, -2)
        main_grad = ctx.parameter.main_grad
        main_grad.copy_(grad) if ctx.overwrites else main_grad.add_(grad)
        ctx.parameter.grad_added_to_main_grad = True
        return grads[0] @ weight, torch.zeros_like(weight), None


class _Products(nn.Module):
    """What the linear layers have in common."""

    def _build(self, given: dict[str, Any], names: list[str]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = given["in_features"], given["out_features"]
        self.use_bias, self.return_bias = given["bias"], given["return_bias"]
        self.tp_size = given["tp_size"]
        self.fuse_wgrad_accumulation = given["fuse_wgrad_accumulation"]
        self.save_original_input = False  # Megatron sets it, of layers whose input it discards
        if self.tp_size != 1:
            raise NotImplementedError(f"tp_size={self.tp_size}: the stand-in runs on one rank")
        if given["parallel_mode"] not in (None, "row", "column"):
            raise ValueError(f"parallel_mode={given['parallel_mode']}")
        device, dtype = given["device"], given["params_dtype"]
        for name in names:
            weight = torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
            given["init_method"](weight)
            self.register_parameter(f"weight{name}", nn.Parameter(weight))
            bias = torch.zeros(
                self.out_features if self.use_bias else 0, device=device, dtype=dtype
            )
            if self.use_bias:
                self.register_parameter(f"bias{name}", nn.Parameter(bias))
            else:
                setattr(self, f"bias{name}", bias)

    def _product(self, x: Tensor, name: str, is_first_microbatch: bool | None) -> Tensor:
        weight = getattr(self, f"weight{name}")
        if x.dtype != weight.dtype:
            raise TypeError(f"input {x.dtype} and weight {weight.dtype} differ")
        assert x.shape[-1] == self.in_features, "GEMM not possible"
        FP8GlobalStateManager.check(self, x.shape[:-1].numel(), *weight.shape)
        if self.fuse_wgrad_accumulation:
            return _FusedProduct.apply(x, weight, is_first_microbatch is True)  # type: ignore[return-value]
        return F.linear(x, weight)

    def _finish(self, out: Tensor, bias: Tensor) -> Any:
        if self.return_bias:
            return out, bias
        return out + bias if self.use_bias else out

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


class Linear(_Products):
    weight: nn.Parameter
    bias: Tensor

    @bound("Linear.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        self._build(given, [""])

    @bound("Linear.forward")
    def forward(self, given: dict[str, Any]) -> Any:
        out = self._product(given["inp"], "", given.get("is_first_microbatch"))
        return self._finish(out, self.bias)


class LayerNormLinear(_Products):
    weight: nn.Parameter
    bias: Tensor

    @bound("LayerNormLinear.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        self._build(given, [""])
        self.is_rms = given["normalization"] == "RMSNorm"
        self.eps, self.zero_centered_gamma = given["eps"], given["zero_centered_gamma"]
        fill = 0.0 if self.zero_centered_gamma else 1.0
        self.layer_norm_weight = nn.Parameter(torch.full_like(self.weight[0], fill))
        self.layer_norm_bias = None
        if not self.is_rms:
            self.layer_norm_bias = nn.Parameter(torch.zeros_like(self.layer_norm_weight))

    @bound("LayerNormLinear.forward")
    def forward(self, given: dict[str, Any]) -> Any:
        x = normalized(
            given["inp"],
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            self.is_rms,
            self.zero_centered_gamma,
        )
        return self._finish(self._product(x, "", given.get("is_first_microbatch")), self.bias)


class GroupedLinear(_Products):
    @bound("GroupedLinear.__init__")
    def __init__(self, given: dict[str, Any]) -> None:
        self._build(given, [str(index) for index in range(given["num_gemms"])])
        self.num_gemms = given["num_gemms"]
        # Read where a checkpoint is made of it: nothing is quantized.
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    @bound("GroupedLinear.forward")
    def forward(self, given: dict[str, Any]) -> Any:
        splits = torch.as_tensor(given["m_splits"])
        if splits.shape != (self.num_gemms,):
            raise ValueError(f"m_splits {tuple(splits.shape)} for {self.num_gemms} products")
        inp, first = given["inp"], given.get("is_first_microbatch")
        recipe, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, None
        try:  # a group each is one module's product: checked here, together
            parts = [
                self._product(rows, str(index), first)
                for index, rows in enumerate(inp.split(splits.tolist()))
            ]
        finally:
            FP8GlobalStateManager.recipe = recipe
        for index, count in enumerate(splits.tolist() if recipe is not None else []):
            FP8GlobalStateManager.check((self, index), count, self.in_features)
        if self.use_bias:
            raise NotImplementedError("the stand-in's GroupedLinear has no bias")
        return self._finish(torch.cat(parts), inp.new_zeros(0))

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass

    def _encode_extra_state(self, state: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def _decode_extra_state(self, state: Any) -> None:
        return None
