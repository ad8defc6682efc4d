"""Several pytest processes have one verdict, whatever becomes of each."""

from pathlib import Path

import pytest

from tests.side_by_side import closing_line, counts_of, run

FILES = {
    "good": "def test_one(): print('=== not a report')\ndef test_two(): pass",
    "bad": "def test_one(): assert 'red' == 'blue'",
    "dead": "import os\ndef test_one(): os._exit(0)",
    "empty": "",
}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch) -> None:
    """No plugins, which take a second to load."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def verdict(folder: Path, names: list[str], *options: str) -> int:
    parts = {}
    for name in names:
        file = folder / f"test_{name}.py"
        file.write_text(FILES[name])
        parts[name] = (str(file),)
    return run(parts, options)


def test_failures_and_deaths_of_any_process_are_in_the_verdict(tmp_path, capfd):
    assert verdict(tmp_path, ["good", "bad", "dead"]) == pytest.ExitCode.TESTS_FAILED
    lines = capfd.readouterr().out.splitlines()
    counts = {"failed": 1, "passed": 2, "errors": 1}
    assert counts_of(lines[-1]) == counts
    assert lines[-1] == closing_line(counts, float(lines[-1].split()[-1].removesuffix("s")))
    assert any(line.startswith("E ") and "red" in line for line in lines)
    assert "--- dead: pytest ended without a closing line" in lines
    progress = [line for line in lines if "|" in line]
    assert sorted(line.split()[0] for line in progress)[-2:] == ["bad", "good"]


def test_a_process_without_tests_is_a_failure_unless_options_chose(tmp_path, capfd):
    assert verdict(tmp_path, ["good", "empty"]) == pytest.ExitCode.NO_TESTS_COLLECTED
    assert counts_of(capfd.readouterr().out.splitlines()[-1]) == {"passed": 2, "errors": 1}
    assert verdict(tmp_path, ["good", "bad"], "-k", "two") == pytest.ExitCode.OK
    assert verdict(tmp_path, ["good"], "-k", "three") == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("2595 passed, 1 warning in 1560.12s (0:26:00)", {"passed": 2595, "warnings": 1}),
        ("==== 1 failed, 2 errors in 0.10s ====", {"failed": 1, "errors": 2}),
        ("no tests ran in 0.01s", {}),
    ],
)
def test_closing_lines_of_pytest_are_understood(line, counts):
    assert counts_of(line) == counts
