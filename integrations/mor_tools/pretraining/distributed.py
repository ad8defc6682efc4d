"""The processes of a run: how they connect, agree, and are asked to stop."""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mor_megatron.platform import cpu, on_first_rank
from mor_tools.pretraining import launcher, run_lock
from mor_tools.pretraining.settings import Settings

ERRORS = (OSError, ValueError)
"""Errors caused by settings and files, as opposed to bugs."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals by which a user, torchrun or a cluster asks a process to stop."""


def world_size() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process writes the files and talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_on_machine() -> bool:
    """Whether this process talks to the user when different machines may have different things to
    say.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


@contextlib.contextmanager
def process_groups(settings: Settings) -> Iterator[None]:
    """Connect the processes, and lay them out as the settings say."""
    with connected(settings), model_parallel(settings):
        yield


@contextlib.contextmanager
def connected(settings: Settings) -> Iterator[None]:
    """Connect the processes: by NCCL if there is CUDA, else by gloo on Megatron's CPU platform."""
    if "RANK" not in os.environ:
        raise ValueError(
            "start this script through torchrun, e.g. torchrun --nproc-per-node 1 "
            "-m mor_tools.pretraining; --help lists the settings."
        )
    launcher.follow()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    else:
        cpu.enable()
    # The watch over a run reports before a collective times out, because the timeout's error does
    # not say which rank it waited for.
    timeout = _collective_timeout(settings)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def model_parallel(settings: Settings) -> Iterator[None]:
    """Set up Megatron's process groups as the settings say."""
    parallel = settings.parallel
    timeout = _collective_timeout(settings)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=settings.virtual_stages,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1 if parallel.expert > 1 else None,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _collective_timeout(settings: Settings) -> timedelta:
    return timedelta(seconds=max(1800.0, 2 * settings.training.timeout_seconds))


def seed(settings_seed: int, step: int) -> None:
    """Make every random number of a step a function of the seed and the step.

    No generator state needs to be saved, and a resumed run draws the same numbers as an
    uninterrupted one.
    """
    value = (settings_seed * 1_000_003 + step) % 2**31
    torch.manual_seed(value)
    model_parallel_cuda_manual_seed(value, force_reset_rng=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Keep other runs out of a folder; yields a sentence if the lock was taken over from a dead
    run.

    Raises:
        ValueError: another run uses the folder; raised on every rank.
        OSError: the folder cannot be written; raised on every rank.
    """
    launchers: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(launchers, run_lock.launcher())
    lock = run_lock.RunLock(folder, launchers)
    try:
        yield on_first_rank(lock.acquire)
    finally:
        lock.release()


class Interrupted(KeyboardInterrupt):
    """A process was told to stop (Ctrl-C, SIGTERM) before it took a step."""


def stop_at_once() -> None:
    """Raise `Interrupted` in the main thread upon SIGINT or SIGTERM, until `StopRequest` listens."""

    def stop(number: int, frame: object) -> None:
        # A terminal tells every process, and torchrun tells its own once more.
        ignore_signals()
        raise Interrupted

    for name in _SIGNALS:
        signal.signal(name, stop)


def ignore_signals() -> None:
    """Let nothing interrupt what is left to do before this process ends."""
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_IGN)


class StopRequest:
    """Whether a process was interrupted (Ctrl-C, SIGTERM) or has lost the torchrun that started it.

    It is called only between steps, when all processes can stop together.
    """

    def __init__(self) -> None:
        self.launcher_is_gone = False
        """Whether any rank had lost its torchrun at the last call; the same on every rank."""
        self._received = False
        self._launcher = launcher.Launcher()
        for name in _SIGNALS:
            signal.signal(name, self._receive)
        # `Launcher.is_gone` also reports that the parent has ended; the signal must not interrupt a
        # step.
        signal.signal(launcher.SIGNAL, lambda number, frame: None)

    def __call__(self) -> bool:
        """Whether any rank must stop; the answer is the same on every rank."""
        flags = [float(self._received), float(self._launcher.is_gone)]
        together = torch.tensor(flags, device=device())
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
        was_interrupted, self.launcher_is_gone = map(bool, together.tolist())
        return was_interrupted or self.launcher_is_gone

    def _receive(self, number: int, frame: object) -> None:
        self._received = True
