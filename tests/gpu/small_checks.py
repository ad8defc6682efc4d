"""Checks that pass, fail, fall short, die and hang, to test what runs checks."""

import os
import time
from typing import Any

from tests.gpu.verdict import SHORTFALL


def adds_up(numbers: list[int], total: int) -> dict[str, Any]:
    assert sum(numbers) == total, f"the sum is {sum(numbers)}"
    return {"sum": float(total)}


def falls_short() -> dict[str, Any]:
    return {"fast": {"ms": 1.5, "GiB": None}, "slow": {"ms": 2.0}, SHORTFALL: "slow: too slow"}


def dies() -> dict[str, Any]:
    os._exit(7)


def hangs() -> dict[str, Any]:
    time.sleep(60)
    return {}
