"""Checks whether a run fits into memory, before it allocates any.

Only what cannot be avoided is counted, so a run that is refused could not have run. The rest of its
memory (activations, communication buffers) shows once it starts.
"""

import os

import torch

from mor_tools.pretraining.models.build import parameters, shape
from mor_tools.pretraining.settings import Settings
from mor_tools.pretraining.settings.rules import require

SMALLEST_VOCABULARY = 257
"""Smallest vocabulary of a tokenizer trained here; the size of a given tokenizer is only known
later."""
_BYTES_OF_SAMPLE = 20
"""Memory per sample for the order of the text that Megatron's datasets keep: three numbers."""


def require_room(settings: Settings, vocab_size: int = SMALLEST_VOCABULARY) -> None:
    """Raise ValueError if the model or the order of the text does not fit into memory."""
    parallel, training = settings.parallel, settings.training
    samples = training.global_batch_size * max(training.steps, settings.evaluation.batches)
    machine = _memory_of_machine()
    require(
        samples * _BYTES_OF_SAMPLE <= machine,
        f"training.global_batch_size={training.global_batch_size} with "
        f"training.steps={training.steps} and evaluation.batches={settings.evaluation.batches} "
        f"asks for {samples:.3g} samples. Their order alone takes "
        f"{_shown(samples * _BYTES_OF_SAMPLE)}, but this machine has {_shown(machine)}. Lower one "
        "of these settings.",
    )
    number = parameters(shape(settings, vocab_size))
    least = number * _bytes_of_parameter(settings)
    least //= parallel.tensor * parallel.pipeline * parallel.expert
    own = _memory_of_process(machine)
    require(
        least <= own,
        f"the model has {number:,} parameters. With their gradients and the optimizer's state they "
        f"take {_shown(least)} on each process, which has at most {_shown(own)}. Lower the sizes "
        "under model., or use more processes with parallel.tensor or parallel.pipeline.",
    )


def _bytes_of_parameter(settings: Settings) -> int:
    """Bytes for weight and gradient, and for the optimizer's state unless it is sharded."""
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
