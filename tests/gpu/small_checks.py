"""Checks that pass, fail, die and hang, to test what runs checks."""

import os
import time
from typing import Any


def adds_up(numbers: list[int], total: int) -> dict[str, Any]:
    assert sum(numbers) == total, f"the sum is {sum(numbers)}"
    return {"sum": float(total)}


def dies() -> dict[str, Any]:
    os._exit(7)


def hangs() -> dict[str, Any]:
    time.sleep(60)
    return {}
