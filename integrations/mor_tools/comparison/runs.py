"""The runs of a comparison, one after the other in the same processes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from mor_megatron.platform import on_first_rank
from mor_tools.comparison.page import write_pages
from mor_tools.comparison.plan import Comparison, Run
from mor_tools.pretraining import distributed, run_folder
from mor_tools.pretraining.models import build, sizes
from mor_tools.pretraining.session import pretrain


def check(comparison: Comparison) -> None:
    """Refuse what the layers, or this number of processes, cannot do, before anything is computed.

    Raises:
        ValueError: what it is, and of which model.
    """
    for model in comparison.models:
        try:
            model.settings.require_installed()
            model.settings.data_parallel_size(distributed.world_size())
            build.check(model.settings)
            sizes.require_room(model.settings)
        except ValueError as error:
            raise ValueError(f"{model.name}: {error}") from error
    for run in comparison.runs():  # a folder with a run of other settings
        on_first_rank(lambda run=run: run_folder.is_complete(run.settings))


def compare(comparison: Comparison, console: Console | None) -> bool:
    """Take all runs that are not finished; False if it was asked to stop. All ranks call it.

    The pages are written anew after every run. A run whose loss is not finite ends, and the pages
    say so; the others go on.
    """
    tell = _teller(console)
    check(comparison)
    failed: dict[str, str] = {}
    runs = list(comparison.runs())
    for number, run in enumerate(runs, start=1):
        title = f"run {number} of {len(runs)}: {run.model}, seed {run.seed}"
        if _is_complete(run):
            tell(f"{title}: finished before")
            continue
        tell(f"{title}: {run.settings.training.steps} steps")
        try:
            with distributed.model_parallel(run.settings):
                pretrain(run.settings, is_alone=False)
        except FloatingPointError as error:
            failed[f"{run.model}, seed {run.seed}"] = str(error)
            tell(f"{title}: {error}")
            continue
        if not _is_complete(run):
            return False
        _write(comparison, failed)
    for path in _write(comparison, failed):
        tell(f"wrote {path}")
    return True


def _is_complete(run: Run) -> bool:
    return bool(on_first_rank(lambda: run_folder.is_complete(run.settings)))


def _write(comparison: Comparison, failed: dict[str, str]) -> Sequence[Path]:
    return on_first_rank(lambda: write_pages(comparison, failed)) or ()


def _teller(console: Console | None) -> Callable[[str], None]:
    def tell(message: str) -> None:
        if console is not None:
            console.print(message, markup=False, highlight=False, soft_wrap=True)

    return tell
