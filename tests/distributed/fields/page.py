"""docs/pages/transformer_config.md, made of the table.

    PYTHONPATH=.:integrations:examples python -m tests.distributed.fields.page

writes it anew.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from megatron.core.timers import Timers
from megatron.core.transformer import TransformerConfig

from tests.distributed.fields.comparison import MOE
from tests.distributed.fields.table import (
    DIFFERENT,
    EQUAL,
    EQUAL_TO_ONE_RANK,
    FURTHER,
    REFUSED,
    REJECTED,
    WITHOUT_EFFECT,
)
from tests.distributed.fields.trial import Trial

PAGE = Path(__file__).parents[3] / "docs" / "pages" / "transformer_config.md"

HEAD = """# Every field of TransformerConfig

What each field of Megatron-Core 0.19's `TransformerConfig` does to a recursion. A `GPTModel` with a
recursion of fixed depth (a prelude, two layers × 3 steps, a coda) is compared with Megatron's own eight
layers with the same weights, on CPUs: the loss of each token, and the gradient of every parameter.

* **equal**: the value changes what plain layers compute, or how, and the recursion computes the same
  (losses within 2e-6, gradients within 1e-5 of the largest of their parameter, where a row does not say
  more). A row that names a number of ranks was compared on as many, each with what it holds.
* **no effect here**: on a CPU. Either the value was compared as well and does not change what plain
  layers compute, or Megatron itself rejects the value and the row quotes its error. The row says which
  feature reads the value, and whether `make test-gpu` has a case for it.
* **refused**: the recursion raises an error that says why; the row quotes it.
* **different**: the recursion deliberately does something else, which the row describes.

Other routers than fixed depth choose tokens, which plain layers cannot do, so equality is shown for
fixed depth. The page is made from `tests/distributed/fields`: `make test-full` runs every row, and
`make test` checks that no field is missing.

| field | tried | with | result | |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in _rows())


def field_names() -> list[str]:
    """Fields of the configuration in the order of their definition."""
    return [field.name for field in dataclasses.fields(TransformerConfig)]


def _rows() -> Iterator[tuple[str, ...]]:
    results = (
        (EQUAL, "equal"),
        (WITHOUT_EFFECT, "no effect here"),
        (REJECTED, "no effect here"),
        (REFUSED, "refused"),
    )
    for name in field_names():
        if name in EQUAL_TO_ONE_RANK:
            note = f"N ranks compute what one computes: {EQUAL_TO_ONE_RANK[name]}"
            yield f"`{name}`", "", "", "equal", note
        if name in DIFFERENT:
            yield f"`{name}`", "", "", "different", DIFFERENT[name]
        for trials, result in results:
            if name in trials:
                yield _row(name, trials[name], result)
        for also, trial in FURTHER:
            if also == name:
                yield _row(name, trial, "refused" if trial.says else "equal")


def _row(name: str, trial: Trial, result: str) -> tuple[str, ...]:
    said = f"“… {trial.says} …”" if trial.says else ""
    if REJECTED.get(name) is trial:
        said = f"Megatron rejects it: {said}"
    note = "; ".join(part for part in (said, trial.note) if part)
    return f"`{name}`", f"`{_plain(trial.value)}`", _circumstances(trial), result, note


def _circumstances(trial: Trial) -> str:
    given = [f"`{name}={_plain(value)}`" for name, value in trial.given.items()]
    ranks = [f"{trial.num_ranks} ranks"] if trial.layout else []
    return ", ".join(ranks + (["experts"] if trial.base is MOE else []) + given)


def _plain(value: Any) -> str:
    if type(value) is object:
        return "..."
    if isinstance(value, (Timers, AbstractContextManager)):
        return f"{type(value).__name__}()"
    if isinstance(value, str) and value.startswith(gettempdir()):
        return "a folder"
    if callable(value):
        named = getattr(value, "__name__", "")
        return "a function" if named in ("", "<lambda>") else named
    # A bar would end the cell.
    return str(value) if not isinstance(value, str) else repr(value).replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
