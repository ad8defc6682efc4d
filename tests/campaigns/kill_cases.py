"""Processes that are killed while they write: what was there stays, or what is new is whole.

A fork does the writing, and ends without a word just before one of the operations on files that it
asks the system for; Python announces these to audit hooks. What it still had in its buffers is lost,
as when it is killed.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mor_layers import DecoderConfig, MoRTransformer, load_model, save_model
from mor_tools.pretraining.run_folder import write_atomically

_OPERATIONS = ("open", "os.", "shutil.")
_KILLED = 9


@cache
def _model(seed: int) -> MoRTransformer:
    torch.manual_seed(seed)
    return MoRTransformer(DecoderConfig(16, 8, 8, 2, 2))


def folder_of_a_model(source: random.Random, folder: Path) -> str | None:
    """`save_model` over an earlier model, several times in a row."""
    target, allowed = folder / "model", []
    if source.random() < 0.8:
        save_model(_model(0), target)
        allowed.append(0)
    for seed in range(1, 1 + source.randrange(1, 3)):
        _killed_in(lambda seed=seed: save_model(_model(seed), target), source.randrange(60))
        allowed.append(seed)
    reason = None
    try:
        found = load_model(target).state_dict()
        assert any(_is_same(found, _model(seed).state_dict()) for seed in allowed)
    except FileNotFoundError as error:
        # Between two renames, when the earlier one lies beside it under another name.
        reason = str(error)
        assert 0 not in allowed or (folder / ".model.earlier").is_dir()
    save_model(_model(9), target)  # whatever was left behind is in nobody's way
    assert _is_same(load_model(target).state_dict(), _model(9).state_dict())
    assert sorted(path.name for path in folder.iterdir()) == ["model"]
    return reason


def file_of_a_run(source: random.Random, folder: Path) -> str | None:
    """run.json, history.jsonl, summary.json and report.html are written in one way."""
    path, allowed = folder / "run.json", []
    for number in range(source.randrange(1, 4)):
        content = json.dumps({"number": number, "text": "x" * source.choice([1, 100_000])})
        operation = source.randrange(8)
        was_killed = _killed_in(lambda text=content: write_atomically(path, text), operation)
        allowed = [*allowed, content] if was_killed else [content]
        if path.exists():
            found = path.read_text()
            assert found in allowed
            allowed = [found]
        else:
            assert was_killed
    return None


def _is_same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def _killed_in(work: Callable[[], object], operation: int) -> bool:
    """Whether a fork was killed at that operation on files, or did the work before it came to it."""
    child = os.fork()
    if child == 0:
        left = operation

        def hook(event: str, arguments: object) -> None:
            nonlocal left
            if event.startswith(_OPERATIONS):
                if left == 0:
                    os._exit(_KILLED)
                left -= 1

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _KILLED), "the work itself failed"
    return code == _KILLED
