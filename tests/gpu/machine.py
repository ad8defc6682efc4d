"""What a machine has of what the cases need."""

from dataclasses import dataclass
from typing import get_args

import torch

from mor_megatron.platform import has_transformer_engine
from mor_megatron.platform.apex import installed_apex
from tests.gpu.verdict import Need


@dataclass(frozen=True)
class Machine:
    """Where cases run."""

    gpus: int
    description: str
    has: frozenset[Need]
    missing: dict[Need, str]
    """Why a need is not met."""
    is_rehearsal: bool = False
    """Cases run on CPUs, with stand-ins for Transformer Engine and apex."""


def this_machine() -> Machine:
    """Looks for GPUs, Transformer Engine, the recipes it can run here, and apex."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing: dict[Need, str] = {}
    if gpus == 0:
        return Machine(0, "no GPU", frozenset(), {})
    if not has_transformer_engine():
        missing |= dict.fromkeys(
            ("transformer_engine", "fp8", "mxfp8"), "Transformer Engine is not installed"
        )
    else:
        from transformer_engine.pytorch import is_fp8_available, is_mxfp8_available  # type: ignore[import-not-found]

        for need, is_there in (("fp8", is_fp8_available()), ("mxfp8", is_mxfp8_available())):
            if not is_there:
                missing[need] = f"{torch.cuda.get_device_name()} has no {need.upper()} kernels"
    if installed_apex() != "nvidia":
        missing["apex"] = f"NVIDIA's apex: {installed_apex()}"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(gpus))
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    found = frozenset(need for need in get_args(Need) if need not in missing)
    return Machine(gpus, f"{gpus} x {names}; {software}", found, missing)


def rehearsal(ranks: int = 2) -> Machine:
    """CPUs in the place of GPUs."""
    what = "a rehearsal on CPUs with stand-ins: nothing of this ran on a GPU"
    return Machine(ranks, what, frozenset(get_args(Need)), {}, is_rehearsal=True)
