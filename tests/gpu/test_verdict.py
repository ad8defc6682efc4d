"""What runs `make test-gpu`, tested without a GPU: choice of cases, their fates, the verdict."""

import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.distributed.pool import WorkerPool
from tests.gpu import __main__ as command
from tests.gpu.cases import CASES
from tests.gpu.machine import Machine, rehearsal
from tests.gpu.runner import run_cases
from tests.gpu.small_checks import adds_up, dies, falls_short, hangs
from tests.gpu.verdict import FAILED, INCOMPLETE, NO_GPU, PASSED, Case, Verdict, chosen, exit_code

GOOD = Case("good", "sums", adds_up, {"numbers": [1, 2], "total": 3})
BAD = Case("bad", "sums", adds_up, {"numbers": [1, 2], "total": 4})
SHORT = Case("short", "speed", falls_short)
DIES = Case("dies", "a crash", dies)
HANGS = Case("hangs", "a hang", hangs)
LARGE = Case("large", "three ranks", adds_up, {"numbers": [], "total": 0}, gpus=3)
ENGINE = Case("engine", "Transformer Engine", adds_up, needs=("transformer_engine",))


@pytest.fixture
def on_cpus(monkeypatch: Any) -> None:
    """CPUs in the place of two GPUs, on which there is no Transformer Engine."""
    machine = Machine(
        2, "two CPUs", frozenset(), {"transformer_engine": "not installed"}, is_rehearsal=True
    )
    monkeypatch.setattr(command, "this_machine", lambda: machine)


def test_every_case_has_a_verdict_whatever_becomes_of_it(
    on_cpus: None, capsys: Any, tmp_path: Path
) -> None:
    cases = [GOOD, BAD, DIES, LARGE, ENGINE, SHORT, Case("again", "sums", adds_up, GOOD.arguments)]
    report = tmp_path / "report.json"
    assert command.main(["--report", str(report)], cases) == FAILED
    shown = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert [entry["outcome"] for entry in found["cases"]] == [
        "passed",
        "failed",
        "failed",
        "not available",
        "not available",
        "failed",
        "passed",
    ]
    details = [entry["detail"] for entry in found["cases"]]
    assert details[0] == "sum 3"
    assert "the sum is 3" in details[1]
    assert "exit code 7" in details[2]
    assert details[3:5] == ["needs 3 GPUs, there are 2", "not installed"]
    assert details[5].splitlines() == ["slow: too slow", "fast: ms 1.5", "slow: ms 2"]
    assert found["cases"][5]["figures"] == {"fast": {"ms": 1.5, "GiB": None}, "slow": {"ms": 2.0}}
    assert "2 passed, 3 failed, 2 not available" in shown


def test_no_case_begins_after_the_time_that_there_is() -> None:
    with_no_process = cast(WorkerPool, None)
    (verdict,) = run_cases([GOOD], rehearsal(), with_no_process, lambda verdict: None, within=-1.0)
    assert (verdict.outcome, verdict.detail) == ("not available", "-1 s had passed")


@pytest.mark.full
def test_a_hanging_case_fails_in_time(on_cpus: None, capsys: Any) -> None:
    begin = time.monotonic()
    assert command.main(["--timeout", "3"], [HANGS]) == FAILED
    assert time.monotonic() - begin < 50
    assert "hangs" in capsys.readouterr().out


def test_the_exit_code_says_whether_all_could_run() -> None:
    passed, failed, absent = (Verdict(o, o, 0.0, "") for o in ("passed", "failed", "not available"))
    assert exit_code([passed, passed]) == PASSED
    assert exit_code([passed, absent]) == INCOMPLETE
    assert exit_code([absent, failed, passed]) == FAILED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(capsys: Any) -> None:
    assert command.main([]) == NO_GPU
    assert "There is no GPU" in capsys.readouterr().out


def test_a_pattern_that_matches_nothing_is_an_error(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--only", "engine/fp16*"])
    assert "no case is named 'engine/fp16*'" in capsys.readouterr().err


def test_cases_are_listed_with_what_they_need(capsys: Any) -> None:
    assert command.main(["--list", "--only", "layout/tp", "engine/fp8/mxfp8"]) == 0
    shown = capsys.readouterr().out
    assert "layout/tp: two ranks over NCCL" in shown
    assert "(2 GPUs)" in shown
    assert "(1 GPU, transformer_engine, mxfp8)" in shown


def test_names_of_cases_differ() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(chosen(CASES, ["layout/*"])) == 6


@pytest.mark.full
def test_all_cases_pass_a_rehearsal(capsys: Any) -> None:
    assert command.main(["--rehearse"]) == PASSED, capsys.readouterr().out


def test_some_cases_pass_a_rehearsal(stand_in_pool: WorkerPool) -> None:
    patterns = ["core/expert", "engine/signatures", "engine/fp8/mxfp8", "host waits", "apex/norms"]
    verdicts = run_cases(chosen(CASES, patterns), rehearsal(1), stand_in_pool, lambda verdict: None)
    assert [v.outcome for v in verdicts] == ["passed"] * 5, verdicts
