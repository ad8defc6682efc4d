"""Which beginning helps a recursive model made from a dense one? A comparison at equal FLOPs.

    python examples/experiments/uptraining.py --output runs/uptraining
    python examples/experiments/uptraining.py --quick

For each seed a dense model is trained first. Recursive models of as many unrolled layers begin with its
weights, by every initialization, with and without low-rank deltas of single steps, with and without the
dense model as a teacher, and heal. All spend the same training FLOPs on healing: with deltas, or with a
teacher, whose forward pass counts, they take fewer steps. Two baselines: the dense model trained on for
these FLOPs, and a fresh recursive model that spends the dense model's FLOPs too. Results are mean and
spread over the seeds; where spreads overlap, claim nothing. Each run is noted when it ends: started
again, those are kept.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    load_model,
    save_model,
)
from mor_layers.costs import account
from mor_layers.training import Batch, Distillation, Distiller, Healing, heal
from mor_layers.weights import INITIALIZATIONS, recursive_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.text_pieces import TextPieces

DISTILLATION = Distillation(language_model_coefficient=0.5, logits_coefficient=0.5)
RELAXATION = Relaxation(rank=8)
DENSE, DENSE_ON, SCRATCH = "dense", "dense, trained on", "fresh, all FLOPs"


@dataclass(frozen=True)
class Plan:
    """How long and how large."""

    dense_steps: int = 400
    """Optimizer steps of the dense model."""
    healing_steps: int = 80
    """Steps of healing without a teacher; with one, as many as the same FLOPs allow."""
    num_recursions: int = 3
    layers: int = 8
    """Unrolled; the first and the last are not shared."""
    batch: int = 8
    length: int = 128
    hidden_size: int = 64
    vocabulary: int = 1024
    learning_rate: float = 2e-3
    validation_batches: int = 16


QUICK = Plan(6, 4, 2, 4, 2, 16, 16, 300, validation_batches=2)


@dataclass(frozen=True)
class Variant:
    """One way to begin and to heal."""

    initialization: str
    is_relaxed: bool
    is_distilled: bool

    @property
    def name(self) -> str:
        relaxed = ", relaxed" if self.is_relaxed else ""
        return self.initialization + relaxed + (", distilled" if self.is_distilled else "")


@dataclass(frozen=True)
class Run:
    """What one variant with one seed gave; losses are held-out, in nats per token."""

    name: str
    seed: int
    before: float
    """Loss before healing."""
    after: float
    """Loss when the FLOPs were spent."""
    steps: int
    flops: float
    """Training FLOPs of healing, a teacher's forward passes included."""
    parameters: int


def variants() -> list[Variant]:
    """All of them."""
    ways = ((relaxed, distilled) for relaxed in (False, True) for distilled in (False, True))
    return [Variant(init, *way) for way in ways for init in INITIALIZATIONS]


