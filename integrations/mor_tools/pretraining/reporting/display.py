"""What the user sees during a run: a live panel on a terminal, otherwise one line per log row."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from types import TracebackType
from typing import Self

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mor_tools.pretraining.reporting.curve import curve
from mor_tools.reports.rows import Routing, Row

BAR_WIDTH = 24
CURVE_WIDTH, CURVE_HEIGHT = 36, 6
"""Of the curve of losses, in characters."""


@dataclass(frozen=True)
class Costs:
    """Computation that the display derives from a row."""

    flops_per_token: float
    """Training FLOPs per token."""
    utilization: float | None
    """Fraction of the devices' peak (MFU); None if the peak is unknown."""


class Display:
    """Displays a run; use it as a context manager.

    Args:
        title: name of the run.
        steps: optimizer steps of the whole run.
        unigram_entropy: of the held-out text, in nats per token.
        console: where to write; None writes nothing, as on all ranks but the first.
    """

    def __init__(
        self, title: str, steps: int, unigram_entropy: float, console: Console | None
    ) -> None:
        self._title, self._steps, self._entropy = title, steps, unigram_entropy
        self._console = console
        self._validated: Row | None = None
        self._losses: list[float] = []
        self._start: tuple[float, int] | None = None
        self._live = None
        if console is not None and console.is_terminal:
            self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, message: str) -> None:
        """Print a message for the user."""
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def follow(self, rows: Iterable[Row]) -> None:
        """Add steps to the curve of losses; nothing is shown before `show`."""
        self._losses += [row.loss for row in rows if isfinite(row.loss)]

    def show(self, row: Row, costs: Costs) -> None:
        """Display a step."""
        self._start = self._start or (time.monotonic(), row.step)
        if row.validation_loss is not None:
            self._validated = row
        if self._live is not None:
            self._live.update(self._panel(row, costs))
        else:
            self.say(self._line(row, costs))

    def _seconds_left(self, row: Row) -> float | None:
        assert self._start is not None
        started, first = self._start
        done = row.step - first
        if done == 0:
            return None
        return (time.monotonic() - started) / done * (self._steps - row.step)

    def _line(self, row: Row, costs: Costs) -> str:
        parts = [f"step {row.step}/{self._steps}", f"loss {row.loss:.3f}"]
        if row.divergence is not None:
            parts.append(f"divergence {row.divergence:.3f}")
        if row.validation_loss is not None:
            causal = row.causal_validation_loss
            notes = [] if causal is None else [f"routed as in generation {causal:.3f}"]
            notes.append(f"unigram {self._entropy:.3f}")
            parts.append(f"validation {row.validation_loss:.3f} ({', '.join(notes)})")
        parts += [f"{name} {value}" for name, value in self._speed(row, costs)]
        if row.routing is not None:
            parts.append("share of tokens " + " ".join(f"{s:.2f}" for s in row.routing.shares))
            parts.append(f"dead {row.routing.dead_positions:.0%}")
        return " · ".join(parts)

    def _speed(self, row: Row, costs: Costs) -> list[tuple[str, str]]:
        found = []
        if row.tokens_per_second is not None:
            found.append(("tokens/s", f"{row.tokens_per_second:,.0f}"))
        found.append(("FLOPs/token", f"{costs.flops_per_token:.3g}"))
        if costs.utilization is not None:
            found.append(("MFU", f"{costs.utilization:.1%}"))
        seconds = self._seconds_left(row)
        if seconds is not None:
            found.append(("left", f"{int(seconds // 60)}:{int(seconds % 60):02}"))
        return found

    def _curve(self) -> Table:
        """The training losses of all steps, with the largest and the smallest beside it."""
        lines = curve(self._losses, CURVE_WIDTH, CURVE_HEIGHT)
        drawn = Table.grid(padding=(0, 1))
        labels = [""] * CURVE_HEIGHT
        labels[0], labels[-1] = (f"{end(self._losses):.3f}" for end in (max, min))
        for label, line in zip(labels, lines, strict=True):
            drawn.add_row(Text(label, style="dim"), Text(line, style="cyan"))
        drawn.add_row("", Text("training loss", style="dim"))
        return drawn

    def _panel(self, row: Row, costs: Costs) -> Panel:
        numbers = Table.grid(padding=(0, 2))
        held_out, causal = "–", None
        if self._validated is not None:
            held_out = f"{self._validated.validation_loss:.3f}"
            causal = self._validated.causal_validation_loss
        if causal is not None:
            held_out += f", {causal:.3f} routed as in generation"
        for name, value in (
            ("step", f"{row.step} of {self._steps}"),
            ("loss", f"{row.loss:.3f}"),
            ("validation loss", f"{held_out}  (unigram entropy {self._entropy:.3f})"),
            *self._speed(row, costs),
        ):
            numbers.add_row(Text(name, style="dim"), value)
        progress = Table.grid(expand=True)
        progress.add_row(ProgressBar(total=self._steps, completed=row.step))
        parts: list[RenderableType] = [progress, numbers]
        if len(self._losses) > 1:
            # Beside the numbers where both fit, else below them.
            parts[-1:] = [Columns([numbers, self._curve()], padding=(0, 4))]
        if row.routing is not None:
            parts.append(_routing_table(row.routing))
        return Panel(Group(*parts), title=self._title, title_align="left")


def _routing_table(routing: Routing) -> Table:
    """A row per recursion step: the share of tokens that ran it, and the load of each expert."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("recursion step")
    table.add_column("share of tokens")
    if routing.expert_load is not None:
        table.add_column(f"load of {len(routing.expert_load[0])} experts")
    for index, share in enumerate(routing.shares):
        filled = round(share * BAR_WIDTH)
        bar = Text("█" * filled, style="cyan").append("·" * (BAR_WIDTH - filled), style="dim")
        cells: list[RenderableType] = [str(index + 1), bar.append(f" {share:.2f}")]
        if routing.expert_load is not None:
            cells.append(" ".join(f"{load:.2f}" for load in routing.expert_load[index]))
        table.add_row(*cells)
    table.caption = (
        f"{routing.dead_positions:.1%} of positions never ran the last step in this batch"
    )
    table.caption_justify = "left"
    return table
