"""Two torchrun agents on the loopback are two nodes: they train, die and come back as one run."""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import (
    ROOT,
    SMALL,
    TINY,
    assert_same_curves,
    continued,
    history,
    pretrain_on_rank,
    write_text,
)

LAUNCH = ROOT / "examples" / "launch"
LAYOUT = ["parallel.pipeline=2"]
LONGER = ["training.steps=12", "training.checkpoint_every=3"]
DEADLINE = 300.0


@dataclass(frozen=True)
class Node:
    """A launch script at work."""

    process: subprocess.Popen
    log: Path

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def end(self) -> str:
        """Wait until it ended well; what it printed."""
        self.process.wait(DEADLINE)
        assert self.process.returncode == 0, self.printed
        return self.printed

    def kill(self) -> None:
        """SIGKILL for all that runs on the node: the agent, and the processes it started."""
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            for part in [agent, *agent.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    part.kill()
        self.process.wait()


@contextmanager
def started(script: str, settings: list[str], **variables: object) -> Iterator[Node]:
    """A launch script at work, and nothing left of it after the context."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment |= {"PYTHON": sys.executable, "LOCAL_ADDRESS": "127.0.0.1"}
    command = [str(LAUNCH / script), "--config", TINY, *SMALL, *settings]
    with tempfile.TemporaryDirectory() as scratch, Path(scratch, "log").open("w") as log:
        environment["TMPDIR"] = scratch
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        node = Node(process, Path(log.name))
        try:
            yield node
        finally:
            node.kill()


def rank_of(nodes: list[Node], rank: int) -> psutil.Process:
    """The process of a rank of the run."""
    for node in nodes:
        for child in psutil.Process(node.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank):
                    return child
    raise AssertionError(f"no process of rank {rank} runs")


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition: Callable[[], bool], nodes: list[Node]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        for node in nodes:
            assert node.process.poll() is None, node.printed
        time.sleep(0.002)


def steps_noted(folder: Path) -> int:
    file = folder / "history.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def session_of(folder: Path) -> int:
    """Another number for each time that the run is begun or gone on with."""
    return (folder / "history.jsonl").stat().st_ino


@contextmanager
def two_nodes(settings: list[str], **variables: object) -> Iterator[list[Node]]:
    """Two nodes of two processes, the first of which is where they meet."""
    variables |= {"NODES": 2, "PROCESSES": 2}
    # The first takes any free port itself: one that is looked for here may be gone by then.
    with started("nodes.sh", settings, **variables, RENDEZVOUS="127.0.0.1:0") as first:
        wait_until(lambda: bool(_ports_of(first)), [first])
        (port,) = _ports_of(first)
        with started("nodes.sh", settings, **variables, RENDEZVOUS=f"127.0.0.1:{port}") as second:
            yield [first, second]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def on_one_process(pool: WorkerPool, text, tmp_path_factory) -> tuple[Path, Path]:
    """A run that stopped after its first step, and its whole."""
    folder = tmp_path_factory.mktemp("one_process")
    begun, whole = folder / "begun", folder / "whole"
    stop = "training.stop_after=1"
    pool.run(pretrain_on_rank, settings=[*text, *LONGER, f"output={begun}", stop])
    pool.run(pretrain_on_rank, settings=[*text, *LONGER, continued(begun, whole)])
    return begun, whole


@pytest.fixture(scope="module")
def on_two_nodes(text, on_one_process, tmp_path_factory) -> Path:
    """The same run, gone on with on two nodes: TP=1 x PP=2 x DP=2 over four processes."""
    folder = tmp_path_factory.mktemp("two_nodes") / "run"
    settings = [*text, *LONGER, *LAYOUT, continued(on_one_process[0], folder)]
    with started("two_nodes_on_one_machine.sh", settings, PROCESSES=2) as nodes:
        printed = nodes.end()
    assert "resumed at step 1 of 12" in printed
    return folder


@pytest.fixture(scope="module")
def undisturbed(pool: WorkerPool, text, on_one_process, tmp_path_factory) -> Path:
    """The same run, gone on with on two stages."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    output = continued(on_one_process[0], folder)
    pool.run(pretrain_on_rank, 2, settings=[*text, *LONGER, *LAYOUT, output])
    return folder


@pytest.mark.full
def test_two_nodes_train_as_one_process(on_one_process, on_two_nodes):
    assert_same_curves(on_two_nodes, on_one_process[1])


@pytest.mark.full
def test_a_run_whose_rank_is_killed_goes_on_as_if_nothing_had_been(
    text, on_one_process, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    settings = [*text, *LONGER, *LAYOUT, continued(on_one_process[0], folder)]
    with started("nodes.sh", settings, PROCESSES=2) as node:
        wait_until(lambda: steps_noted(folder) >= 5, [node])
        rank_of([node], 1).kill()
        printed = node.end()
    assert any(f"resumed at step {n} of 12" in printed for n in (3, 6, 9)), printed
    assert history(folder) == history(undisturbed)


@pytest.mark.full
def test_five_kills_at_random_steps_leave_no_trace(text, on_one_process, on_two_nodes, tmp_path):
    folder, chance = tmp_path / "run", random.Random(11)
    settings = [*text, *LONGER, *LAYOUT, continued(on_one_process[0], folder)]
    with two_nodes(settings, MAX_RESTARTS=20) as nodes:
        for step in sorted(chance.sample(range(2, 12), 5)):
            wait_until(lambda step=step: steps_noted(folder) >= step, nodes)
            session = session_of(folder)
            rank_of(nodes, chance.randrange(4)).kill()
            wait_until(lambda session=session: session_of(folder) != session, nodes)
        for node in nodes:
            node.end()
    assert history(folder) == history(on_two_nodes)


@pytest.mark.full
def test_a_checkpoint_that_was_being_written_is_not_used(
    text, on_one_process, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    settings = [*text, *LONGER, *LAYOUT, continued(on_one_process[0], folder)]
    unfinished: list[str] = []

    def is_writing() -> bool:
        unfinished[:] = [path.name for path in (folder / "checkpoints").glob(".step_*.partial")]
        return bool(unfinished)

    with started(
        "nodes.sh", [*settings, "training.checkpoint_every=1"], PROCESSES=2, MAX_RESTARTS=9
    ) as node:
        wait_until(lambda: steps_noted(folder) >= 2, [node])
        while not unfinished:  # where it was just published, the next one is killed
            session, ranks = session_of(folder), [rank_of([node], rank) for rank in (0, 1)]
            wait_until(is_writing, [node])
            ranks[1].kill()
            wait_until(lambda ranks=ranks: not any(map(lives, ranks)), [node])
            if not is_writing():
                wait_until(lambda session=session: session_of(folder) != session, [node])
        latest = (folder / "checkpoints" / "latest").read_text()
        assert unfinished == [f".step_{int(latest.removeprefix('step_')) + 1:08d}.partial"]
        printed = node.end()
    assert f"resumed at step {int(latest.removeprefix('step_'))} of 12" in printed
    assert history(folder) == history(undisturbed)


@pytest.mark.full
def test_the_loss_of_the_node_where_all_meet_is_named(text, on_one_process, tmp_path):
    folder = tmp_path / "run"
    settings = [*text, *LONGER, *LAYOUT, continued(on_one_process[0], folder)]
    with two_nodes(settings) as nodes:
        wait_until(lambda: steps_noted(folder) >= 3, nodes)
        nodes[0].kill()
        assert nodes[1].process.wait(DEADLINE) != 0
        assert "where the nodes meet, cannot be reached, or no longer" in nodes[1].printed


@pytest.mark.full
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint(text, on_one_process, tmp_path):
    folder = tmp_path / "run"
    settings = [*text, *LONGER, *LAYOUT, continued(on_one_process[0], folder)]
    with started("nodes.sh", settings, PROCESSES=2) as node:
        wait_until(lambda: steps_noted(folder) >= 2, [node])
        node.process.terminate()
        node.process.wait(DEADLINE)
        assert "stopped after step" in node.printed
    latest = (folder / "checkpoints" / "latest").read_text()
    assert latest == f"step_{steps_noted(folder):08d}"


@pytest.mark.full
def test_without_the_node_that_never_comes_back_a_run_goes_on_in_another_layout(
    pool: WorkerPool, text, on_one_process, tmp_path
):
    (begun, whole), folder = on_one_process, tmp_path / "run"
    settings = [*text, *LONGER, continued(begun, folder)]
    with two_nodes([*settings, *LAYOUT], JOIN_TIMEOUT=20) as nodes:
        wait_until(lambda: steps_noted(folder) >= 5, nodes)
        nodes[1].kill()
        assert nodes[0].process.wait(DEADLINE) != 0
        message = "error: 2 nodes did not come together within JOIN_TIMEOUT=20 seconds."
        assert message in nodes[0].printed
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    printed = pool.run(pretrain_on_rank, 2, settings=[*settings, *layout])[0]
    assert "resumed at step" in printed
    assert_same_curves(folder, whole)


def _ports_of(node: Node) -> set[int]:
    """Where the processes of a node listen."""
    ports = set()
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        ports.add(connection.laddr.port)
    return ports
