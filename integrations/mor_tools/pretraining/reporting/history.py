"""The numbers of a run, step by step: in memory, history.jsonl, TensorBoard and wandb."""

from collections.abc import Sequence
from pathlib import Path

from mor_tools.pretraining.run_folder import write_atomically
from mor_tools.reports.rows import Row, line, read_rows, scalars
from mor_tools.reports.trackers import Tracker


class History:
    """All rows of a run, including earlier sessions; empty on ranks that do not write the files.

    Args:
        folder: of the run.
        step: steps taken. Rows that an earlier session logged after its last checkpoint are
            dropped.
        trackers: further destinations of each row's numbers, closed together with the history.
        is_writer: whether this process writes the files.
    """

    def __init__(
        self, folder: Path, step: int, trackers: Sequence[Tracker] = (), is_writer: bool = True
    ) -> None:
        self._file = folder / "history.jsonl"
        self._trackers, self._is_writer = tuple(trackers), is_writer
        self.rows: list[Row] = []
        self.lost: str | None = None
        """A message if rows of earlier steps are missing, else None."""
        if is_writer:
            self.rows = [row for row in read_rows(self._file) if row.step <= step]
            self.lost = _lost(self._file, {row.step for row in self.rows}, step)
            write_atomically(self._file, "".join(map(line, self.rows)))

    def add(self, row: Row) -> None:
        """Append a step."""
        if not self._is_writer:
            return
        self.rows.append(row)
        with self._file.open("a") as file:
            file.write(line(row))
        for tracker in self._trackers:
            tracker.scalars(scalars(row), row.step)

    def close(self) -> None:
        """Finish writing."""
        for tracker in self._trackers:
            tracker.close()


def _lost(file: Path, found: set[int], step: int) -> str | None:
    missing = [number for number in range(1, step + 1) if number not in found]
    if not missing:
        return None
    return (
        f"{file} lacks {len(missing)} of the {step} steps taken so far, between steps {missing[0]} "
        f"and {missing[-1]}: it was truncated or damaged. The model is not affected, but curves "
        "and the report will have a gap."
    )
