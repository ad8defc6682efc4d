"""Names for the parts of a recursion in the traces of a profiler.

`torch.profiler.profile` shows them as ranges of their own, above the operations that run in them. With
`torch.autograd.profiler.emit_nvtx` they are NVTX ranges, which Nsight Systems shows. While nobody
profiles, a name costs less than a microsecond: `record_function` alone would cost ten.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch.autograd import profiler
from torch.profiler import record_function


def named_range(name: str) -> AbstractContextManager[object]:
    """A context whose operations stand under `name` in a trace, if a profiler runs."""
    # A compiled graph has no place for ranges; asking for the profiler would break it in two.
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return nullcontext()
    return record_function(name)


def named[**P, R](name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: each call of the function is a `named_range`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with named_range(name):
                return function(*args, **kwargs)

        return run

    return decorate
