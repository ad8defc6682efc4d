"""One run at a time in a folder: who holds it is said, and a run that is over does not hold it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mor_tools.pretraining.run_lock import NAME, Holder, RunLock, launcher
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import pretrain_on_rank, write_text

ELSEWHERE = Holder(
    "elsewhere", "node-7", "node-7/boot", 4242, "17", "2026-01-02 03:04:05 UTC", ("a",)
)


def write_lock(folder: Path, holder: Holder, age: float = 0) -> None:
    (folder / NAME).write_text(json.dumps(asdict(holder)))
    date_back(folder, age)


def date_back(folder: Path, age: float) -> None:
    """Make the last sign of the lock's holder `age` seconds old."""
    then = time.time() - age
    os.utime(folder / NAME, (then, then))


def held_by(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NAME).read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_is_told_who_holds_the_folder_and_how_to_break_it(tmp_path):
    folder = tmp_path / "run"
    first = RunLock(folder)
    assert first.acquire() is None
    with pytest.raises(ValueError, match="is in use by a run on") as caught:
        RunLock(folder, [launcher()]).acquire()
    who = f"a run on {socket.gethostname()} (process {os.getpid()}, since 20"
    assert who in str(caught.value)
    assert "last touched its lock 0 seconds ago" in str(caught.value)
    assert f"remove {folder / NAME} and start again" in str(caught.value)
    first.release()
    assert names(folder) == []
    second = RunLock(folder)
    assert second.acquire() is None
    first.release()  # once more, when it is another's
    assert names(folder) == [NAME]
    second.release()


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from mor_tools.pretraining.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire(); os._exit(1)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    pid = held_by(tmp_path)["pid"]
    lock = RunLock(tmp_path)
    note = lock.acquire()
    assert note is not None
    assert f"(process {pid}, since" in note and "ended without releasing it" in note
    assert held_by(tmp_path)["pid"] == os.getpid()
    assert names(tmp_path) == [NAME]
    lock.release()


