"""docs/pages/transformer_config.md, made of the table.

    PYTHONPATH=.:integrations:examples python -m tests.distributed.fields.page

writes it anew.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.transformer import TransformerConfig

from tests.distributed.fields.comparison import MOE
from tests.distributed.fields.table import EQUAL, FURTHER, NOT_RUN, REFUSED, WITHOUT_EFFECT, Trial

PAGE = Path(__file__).parents[3] / "docs" / "pages" / "transformer_config.md"

HEAD = """# Every field of TransformerConfig

What each field of Megatron-Core 0.19's `TransformerConfig` does to a recursion. A `GPTModel` with a
recursion of fixed depth (a prelude, two layers × 3 steps, a coda) is compared with Megatron's own eight
layers with the same weights, in one process on a CPU: the loss of each token, and the gradient of every
parameter.

* **equal**: the value changes what plain layers compute, and the recursion computes the same (losses
  within 2e-6, gradients within 1e-5 of the largest of their parameter, where a row does not say more).
* **no effect here**: compared too, and the value does not change what plain layers compute either.
* **refused**: the recursion raises an error that says why; the row quotes it.
* **not run**: one process on a CPU cannot show it; the row says why, or names the test that does.

Other routers than fixed depth choose tokens, which plain layers cannot do, so equality is shown for
fixed depth. The page is generated from `tests/distributed/fields/table.py`: `make test-full` runs every
row, and `make test` checks that no field is missing.

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
    results = ((EQUAL, "equal"), (WITHOUT_EFFECT, "no effect here"), (REFUSED, "refused"))
    for name in field_names():
        if name in NOT_RUN:
            yield f"`{name}`", "", "", "not run", NOT_RUN[name]
        for trials, result in results:
            if name in trials:
                yield _row(name, trials[name], result)
        for also, trial in FURTHER:
            if also == name:
                yield _row(name, trial, "refused" if trial.says else "equal")


def _row(name: str, trial: Trial, result: str) -> tuple[str, ...]:
    said = f"“… {trial.says} …”" if trial.says else trial.note
    return f"`{name}`", f"`{_plain(trial.value)}`", _circumstances(trial), result, said


def _circumstances(trial: Trial) -> str:
    given = [f"`{name}={_plain(value)}`" for name, value in trial.given.items()]
    return ", ".join((["experts"] if trial.base is MOE else []) + given)


def _plain(value: Any) -> str:
    if type(value) is object:
        return "..."
    if callable(value):
        named = getattr(value, "__name__", "")
        return "a function" if named in ("", "<lambda>") else named
    return str(value) if not isinstance(value, str) else repr(value)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
