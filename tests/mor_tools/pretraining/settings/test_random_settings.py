"""Any settings of the script at all: refused before anything is written, or they train."""

import math
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import history, pretrain_on_rank, write_text
from tests.mor_tools.pretraining.settings.random_settings import leaves, overrides

SHORT = ["training.steps=2", "training.decay_steps=1", "evaluation.every=2", "log_every=1"]
INSTRUCTION = re.compile(
    r"\b(must|use|leave (it|them) out|set|give|expected|allowed|needs|lower|start|shorten)\b",
    re.IGNORECASE,
)


def trained_or_refused(*, settings: list[str]) -> str | None:
    """On a rank of the pool: the error that refuses the settings; None where they train."""
    try:
        pretrain_on_rank(settings=settings)
    except ValueError as error:
        return str(error)
    return None


def check(pool: WorkerPool, text: list[str], changes: list[str], ranks: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        told = pool.run(
            trained_or_refused, ranks, settings=[*text, *SHORT, *changes, f"output={output}"]
        )
        assert len(set(told)) == 1, told
        if told[0] is None:
            rows = history(output)
            assert rows
            assert all(math.isfinite(row["loss"]) for row in rows)
            return "trained"
        assert not output.exists(), f"was begun before it was refused: {told[0]}"
    names = set(re.findall(r"\w+", told[0]))
    assert names & {part for path in leaves() for part in path.split(".")}, told[0]
    assert INSTRUCTION.search(told[0]), f"does not say what to do: {told[0]}"
    return "refused"


@pytest.mark.parametrize(
    ("ranks", "examples"),
    [
        (1, 4),
        pytest.param(1, 100, marks=pytest.mark.full),
        pytest.param(2, 50, marks=pytest.mark.full),
    ],
)
def test_random_settings_are_refused_before_anything_is_written_or_train(
    pool: WorkerPool, tmp_path_factory, ranks, examples
):
    text = write_text(tmp_path_factory.mktemp("text"))
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        # A run takes a second: no search for a smaller one.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(overrides(layouts=ranks > 1))
    @example(["recursion.sandwich_norms=true"])
    @example(["training.micro_batch_size=0"])
    def look(changes: list[str]) -> None:
        outcomes[check(pool, text, changes, ranks)] += 1

    look()
    # Neighbouring examples are variants of one another, so shares vary widely with the code drawn from.
    assert min(outcomes["refused"], outcomes["trained"]) > examples / 100, outcomes
