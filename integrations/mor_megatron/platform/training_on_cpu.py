"""Megatron-LM's own training scripts on a CPU, with no line of them changed.

    torchrun --nproc-per-node 2 -m mor_megatron.platform.training_on_cpu pretrain_gpt.py --spec ...

runs `pretrain_gpt.py` as `torchrun pretrain_gpt.py` does on GPUs. It is for trying a command line, and
for tests. `ARGUMENTS`, which select gloo and leave out GPU kernels, are appended to the command line, so
that they take precedence over its own flags.

Line numbers refer to megatron-core 0.19.2, whose wheel contains `megatron.training`.
"""

import functools
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from mor_megatron.platform import cpu

ARGUMENTS = (
    "--distributed-backend",
    "gloo",
    "--transformer-impl",
    "local",
    "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--num-workers",
    "0",
)
"""What a command line on a CPU has to end with."""


def enable() -> None:
    """Make `megatron.training` run on the CPU in this process. Calling it again has no effect.

    Raises:
        RuntimeError: CUDA is available, or megatron-core has another version.
    """
    cpu.enable()
    _enable_once()


@functools.cache
def _enable_once() -> None:
    _replace_torch_cuda()
    _rewrite_literals()
    _replace_checks_for_cuda()


def _replace_torch_cuda() -> None:
    for name, stand_in in {
        # Ranks are laid out and seeded where there is a device: initialize.py:270, :447.
        "device_count": lambda: 1,
        # initialize.py:282.
        "set_device": lambda device: None,
        # common_utils.py:504. Devices before version 10 want CUDA_DEVICE_MAX_CONNECTIONS=1.
        "get_device_properties": lambda device=None: SimpleNamespace(major=10, minor=0),
        # training.py:2742.
        "memory_stats": lambda device=None: dict.fromkeys(_MEMORY, 0),
    }.items():
        setattr(torch.cuda, name, stand_in)


_MEMORY = (
    "reserved_bytes.all.current",
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "allocation.all.current",
)


def _rewrite_literals() -> None:
    from megatron.core import rerun_state_machine
    from megatron.training import checkpointing, training
    from megatron.training.models import dist_utils
    from megatron.training.utils import common_utils

    for owner in (
        rerun_state_machine,  # :264, :268
        checkpointing,  # :375
        training,  # times :1131-1137, losses :2613, :2884, flags :3297, :4298-4379, :4588-4653
        dist_utils,  # :181
        common_utils,  # norms :55-60, :222-227
    ):
        cpu.rewrite_literals(owner)


def _replace_checks_for_cuda() -> None:
    from megatron.training import initialize, training

    # initialize.py:64 asserts that there is a device.
    training.initialize_megatron = functools.partial(  # type: ignore[attr-defined]
        initialize.initialize_megatron, allow_no_cuda=True
    )
    # initialize.py:494 compiles the fused kernels that the arguments leave out.
    initialize._warmup_jit_function = lambda tp_size=None: None
    # initialize.py:174 runs make for the index builder of data sets. The wheel contains the built
    # library, but no Makefile, so that make would fail.
    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        initialize._compile_dependencies = lambda: None


def main(arguments: list[str]) -> None:
    """Run the script that `arguments` begins with, as `python script.py ...` would.

    Raises:
        SystemExit: the first argument is not a file.
    """
    if not arguments or not Path(arguments[0]).is_file():
        given = arguments[0] if arguments else "nothing"
        raise SystemExit(
            f"the first argument must be a Python script, such as pretrain_gpt.py, not {given}. Usage: "
            "torchrun -m mor_megatron.platform.training_on_cpu pretrain_gpt.py --its-arguments"
        )
    enable()
    sys.argv[:] = [*arguments, *ARGUMENTS]
    # A script imports what lies beside it: gpt_builders.py, model_provider.py.
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
