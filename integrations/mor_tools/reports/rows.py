"""The records of a training run, one per step, and history.jsonl, the file that stores them."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


def depth_shares(shares: Sequence[float]) -> list[float]:
    """The share of tokens that took exactly 0, 1, ... N_r steps.

    Args:
        shares: the share of tokens that ran each step.
    """
    return [more - less for more, less in pairwise([1.0, *shares, 0.0])]


class RecursionReport(Protocol):
    """Routing statistics of one recursion over a global batch, such as `mor_megatron.RoutingReport`."""

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
    """Routing statistics of all recursions of a model in one optimizer step, over the global batch.

    Steps of several recursions are numbered through, from the first of the first recursion to the last
    of the last.
    """

    shares: list[float]
    """Share of all tokens that ran each step."""
    dead_positions: float
    """Share of the sequence's positions at which no token ran the last step of a recursion."""
    metrics: dict[str, float]
    """Metrics of the router by `step_<r>/<name>`, for example sampling_accuracy and sampling_loss."""
    expert_load: list[list[float]] | None = None
    """Share of a step's assignments that each expert got, `[step][expert]`, summed over the layers.
    None without a mixture of experts."""
    steps: list[int] | None = None
    """Number of steps of each recursion if there are several. None: all steps are of one."""

    @classmethod
    def from_reports(
        cls, reports: Sequence[RecursionReport], blocks: Sequence[int] | None = None
    ) -> "Routing | None":
        """Combine the reports of all blocks of the model. None without recursion.

        Args:
            blocks: how many of the reports each recursion has, one after another. Those of the same
                recursion are averaged. Default: all are of one recursion.
        """
        if not reports:
            return None
        rest, found = list(reports), []
        for count in [len(rest)] if blocks is None else blocks:
            found.append(cls._of_one(rest[:count]))
            rest = rest[count:]
        assert not rest, f"{len(reports)} reports are not those of blocks={blocks}"
        return found[0] if len(found) == 1 else cls._one_after_another(found)

    @classmethod
    def _of_one(cls, reports: Sequence[RecursionReport]) -> "Routing":
        shares = torch.tensor([report.shares for report in reports]).mean(dim=0)
        dead = torch.tensor([report.dead_positions for report in reports]).mean()
        loads = [r.expert_load.sum(dim=1) for r in reports if r.expert_load is not None]
        load = None
        if loads:
            tokens = torch.stack(loads).sum(dim=0)  # [step expert]
            load = (tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
        return cls(shares.tolist(), dead.item(), reports[0].metrics, load)

    @classmethod
    def _one_after_another(cls, found: Sequence["Routing"]) -> "Routing":
        shares, metrics = list[float](), dict[str, float]()
        for own in found:
            earlier = len(shares)
            metrics |= {_renumbered(name, earlier): v for name, v in own.metrics.items()}
            shares += own.shares
        loads = [own.expert_load for own in found if own.expert_load is not None]
        return cls(
            shares,
            sum(own.dead_positions for own in found) / len(found),
            metrics,
            [cells for load in loads for cells in load] if loads else None,
            [len(own.shares) for own in found],
        )

    @property
    def by_recursion(self) -> list[list[float]]:
        """The shares of each recursion's steps."""
        rest, found = self.shares, []
        for count in self.steps or [len(rest)]:
            found.append(rest[:count])
            rest = rest[count:]
        return found

    @property
    def depth_shares(self) -> list[float] | None:
        """Share of tokens that took exactly 0, 1, ... N_r steps. None with several recursions: how many
        tokens take many steps in all of them does not follow from the shares of each."""
        return depth_shares(self.shares) if self.steps is None else None

    @property
    def agreement(self) -> dict[int, float]:
        """For each 1-based step, the share of its candidates for which the causal predictor agrees
        with the selection of training. Empty for routers without a predictor."""
        steps = range(1, len(self.shares) + 1)
        named = {step: self.metrics.get(f"step_{step}/sampling_accuracy") for step in steps}
        return {step: value for step, value in named.items() if value is not None}


@dataclass(frozen=True)
class Validation:
    """The evaluation of a model on held-out text."""

    loss: float
    """Loss in nats per token, with tokens routed as in training."""
    routing: Routing | None = None
    """Routing of the held-out tokens as in training. None without recursion."""
    causal_loss: float | None = None
    """Loss in nats per token, with tokens routed as in generation. None without recursion."""
    causal_routing: Routing | None = None
    """Routing of the held-out tokens as in generation. None without recursion."""


@dataclass(frozen=True)
class Row:
    """The record of one optimizer step."""

    step: int
    """Number of the optimizer step, from 1."""
    loss: float
    """Training loss in nats per token."""
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float | None = None
    """Throughput since the last row that has one."""
    routing: Routing | None = None
    validation_loss: float | None = None
    """Held-out loss after this step, in nats per token, with tokens routed as in training."""
    causal_validation_loss: float | None = None
    """Held-out loss with tokens routed as in generation, which does not depend on later tokens."""
    divergence: float | None = None
    """Divergence from the teacher's distributions in nats per token. None without a teacher."""


def line(row: Row) -> str:
    """A row as a line of history.jsonl."""
    return json.dumps(dataclasses.asdict(row)) + "\n"


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a history.jsonl. If the file does not exist, there are none.

    Raises:
        ValueError: a line is valid JSON but not a row.
    """
    if not file.exists():
        return []
    rows = []
    # Invalid UTF-8 must only make its own line unreadable.
    for number, text in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            continue  # a damaged line, or the incomplete last line of a process that was killed
        try:
            rows.append(_row(values))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is not a row of this version ({error}). Remove the file, or "
                "read it with the version that wrote it."
            ) from error
    return rows


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row, by their names in TensorBoard and wandb."""
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
        for number, own in enumerate(routing.by_recursion, start=1):
            place = "depth" if routing.steps is None else f"depth/recursion_{number}"
            found |= {f"{place}/{depth}": s for depth, s in enumerate(depth_shares(own))}
        for step, experts in enumerate(routing.expert_load or [], start=1):
            for expert, share in enumerate(experts):
                found[f"experts/step_{step}/expert_{expert}"] = share
    return {name: value for name, value in found.items() if value is not None}


def _renumbered(name: str, earlier: int) -> str:
    """A metric `step_<r>/<name>`, with its step counted from that of `earlier` steps before it."""
    return re.sub(r"^step_(\d+)/", lambda found: f"step_{int(found[1]) + earlier}/", name)


def _row(values: dict[str, Any]) -> Row:
    if values["routing"] is not None:
        values["routing"] = Routing(**values["routing"])
    return Row(**values)