def dense_config(plan: Plan) -> DecoderConfig:
    """The dense model's."""
    width = plan.hidden_size
    return DecoderConfig(plan.vocabulary, width, width * 8 // 3, plan.layers, num_heads=4)


def recursion(plan: Plan) -> RecursionConfig:
    """Of every student: all tokens run every step, so that beginnings alone differ."""
    return RecursionConfig(plan.num_recursions)


class Text(TextPieces):
    """Batches of the text, of a plan's sizes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.vocabulary, plan.length)
        self.plan = plan

    def batches(self, ids: Tensor, seed: int) -> Iterator[Batch]:
        """Random pieces, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            pieces = self.sample(ids, self.plan.batch, generator)
            yield Batch(pieces[:, :-1], pieces[:, 1:])


@torch.no_grad()
def held_out_loss(model: MoRTransformer, text: Text) -> float:
    """Always on the same pieces."""
    model.eval()
    batches = text.batches(text.held_out, seed=1234)
    pieces = (next(batches) for _ in range(text.plan.validation_batches))
    return statistics.fmean(model(p.ids, p.labels).lm_loss.item() for p in pieces)


def trained(
    name: str,
    seed: int,
    model: MoRTransformer,
    text: Text,
    steps: int,
    teacher: MoRTransformer | None = None,
    data_seed: int = 0,
) -> Run:
    """Train a model in place."""
    plan = text.plan
    healing = Healing(steps, plan.learning_rate, warmup_steps=steps // 20, decay_steps=steps // 5)
    distiller = None if teacher is None else Distiller(teacher, model.config, DISTILLATION)
    before = held_out_loss(model, text)
    batches = text.batches(text.training, seed=1000 * seed + data_seed)
    for _ in heal(model, batches, healing, distiller):
        pass
    return Run(
        name,
        seed,
        before,
        held_out_loss(model, text),
        steps,
        steps * plan.batch * plan.length * flops_per_token(model.config, plan, teacher),
        sum(p.numel() for p in model.parameters()),
    )


def flops_per_token(
    config: DecoderConfig, plan: Plan, teacher: MoRTransformer | None = None
) -> float:
    """Of a training step, with the teacher's forward pass."""
    flops = account(config, plan.length).flops_per_token()
    if teacher is not None:
        flops += account(teacher.config, plan.length).flops_per_token(training=False)
    return flops


def student(dense: MoRTransformer, variant: Variant, seed: int, plan: Plan) -> MoRTransformer:
    """A recursive model that begins with a dense one's weights."""
    config, weights = recursive_weights(
        dense.state_dict(),
        dense.config,
        replace(recursion(plan), relaxation=RELAXATION if variant.is_relaxed else None),
        variant.initialization,
        seed,
    )
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    return model


class Results:
    """Runs that are done, in results.json."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.path, self.plan = folder / "results.json", plan
        self.runs: list[Run] = []
        if self.path.exists():
            content = json.loads(self.path.read_text("utf-8"))
            if content["plan"] != asdict(plan):
                raise SystemExit(f"{self.path} is of another plan. Choose another --output.")
            self.runs = [Run(**run) for run in content["runs"]]

    def has(self, name: str, seed: int) -> bool:
        """Whether this run is done."""
        return any(run.name == name and run.seed == seed for run in self.runs)

    def add(self, run: Run) -> None:
        """Note a run."""
        self.runs.append(run)
        rows = {
            "distillation": asdict(DISTILLATION),
            "relaxation": asdict(RELAXATION),
            "plan": asdict(self.plan),
            "table": self.table(),
            "runs": list(map(asdict, self.runs)),
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(rows, indent=1), "utf-8")
        partial.replace(self.path)

    def table(self) -> dict[str, dict[str, Any]]:
        """Mean and spread over seeds."""
        rows = {}
        for name in dict.fromkeys(run.name for run in self.runs):
            runs = [run for run in self.runs if run.name == name]
            row: dict[str, Any] = {
                "parameters": runs[0].parameters,
                "steps": runs[0].steps,
                "flops": runs[0].flops,
                "seeds": len(runs),
            }
            for what in ("before", "after"):
                values = [getattr(run, what) for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                row[what] = {"mean": statistics.fmean(values), "spread": spread}
            rows[name] = row
        return rows


def run_seed(seed: int, text: Text, results: Results, folder: Path) -> None:
    """Everything of one seed that is not yet done."""
    plan, place = text.plan, folder / f"dense-{seed}"
    torch.manual_seed(seed)
    if not (results.has(DENSE, seed) and place.exists()):
        dense = MoRTransformer(dense_config(plan))
        run = trained(DENSE, seed, dense, text, plan.dense_steps)
        save_model(dense, place)
        note(results, run)
    if not results.has(DENSE_ON, seed):
        model = load_model(place)
        note(results, trained(DENSE_ON, seed, model, text, plan.healing_steps, data_seed=1))
    for variant in variants():
        if results.has(variant.name, seed):
            continue
        dense = load_model(place)
        model = student(dense, variant, seed, plan)
        teacher = dense if variant.is_distilled else None
        budget = plan.healing_steps * flops_per_token(dense.config, plan)
        steps = round(budget / flops_per_token(model.config, plan, teacher))
        note(results, trained(variant.name, seed, model, text, steps, teacher, data_seed=1))
    if not results.has(SCRATCH, seed):
        model = MoRTransformer(replace(dense_config(plan), recursion=recursion(plan)))
        steps = plan.dense_steps + plan.healing_steps
        note(results, trained(SCRATCH, seed, model, text, steps))


def note(results: Results, run: Run) -> None:
    """Keep a run, and tell of it."""
    if not results.has(run.name, run.seed):
        results.add(run)
    print(
        f"seed {run.seed}  {run.name:28} {run.steps:5} steps  {run.before:.3f} -> {run.after:.3f}",
        flush=True,
    )


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        "| model | parameters | steps | loss before | loss after |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        losses = (f"{row[w]['mean']:.3f} ± {row[w]['spread']:.3f}" for w in ("before", "after"))
        lines.append(f"| {name} | {row['parameters']:,} | {row['steps']} | {' | '.join(losses)} |")
    return "\n".join(lines)


def draw(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Losses after healing with their spread, the best first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(table, key=lambda name: table[name]["after"]["mean"])
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        after = table[name]["after"]
        color = "tab:gray" if name in (DENSE, DENSE_ON, SCRATCH) else "tab:blue"
        color = "tab:orange" if "distilled" in name else color
        axes.errorbar(after["mean"], place, xerr=after["spread"], fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("held-out loss (nats per token), mean ± standard deviation over seeds")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train everything, print a table, write results.json and results.svg."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/uptraining"))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--dense-steps", type=int, help="optimizer steps of the dense model")
    parser.add_argument("--healing-steps", type=int, help="of healing without a teacher")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows it works")
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else Plan()
    names = ("dense_steps", "healing_steps")
    plan = replace(plan, **{n: getattr(given, n) for n in names if getattr(given, n)})
    given.output.mkdir(parents=True, exist_ok=True)
    text, results = Text(plan), Results(given.output, plan)
    start = time.monotonic()
    for seed in range(given.seeds):
        run_seed(seed, text, results, given.output)
    table = results.table()
    print(markdown(table))
    print(f"{time.monotonic() - start:.0f} s")
    draw(table, given.output / "results.svg")
    return table


if __name__ == "__main__":
    main()
