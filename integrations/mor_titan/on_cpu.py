"""torchtitan's trainer on CPU processes with gloo, for development and tests.

    torchrun --nproc-per-node 2 -m mor_titan.on_cpu --module mor_titan --config mor_debugmodel ...

torchtitan 0.3 has no CPU path: where no accelerator is found, it takes CUDA. `enable()` names the CPU
before other modules of torchtitan import the device from `torchtitan.tools.utils`.
"""

from types import SimpleNamespace

import torch


def enable() -> None:
    """Make torchtitan run on the CPU in this process. Call it before any other of its imports.

    Raises:
        RuntimeError: CUDA is available.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "on_cpu.enable() was called although CUDA is available. It is only for machines without a "
            "GPU. Remove the call, or hide the GPUs by setting CUDA_VISIBLE_DEVICES to nothing."
        )
    from torchtitan.tools import utils

    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        set_device=lambda device: None,
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=1),
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
        memory_stats=lambda device=None: {},
        synchronize=lambda device=None: None,
    )
    utils.get_local_device = lambda: torch.device("cpu")


def main() -> None:
    """Train as `python -m torchtitan.train` does."""
    enable()
    from torchtitan.train import main as train

    train()


if __name__ == "__main__":
    main()
