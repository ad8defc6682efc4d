"""Adam that counts steps once a parameter group."""

from typing import Any

import amp_C
import torch

from apex.multi_tensor_apply import multi_tensor_applier


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        use_master: bool = False,
    ) -> None:
        if amsgrad or capturable or use_master:
            raise NotImplementedError("not in the stand-in")
        self.adam_w_mode, self.set_grad_none = int(adam_w_mode), set_grad_none
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    def step(self, closure: Any = None, **legacy: Any) -> None:  # type: ignore[override]
        if closure is not None or legacy:
            raise RuntimeError("call step() with no arguments")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            lists: list[list[torch.Tensor]] = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(p.data).float()
                for values, value in zip(
                    lists,
                    (p.grad.data, p.data, state["exp_avg"], state["exp_avg_sq"]),
                    strict=True,
                ):
                    values.append(value)
            multi_tensor_applier(
                amp_C.multi_tensor_adam,
                torch.zeros(1, dtype=torch.int),
                lists,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                self.adam_w_mode,
                int(group["bias_correction"]),
                group["weight_decay"],
            )
