"""The worker pool of distributed tests, how hypothesis looks for counterexamples, and the options and
summary of tests/test_reference.py."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.distributed.pool import WorkerPool

# Without a GPU, Triton's kernels run in its interpreter. It has to know before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples hold whole models: on a machine with other work, drawing them may take as long as it likes.
settings.register_profile(
    "core",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("core")

BACKENDS = ("core", "megatron")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reference cases")
    group.addoption(
        "--reference-dir",
        type=Path,
        default=Path(__file__).parent / "reference",
        metavar="DIR",
        help="folder of NAME.json + NAME.safetensors to compare with (default: tests/reference)",
    )
    group.addoption(
        "--backend",
        choices=("all", *BACKENDS),
        default="all",
        help="run the reference cases through this backend only (default: all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backend(name): runs reference cases through this backend")
    config.addinivalue_line("markers", "daily(*names): the other reference cases are marked `full`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "reference_case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--reference-dir")
    paths = [p for p in sorted(folder.glob("*.json")) if p.with_suffix(".safetensors").exists()]
    if not paths:
        raise pytest.UsageError(
            f"--reference-dir {folder} holds no reference case. Name a folder of NAME.json + "
            "NAME.safetensors, such as tests/reference."
        )
    daily = metafunc.definition.get_closest_marker("daily")
    cases = [
        pytest.param(
            path,
            id=path.stem,
            marks=() if daily is None or path.stem in daily.args else pytest.mark.full,
        )
        for path in paths
    ]
    metafunc.parametrize("reference_case", cases, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--backend")
    if chosen == "all":
        return
    backends = [item.get_closest_marker("backend") for item in items]
    left_out = [
        item
        for item, mark in zip(items, backends, strict=True)
        if mark is not None and mark.args[0] != chosen
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Long-lived processes that every distributed test shares."""
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def stand_in_pool() -> Iterator[WorkerPool]:
    """The same, in which stand-ins take the places of Transformer Engine and NVIDIA's apex."""
    folder = Path(__file__).parent / "distributed" / "platform"
    workers = WorkerPool(1, search_first=[folder / "te_stand_in", folder / "apex_stand_in"])
    yield workers
    workers.close()


@pytest.fixture
def reference_case(request: pytest.FixtureRequest):
    """Settings and tensors of one run of the published implementation."""
    from tests.reference_cases import load_case

    return load_case(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        tuple(value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == "reference_difference"
    ]
    if not rows:
        return
    terminalreporter.section("largest difference from the published implementation")
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for case, backend, difference, where in sorted(set(rows)):
        terminalreporter.write_line(
            f"{case:{widths[0]}}  {backend:{widths[1]}}  {difference:8.1e}  {where}"
        )
