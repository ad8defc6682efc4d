"""A checkpoint that is not what was written is refused by name, and the good one before it taken."""

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed import get_rank

from mor_megatron.checkpoints import runs
from mor_megatron.checkpoints.integrity import MANIFEST
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool


def shard(folder: Path) -> Path:
    return folder / "__1_0.distcp"


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[len(data) // 2] ^= 1
    shard(folder).write_bytes(data)


def cut(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def unsealed(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        spoil(folder)

    return run


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip, "__1_0.distcp has other contents than were written"),
    "a shard cut short": (cut, "__1_0.distcp has "),
    "a missing shard": (lambda f: shard(f).unlink(), "__1_0.distcp is missing"),
    "no index": (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
    "a damaged manifest": (lambda f: (f / MANIFEST).write_text('{"a"'), "manifest.json is damaged"),
    "cut short, no manifest": (unsealed(cut), "__1_0.distcp has "),
    "a shard and the manifest missing": (
        unsealed(lambda f: shard(f).unlink()),
        "__1_0.distcp is missing",
    ),
    "nothing but a shard": (
        unsealed(lambda f: (f / ".metadata").write_bytes(b"?")),
        "no manifest.json, and no readable .metadata",
    ),
    "the folder gone": (shutil.rmtree, "it is not there"),
}


def on_first_rank(action: Callable[[], object]) -> None:
    if get_rank() == 0:
        action()
    torch.distributed.barrier()


def refuse_what_is_damaged(directory: Path) -> None:
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    weight = next(chunks[0].parameters())
    for step in (1, 2):
        weight.data.fill_(step)
        runs.save(directory / "whole", step, chunks)
    for name, (spoil, expected) in DAMAGE.items():
        damaged = directory / name.replace(" ", "_").replace(",", "")
        newest = damaged / "step_00000002"

        def make(damaged: Path = damaged, newest: Path = newest, spoil=spoil) -> None:
            shutil.copytree(directory / "whole", damaged)
            spoil(newest)

        on_first_rank(make)
        weight.data.fill_(0)
        restored = runs.load(damaged, chunks)
        assert restored.step == 1, name
        assert weight.eq(1).all()
        (refused,) = restored.refused
        assert refused.startswith(f"{newest} is damaged: ") and expected in refused, refused
        if newest.exists():
            with pytest.raises(ValueError, match="step_00000002 is damaged") as caught:
                runs.load(damaged, chunks, step=2)
            assert expected in str(caught.value)
        runs.save(damaged, 2, chunks)  # puts a good one in its place
        assert runs.load(damaged, chunks).refused == ()


def take_what_is_whole(directory: Path) -> None:
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    for step in (3, 12):
        runs.save(directory, step, chunks)
    files = json.loads((directory / "step_00000012" / MANIFEST).read_text())
    assert {".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"} <= set(files)
    for written in ("", "step_", "none"):  # a pointer that a crash left behind
        on_first_rank(lambda written=written: (directory / "latest").write_text(written))
        assert runs.latest_step(directory) == 12
        assert runs.load(directory, chunks).step == 12
        torch.distributed.barrier()
    on_first_rank((directory / "step_00000012" / MANIFEST).unlink)  # as other programs write them
    assert runs.load(directory, chunks).step == 12
    on_first_rank(lambda: [shard(folder).unlink() for folder in directory.glob("step_*")])
    with pytest.raises(
        ValueError, match=r"(?s)step_00000012 .*step_00000003 .*No checkpoint is left"
    ):
        runs.load(directory, chunks)


def run_out_of_disk(directory: Path) -> None:
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    runs.save(directory, 1, chunks)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="step_00000002 could not be written into") as caught:
            runs.save(directory, 2, chunks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert "rank 1: " in message and "File too large" in message
    assert "GB are free now. The last good one, step_00000001, is as it was" in message
    assert_only_the_first_is_there(directory, chunks)


def run_out_of_disk_at_the_index(directory: Path) -> None:
    """The first rank alone writes it, and the others wait for it in a collective."""
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    runs.save(directory, 1, chunks)
    writer = filesystem_async.FileSystemWriterAsync
    finish = writer.finish

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.finish = full
    try:
        with pytest.raises(OSError, match=r"rank 0: .*No space left on device"):
            runs.save(directory, 2, chunks)
    finally:
        writer.finish = finish
    assert_only_the_first_is_there(directory, chunks)


def assert_only_the_first_is_there(directory: Path, chunks: list) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000001"]
    assert runs.load(directory, chunks).refused == ()
    assert runs.latest_step(directory) == 1


@pytest.mark.parametrize(
    "function",
    [refuse_what_is_damaged, take_what_is_whole, run_out_of_disk, run_out_of_disk_at_the_index],
)
def test_checkpoints_on_two_ranks(
    pool: WorkerPool, tmp_path: Path, function: Callable[[Path], None]
) -> None:
    pool.run(function, 2, directory=tmp_path)
