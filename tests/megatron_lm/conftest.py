"""Runs only where `.ci/setup-megatron-lm` has named Megatron-LM's scripts; else nothing is collected."""

import os
from pathlib import Path

import pytest

SCRIPTS = os.environ.get("MEGATRON_LM_SCRIPTS")
collect_ignore_glob = [] if SCRIPTS else ["test_*.py"]


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The folder of Megatron-LM's scripts."""
    assert SCRIPTS is not None
    return Path(SCRIPTS)


@pytest.fixture(scope="session")
def script(scripts: Path) -> Path:
    """Megatron-LM's pretrain_gpt.py."""
    return scripts / "pretrain_gpt.py"