def test_a_process_that_was_given_the_same_id_is_not_the_holder(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    write_lock(tmp_path, replace(lock._holder, started="1", token="earlier"))
    later = RunLock(tmp_path)
    assert later.acquire() is not None
    later.release()


def test_a_run_on_another_machine_holds_the_folder_while_it_gives_signs(tmp_path):
    write_lock(tmp_path, ELSEWHERE, age=170)
    with pytest.raises(
        ValueError, match=r"on node-7 \(process 4242, since 2026-01-02 03:04:05 UTC\)"
    ):
        RunLock(tmp_path).acquire()
    assert held_by(tmp_path)["token"] == "elsewhere"
    write_lock(tmp_path, ELSEWHERE, age=190)
    lock = RunLock(tmp_path)
    assert "node-7" in (lock.acquire() or "")
    lock.release()


def test_a_host_and_process_ids_of_another_machine_say_nothing_here(tmp_path):
    """A real process with a host name and a space of process ids of its own, in a shared folder."""
    machine = ["unshare", "--user", "--map-root-user", "--uts", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*machine, "true"], capture_output=True).returncode:
        pytest.skip("needs a system on which unshare can make namespaces")
    program = (
        "import socket, sys, time; from pathlib import Path\n"
        "from mor_tools.pretraining.run_lock import RunLock\n"
        "socket.sethostname('node-9')\n"
        "RunLock(Path(sys.argv[1]), touch_every=0.1).acquire(); print('has it', flush=True)\n"
        "time.sleep(100)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*machine, sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "has it\n"
    holder = held_by(tmp_path)
    assert holder["host"] == "node-9" and holder["pid"] < 10
    date_back(tmp_path, 190)
    wait_until(lambda: time.time() - (tmp_path / NAME).stat().st_mtime < 100)  # its next sign
    with pytest.raises(ValueError, match="in use by a run on node-9"):
        RunLock(tmp_path).acquire()
    within = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    psutil.wait_procs(within)
    with pytest.raises(ValueError, match="in use by a run on node-9"):  # its last sign is fresh
        RunLock(tmp_path).acquire()
    date_back(tmp_path, 190)
    lock = RunLock(tmp_path)
    assert "node-9" in (lock.acquire() or "")
    lock.release()


def test_a_restarted_run_takes_its_folder_at_once_from_another_machine(tmp_path):
    write_lock(tmp_path, ELSEWHERE)
    with pytest.raises(ValueError, match="in use"):
        RunLock(tmp_path, ["b"]).acquire()
    lock = RunLock(tmp_path, ["b", "a"])
    assert lock.acquire() is None
    lock.release()


def test_a_lock_that_cannot_be_read_counts_by_its_age(tmp_path):
    for content in (b"", b"\xff", b"[1]", b'{"token": 1}'):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(ValueError, match="in use by another run, which last touched its lock"):
            RunLock(tmp_path).acquire()
        os.utime(tmp_path / NAME, (1, 1))
        lock = RunLock(tmp_path)
        assert lock.acquire() is None
        lock.release()


def test_of_many_that_find_an_abandoned_lock_one_gets_it(tmp_path):
    for _ in range(10):
        write_lock(tmp_path, ELSEWHERE, age=1000)
        locks, refused = [RunLock(tmp_path, lost=pytest.fail) for _ in range(6)], []

        def take(lock: RunLock, refused: list = refused) -> None:
            try:
                lock.acquire()
            except ValueError:
                refused.append(lock)

        threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 5
        for lock in locks:
            lock.release()
        assert names(tmp_path) == []


def test_a_lock_that_was_taken_in_between_stays(tmp_path, monkeypatch):
    write_lock(tmp_path, ELSEWHERE, age=1000)
    quick, slow = RunLock(tmp_path), RunLock(tmp_path)
    is_held = slow._is_held

    def overtaken(holder, age):
        monkeypatch.setattr(slow, "_is_held", is_held)
        quick.acquire()
        return is_held(holder, age)

    monkeypatch.setattr(slow, "_is_held", overtaken)
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        slow.acquire()
    assert names(tmp_path) == [NAME]
    assert held_by(tmp_path)["token"] == quick._holder.token
    quick.release()


def test_one_process_at_a_time_removes_an_abandoned_lock(tmp_path):
    write_lock(tmp_path, ELSEWHERE, age=1000)
    turn = tmp_path / f".{NAME}.turn"
    turn.touch()  # another process has found the same lock, and is slow
    lock = RunLock(tmp_path)
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and held_by(tmp_path)["token"] == ELSEWHERE.token
    os.utime(turn, (1, 1))  # it has died in the meantime
    thread.join(10)
    assert held_by(tmp_path)["token"] == lock._holder.token
    lock.release()
    assert names(tmp_path) == []


def test_without_hard_links_one_run_gets_the_folder_too(tmp_path, monkeypatch):
    def link(*arguments: object) -> None:
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", link)
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(ValueError, match="in use"):
        RunLock(tmp_path).acquire()
    lock.release()
    assert names(tmp_path) == []


def test_the_holder_gives_signs_and_ends_where_its_lock_is_broken(tmp_path):
    told: list[str] = []
    lock = RunLock(tmp_path, lost=told.append, touch_every=0.01)
    lock.acquire()
    os.utime(tmp_path / NAME, (1, 1))
    wait_until(lambda: (tmp_path / NAME).stat().st_mtime > 1)
    assert not told
    write_lock(tmp_path, ELSEWHERE)
    wait_until(lambda: bool(told))
    assert "replaced by another run's lock" in told[0]
    lock.release()
    assert held_by(tmp_path)["token"] == "elsewhere"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_in_a_folder_in_use_ends_on_all_ranks_before_any_work(pool: WorkerPool, tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    settings = [*write_text(tmp_path), f"output={tmp_path / 'run'}"]
    with pytest.raises(AssertionError, match="in use by") as caught:
        pool.run(pretrain_on_rank, 2, settings=settings)
    assert str(caught.value).count(f"in use by a run on {socket.gethostname()} (process") == 2
    assert names(tmp_path) == ["run", "text.jsonl"]  # no text was prepared
    assert names(tmp_path / "run") == [NAME]
    lock.release()


def test_a_folder_that_cannot_be_written_shows_before_any_work(pool: WorkerPool, tmp_path):
    (tmp_path / "file").write_text("")
    settings = [*write_text(tmp_path), f"output={tmp_path / 'file' / 'run'}"]
    with pytest.raises(AssertionError, match=r"run cannot be written: .*Choose another output="):
        pool.run(pretrain_on_rank, settings=settings)
    assert names(tmp_path) == ["file", "text.jsonl"]


def interrupt_a_run(*, settings: list[str]) -> str:
    """Ctrl-C while the text is prepared; who has the folder at that moment."""
    from mor_tools.pretraining import session

    holders = []

    def interrupted(data: object) -> None:
        (output,) = (Path(s.removeprefix("output=")) for s in settings if s.startswith("output="))
        holders.append((output / NAME).read_text())
        raise KeyboardInterrupt

    prepare, session.prepare = session.prepare, interrupted
    try:
        pretrain_on_rank(settings=settings)
    except KeyboardInterrupt:
        return holders[0]
    finally:
        session.prepare = prepare
    return "it went on"


def test_an_interrupted_run_gives_its_folder_back(pool: WorkerPool, tmp_path):
    settings = [*write_text(tmp_path), f"output={tmp_path / 'run'}"]
    (holder,) = pool.run(interrupt_a_run, settings=settings)
    assert json.loads(holder)["host"] == socket.gethostname()
    assert names(tmp_path / "run") == []
