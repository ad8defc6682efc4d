"""Pretrain a model on this machine, or resume its run, with Megatron-Core.

    mor pretrain --processes 2 --config examples/configs/tiny.yaml training.steps=200

Settings are checked first. Then torchrun starts the processes, each of which runs
`mor_tools.pretraining`. To use several machines, see `examples/launch`.
"""

import argparse
import sys
from importlib.util import find_spec

import torch

from mor_tools.pretraining import torchrun
from mor_tools.pretraining.command_line import load_settings, schema

_PACKAGES = ("megatron", "numpy", "psutil", "rich", "matplotlib", "tensorboard", "tokenizers")
"""What the processes import, beside what this library always needs."""


def run(options: argparse.Namespace) -> None:
    """Pretrain; exits with torchrun's status where the run failed or was stopped.

    Raises:
        ValueError: a setting is wrong, or the processes do not fit the settings.
        OSError: there is no such configuration file.
        ModuleNotFoundError: a package that the processes need is not installed.
    """
    if options.list_settings:
        print(schema())
        return
    config = [] if options.config is None else ["--config", str(options.config)]
    arguments = [*config, *options.settings]
    processes = options.processes
    if processes is None:
        processes = torch.cuda.device_count() or 1
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1.")
    load_settings(arguments).data_parallel_size(processes)
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
    if sys.stderr.isatty():  # loading Megatron-Core takes seconds, in which nothing else is shown
        print(f"starting {processes} process{'es' * (processes > 1)} ...", file=sys.stderr)
    start = ["--standalone", "--nproc-per-node", str(processes)]
    torchrun.main([*start, "-m", "mor_tools.pretraining", *arguments])
