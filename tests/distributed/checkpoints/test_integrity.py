"""A checkpoint that is not what was written is refused by name, and the good one before it taken."""

import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed import get_rank
from torch.distributed.checkpoint.api import CheckpointException

from mor_megatron.checkpoints import runs
from mor_megatron.checkpoints.dist_files import write_dist_checkpoint
from mor_megatron.checkpoints.integrity import MANIFEST
from mor_megatron.checkpoints.reader import RestrictedReader
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


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip, "__1_0.distcp differs from what was written"),
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
        "no manifest.json and no readable .metadata",
    ),
    "the folder gone": (shutil.rmtree, "the folder does not exist"),
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
        ValueError, match=r"(?s)step_00000012 .*step_00000003 .*There is no valid checkpoint"
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
    assert "GB are free now. The last complete one, step_00000001, is unchanged" in message
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


class Hostile:
    """Writes a file where it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def poison_index(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))


def poison_common_file(folder: Path, marker: Path) -> None:
    torch.save(Hostile(marker), folder / "common.pt")


def poison_common_entry(folder: Path, marker: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    write_dist_checkpoint(folder, {}, [], Hostile(marker))


def reseal(folder: Path) -> None:
    """As the author of a hostile checkpoint would: checksums are no proof of who wrote it."""
    names = [p.name for p in folder.iterdir() if p.name != MANIFEST]
    values = {
        n: [(folder / n).stat().st_size, zlib.crc32((folder / n).read_bytes())] for n in names
    }
    (folder / MANIFEST).write_text(json.dumps(values))


def refuse_what_is_hostile(directory: Path) -> None:
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    for step in (1, 2):
        runs.save(directory / "whole", step, chunks)
    for poison in (poison_index, poison_common_file, poison_common_entry):
        for is_sealed in (True, False):
            hostile = directory / f"{poison.__name__}_{is_sealed}"
            newest, marker = hostile / "step_00000002", directory / "marker"

            def make(hostile=hostile, newest=newest, poison=poison, is_sealed=is_sealed) -> None:
                shutil.copytree(directory / "whole", hostile)
                poison(newest, directory / "marker")
                if is_sealed:
                    reseal(newest)
                else:
                    (newest / MANIFEST).unlink(missing_ok=True)

            on_first_rank(make)
            restored = runs.load(hostile, chunks)
            assert not marker.exists(), poison.__name__
            assert restored.step == 1
            reason = r"mkdir is not part of a checkpoint's|not only plain values"
            assert re.search(reason, restored.refused[0]), restored.refused
            with pytest.raises(ValueError, match=f"step_00000002 is damaged: .*({reason})"):
                runs.load(hostile, chunks, step=2)


def read_hostile_entries(directory: Path) -> None:
    """Megatron reads an entry of one layer on one rank, after all checks of what they share."""
    setup.initialize(tp=2)
    path = directory / f"rank_{get_rank()}"
    path.mkdir()
    write_dist_checkpoint(path, {}, [], Hostile(directory / "marker"))
    request = {"common_state/shard_0_1": io.BytesIO()}
    with pytest.raises(CheckpointException, match="not only plain values"):
        torch.distributed.checkpoint.load(
            request, storage_reader=RestrictedReader(path), no_dist=True
        )
    assert not (directory / "marker").exists()


def say_that_a_manifest_is_missing(directory: Path) -> None:
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    runs.save(directory, 1, chunks)
    assert runs.load(directory, chunks).unsealed is None
    on_first_rank((directory / "step_00000001" / MANIFEST).unlink)
    assert runs.load(directory, chunks).unsealed == directory / "step_00000001"


def take_the_newest_one_that_is_whole(directory: Path) -> None:
    """A save was killed between the rename and the pointer; or something else lies there."""
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    for step in (3, 12):
        runs.save(directory, step, chunks)
    on_first_rank(lambda: (directory / "latest").write_text("step_00000003"))
    assert runs.latest_step(directory) == 12
    assert runs.load(directory, chunks).step == 12
    on_first_rank(lambda: (directory / "latest").write_bytes(b"step_\xff\xfe"))
    assert runs.load(directory, chunks).step == 12
    # Newer than the pointer, and nothing says that it is complete.
    on_first_rank(lambda: (directory / "latest").write_text("step_00000003"))
    on_first_rank((directory / "step_00000012" / MANIFEST).unlink)
    assert runs.load(directory, chunks).step == 3


def put_a_killed_save_in_order(directory: Path) -> None:
    setup.initialize(tp=2)
    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=1)))
    for step in (3, 12):
        runs.save(directory, step, chunks)

    def kill_a_save() -> None:
        (directory / "step_00000012").rename(directory / ".step_00000012.replaced")
        (directory / ".step_00000012.partial").mkdir()
        (directory / ".step_00000003.replaced").mkdir()
        (directory / ".step_mine").mkdir()
        done = runs.put_in_order(directory)
        assert [text.split(" ")[0].rpartition("/")[2] for text in done] == [
            ".step_00000003.replaced",
            ".step_00000012.partial",
            "step_00000012",
        ]
        assert runs.put_in_order(directory) == ()

    on_first_rank(kill_a_save)
    names = [".step_mine", "latest", "step_00000003", "step_00000012"]
    assert sorted(path.name for path in directory.iterdir()) == names
    assert runs.load(directory, chunks).step == 12
    on_first_rank((directory / ".step_00000013.partial").mkdir)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runs.save(directory, 13, chunks)
    found = [str(w.message) for w in told if "another save was killed" in str(w.message)]
    assert len(found) == (1 if get_rank() == 0 else 0)


@pytest.mark.parametrize(
    "function",
    [
        refuse_what_is_damaged,
        take_what_is_whole,
        run_out_of_disk,
        run_out_of_disk_at_the_index,
        refuse_what_is_hostile,
        read_hostile_entries,
        say_that_a_manifest_is_missing,
        take_the_newest_one_that_is_whole,
        put_a_killed_save_in_order,
    ],
)
def test_checkpoints_on_two_ranks(
    pool: WorkerPool, tmp_path: Path, function: Callable[[Path], None]
) -> None:
    pool.run(function, 2, directory=tmp_path)
