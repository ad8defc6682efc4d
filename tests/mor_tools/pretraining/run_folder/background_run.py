"""A run on one process that may fork, as the pool's workers may not: its checkpoints need it to.

    python -m tests.mor_tools.pretraining.run_folder.background_run FOLDER KILLED_AT key=value ...

During the save of step KILLED_AT, which then takes a minute, it notes its children in FOLDER/children
and is killed. 0: it is not.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from mor_megatron.checkpoints.background import BackgroundSaves
from tests.mor_tools.pretraining.runs import pretrain_on_rank


def kill_during(step: int, folder: Path) -> None:
    """Let this process be killed once it has begun to save a step."""
    begin, write = BackgroundSaves.begin, FileSystemWriterAsync.write_preloaded_data_multithread

    def slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(60)
        write(*arguments, **options)

    def begin_and_die(self: BackgroundSaves, directory: Path, saved: int, *state: Any) -> None:
        if saved == step:
            FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(slowly)
        begin(self, directory, saved, *state)
        if saved == step:
            children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
            (folder / "children").write_text("\n".join(children))
            os.kill(os.getpid(), signal.SIGKILL)

    BackgroundSaves.begin = begin_and_die  # type: ignore[assignment,method-assign]


def main(folder: Path, killed_at: int, settings: list[str]) -> None:
    """Train, and print what the run prints."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous_{os.getpid()}"
    torch.distributed.init_process_group("gloo", address, rank=0, world_size=1)
    if killed_at:
        kill_during(killed_at, folder)
    print(pretrain_on_rank(settings=settings))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
