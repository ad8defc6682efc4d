"""Mix-ins for modules: buffers that keep their precision, parameters that are read by a call."""

from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """A module whose buffers keep their dtype when it is cast.

    Buffers steer a choice by small steps that bf16 would round away.
    """

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class CalledParameters(nn.ParameterList):
    """Parameters that are read by a call, `parameters(i)`.

    What must happen before a module's parameters are used, such as waiting for those that an
    optimizer gathers meanwhile, hangs on calls of the module that holds them.
    """

    __call__ = nn.Module.__call__

    def forward(self, index: int) -> Tensor:
        return self[index]
