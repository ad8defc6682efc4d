"""Base classes for modules: buffers that keep their dtype, and parameters that are read by a call."""

from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """A module whose buffers keep their dtype when it is cast.

    Such buffers (biases, thresholds) change in small steps that bf16 would round away.
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

    Frameworks hook the call of a module to prepare its parameters, for example to wait until the
    optimizer has gathered them. Reading a parameter without a call would bypass these hooks.
    """

    __call__ = nn.Module.__call__

    def forward(self, index: int) -> Tensor:
        return self[index]
