"""What is known of a run, step by step: kept in memory, in history.jsonl and for TensorBoard."""

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from mor_megatron import RoutingReport
from pretraining.run_folder import write_atomically


@dataclass(frozen=True)
class Routing:
    """What the recursions of a model did in one step, over the global batch."""

    shares: list[float]
    """Tokens that ran each step over all tokens."""
    dead_positions: float
    """Share of positions in the sequence whose tokens never ran the last step."""
    metrics: dict[str, float]
    """By `step_<r>/<name>`: sampling_accuracy, sampling_loss, ..."""
    expert_load: list[list[float]] | None = None
    """Share of a step's assignments that each expert got, `[step][expert]`, all layers together;
    None without a mixture of experts."""

    @classmethod
    def from_reports(cls, reports: list[RoutingReport]) -> "Routing | None":
        """All recursions of the model taken together; None without recursion."""
        if not reports:
            return None
        shares = torch.tensor([report.shares for report in reports]).mean(dim=0)
        dead = torch.tensor([report.dead_positions for report in reports]).mean()
        loads = [r.expert_load.sum(dim=1) for r in reports if r.expert_load is not None]
        load = None
        if loads:
            tokens = torch.stack(loads).sum(dim=0)  # [step expert]
            load = (tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
        return cls(shares.tolist(), dead.item(), reports[0].metrics, load)

    @property
    def depth_shares(self) -> list[float]:
        """Share of tokens that took exactly 0, 1, ... N_r steps."""
        at_least = [1.0, *self.shares, 0.0]
        return [more - less for more, less in pairwise(at_least)]


@dataclass(frozen=True)
class Validation:
    """What held-out text says of the model."""

    loss: float
    """In nats per token, tokens routed as in training."""
    routing: Routing | None = None
    """Of the held-out tokens; None without recursion."""
    causal_loss: float | None = None
    """Tokens routed as in generation; None without recursion."""
    causal_routing: Routing | None = None


@dataclass(frozen=True)
class Row:
    """One optimizer step."""

    step: int
    """1-based."""
    loss: float
    """Training loss in nats per token."""
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float | None = None
    """Since the row before that has it."""
    routing: Routing | None = None
    validation_loss: float | None = None
    """Held-out loss after this step, in nats per token, tokens routed as in training."""
    causal_validation_loss: float | None = None
    """The same with tokens routed as in generation, where none knows the later ones."""
    divergence: float | None = None
    """From the teacher's distributions, in nats per token; None without one."""


class History:
    """All rows of a run, earlier sessions included; empty on ranks that do not keep the files.

    Args:
        folder: of the run.
        step: steps taken; what an earlier session logged beyond its last checkpoint is dropped.
        is_writer: whether this process keeps the files.
    """

    def __init__(self, folder: Path, step: int, is_writer: bool) -> None:
        self._file = folder / "history.jsonl"
        self.rows: list[Row] = []
        self._tensorboard = None
        if is_writer:
            self.rows = [row for row in _read(self._file) if row.step <= step]
            write_atomically(self._file, "".join(map(_line, self.rows)))
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: Row) -> None:
        """Append a step."""
        if self._tensorboard is not None:
            self.rows.append(row)
            with self._file.open("a") as file:
                file.write(_line(row))
            for name, value in _scalars(row).items():
                self._tensorboard.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Finish the TensorBoard files."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def _line(row: Row) -> str:
    return json.dumps(dataclasses.asdict(row)) + "\n"


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break  # the last line of a process that was killed
        if values["routing"] is not None:
            values["routing"] = Routing(**values["routing"])
        rows.append(Row(**values))
    return rows


def _scalars(row: Row) -> dict[str, float]:
    scalars = {
        "loss/train": row.loss,
        "loss/divergence": row.divergence,
        "loss/validation": row.validation_loss,
        "loss/validation_causal": row.causal_validation_loss,
        "optimizer/learning_rate": row.learning_rate,
        "optimizer/gradient_norm": row.gradient_norm,
        "speed/tokens_per_second": row.tokens_per_second,
    }
    if row.routing is not None:
        scalars |= {f"routing/{name}": value for name, value in row.routing.metrics.items()}
        scalars["routing/dead_positions"] = row.routing.dead_positions
        for step, share in enumerate(row.routing.shares, start=1):
            scalars[f"routing/step_{step}/share"] = share
        for step, experts in enumerate(row.routing.expert_load or [], start=1):
            for expert, share in enumerate(experts):
                scalars[f"experts/step_{step}/expert_{expert}"] = share
    return {name: value for name, value in scalars.items() if value is not None}
