"""Whether a run has room, before it takes any.

Counted is only what cannot be avoided, so that what is refused could not have run. What a run needs
besides (activations, buffers of communication) shows when it starts.
"""

import os

import torch

from mor_tools.pretraining.models.build import parameters, shape
from mor_tools.pretraining.settings import Settings
from mor_tools.pretraining.settings.rules import require

SMALLEST_VOCABULARY = 257
"""Tokens that every tokenizer trained here has; how many one has that is given shows later."""
_BYTES_OF_SAMPLE = 20
"""Of the order of the text that Megatron's datasets keep in memory: three numbers a sample."""


def require_room(settings: Settings, vocab_size: int = SMALLEST_VOCABULARY) -> None:
    """Raise ValueError where the model or the order of the text cannot be held in memory."""
    parallel, training = settings.parallel, settings.training
    samples = training.global_batch_size * max(training.steps, settings.evaluation.batches)
    machine = _memory_of_machine()
    require(
        samples * _BYTES_OF_SAMPLE <= machine,
        f"training.global_batch_size={training.global_batch_size} with training.steps="
        f"{training.steps} and evaluation.batches={settings.evaluation.batches} asks for "
        f"{samples:.3g} samples, whose order alone takes {_shown(samples * _BYTES_OF_SAMPLE)}; this "
        f"machine has {_shown(machine)}. Use fewer.",
    )
    number = parameters(shape(settings, vocab_size))
    least = number * _bytes_of_parameter(settings)
    least //= parallel.tensor * parallel.pipeline * parallel.expert
    own = _memory_of_process(machine)
    require(
        least <= own,
        f"the model has {number:,} parameters. With their gradients and the optimizer's state they "
        f"take {_shown(least)} on each process, which has {_shown(own)} at most. Lower the sizes "
        "under model., or use more processes with parallel.tensor or parallel.pipeline.",
    )


def _bytes_of_parameter(settings: Settings) -> int:
    """Of weight and gradient, and, where it is not spread, of the optimizer's state."""
    is_half = settings.training.precision == "bf16"
    held, optimizer = (2 + 4, 4 + 8) if is_half else (4 + 4, 8)
    return held if settings.parallel.distributed_optimizer else held + optimizer


def _memory_of_machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_of_process(machine: int) -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _shown(number: int) -> str:
    return f"{number / 1e9:,.1f} GB"
