"""A run says what goes wrong in it, while it goes on and in its report."""

from pathlib import Path

from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import pretrain_on_rank, write_text

ADDITIVE = ["recursion.router.combine=additive", "log_every=1", "evaluation.sample_tokens=0"]
TOLD = "the router gets no gradient, so that its selection stays random"


def test_a_router_that_cannot_learn_is_told(pool: WorkerPool, tmp_path: Path):
    """Nothing reads the scores of an additive router, but for the loss of its predictor."""
    common = [*write_text(tmp_path), *ADDITIVE]

    def pretrain(name: str, *settings: str) -> tuple[str, str]:
        folder = tmp_path / name
        (printed,) = pool.run(pretrain_on_rank, settings=[*common, f"output={folder}", *settings])
        return printed, (folder / "report.html").read_text()

    printed, report = pretrain("without", "recursion.router.predictor_coefficient=0")
    assert f"warning: step 3: {TOLD}" in printed and printed.count("warning:") == 1
    assert "<h2>Warnings</h2>" in report and TOLD in report

    printed, report = pretrain("with")
    assert "warning:" not in printed and "<h2>Warnings</h2>" not in report
