"""What is known of a training run, step by step, and history.jsonl, which keeps it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


def depth_shares(shares: Sequence[float]) -> list[float]:
    """Share of tokens that took exactly 0, 1, ... N_r steps, from the shares that ran each step."""
    return [more - less for more, less in pairwise([1.0, *shares, 0.0])]


class RecursionReport(Protocol):
    """What one recursion did with a global batch, as `mor_megatron.RoutingReport` says it."""

    @property
    def shares(self) -> tuple[float, ...]: ...

    @property
    def dead_positions(self) -> float: ...

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def expert_load(self) -> Tensor | None: ...


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
    def from_reports(cls, reports: Sequence[RecursionReport]) -> "Routing | None":
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
        return depth_shares(self.shares)

    @property
    def agreement(self) -> dict[int, float]:
        """By 1-based step, the share of its candidates about which the causal predictor agrees with
        training's selection; empty for routers that have no predictor."""
        steps = range(1, len(self.shares) + 1)
        named = {step: self.metrics.get(f"step_{step}/sampling_accuracy") for step in steps}
        return {step: value for step, value in named.items() if value is not None}


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


def line(row: Row) -> str:
    """A row as history.jsonl has it."""
    return json.dumps(dataclasses.asdict(row)) + "\n"


def read_rows(file: Path) -> list[Row]:
    """The rows of a history.jsonl; none where there is no file.

    Raises:
        ValueError: a line is no row of ours.
    """
    if not file.exists():
        return []
    rows = []
    # Bytes that are no UTF-8 make their own line unreadable, and no other.
    for number, text in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed, or a damaged one
        try:
            rows.append(_row(values))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no step of a run of this version ({error}). Remove the "
                "file, or read it with the version that wrote it."
            ) from error
    return rows


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that TensorBoard and wandb show them under."""
    found: dict[str, float | None] = {
        "loss/train": row.loss,
        "loss/divergence": row.divergence,
        "loss/validation": row.validation_loss,
        "loss/validation_causal": row.causal_validation_loss,
        "optimizer/learning_rate": row.learning_rate,
        "optimizer/gradient_norm": row.gradient_norm,
        "speed/tokens_per_second": row.tokens_per_second,
    }
    routing = row.routing
    if routing is not None:
        found |= {f"routing/{name}": value for name, value in routing.metrics.items()}
        found["routing/dead_positions"] = routing.dead_positions
        found |= {f"routing/step_{r}/share": s for r, s in enumerate(routing.shares, start=1)}
        found |= {f"routing/step_{r}/agreement": a for r, a in routing.agreement.items()}
        found |= {f"depth/{depth}": share for depth, share in enumerate(routing.depth_shares)}
        for step, experts in enumerate(routing.expert_load or [], start=1):
            for expert, share in enumerate(experts):
                found[f"experts/step_{step}/expert_{expert}"] = share
    return {name: value for name, value in found.items() if value is not None}


def _row(values: dict[str, Any]) -> Row:
    if values["routing"] is not None:
        values["routing"] = Routing(**values["routing"])
    return Row(**values)
