"""Does adaptive depth help a mixture of experts? A comparison at equal tokens and at equal FLOPs.

    python examples/experiments/depth_by_expert.py --output runs/depth_by_expert
    python examples/experiments/depth_by_expert.py --quick

With the same seed every model reads the same text in the same order. The learning rate is constant
after a warm-up, so that one run is measured twice: after `--steps` steps (equal tokens), and when
it has spent the FLOPs that the model of fixed depth 3 spends in those (equal FLOPs). Validation
chooses depths causally, as generation must. FLOPs are `mor_layers.costs.counting`'s at the tokens that
ran each step. Results are mean and spread over the seeds; where spreads overlap, claim nothing.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RandomDepth,
    RecursionConfig,
    TokenChoice,
)
from mor_layers.costs import account
from mor_layers.generation import turn_dial

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.text_pieces import TextPieces, training_step

STEPS = 3
BLOCK_SIZE = 2
REFERENCE = "fixed depth 3"
DIALS = (-0.6, -0.3, 0.0, 0.3, 0.6)


@dataclass(frozen=True)
class Plan:
    """How long and how large."""

    steps: int = 3000
    """Optimizer steps of equal tokens."""
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 16
    length: int = 256
    hidden_size: int = 128
    num_experts: int = 8
    vocabulary: int = 2048
    learning_rate: float = 1e-3
    validation_batches: int = 16


QUICK = Plan(6, (0, 1, 2), 4, 64, 32, 4, 512, validation_batches=2)


@dataclass
class Run:
    """What one model with one seed gave."""

    equal_tokens: float = float("nan")
    """Validation loss in nats per token after the planned steps."""
    equal_flops: float = float("nan")
    """The same when the reference's FLOPs were spent."""
    steps_at_equal_flops: int = 0
    flops_per_token: float = 0.0
    shares: list[float] = field(default_factory=list)
    """Tokens that ran each step over all tokens, at the end of training."""
    cells: list[list[float]] = field(default_factory=list)
    """Each expert's share of a step's load, by step."""
    experts_per_token: list[float] = field(default_factory=list)
    dial: list[dict[str, float]] = field(default_factory=list)
    """Mean depth, experts per token and validation loss at each turn of the dial."""


def models(plan: Plan) -> dict[str, DecoderConfig]:
    """Every model of the comparison; all have a prelude, a block of two layers and a coda."""
    moe = MoEConfig(plan.num_experts, 2, plan.hidden_size)
    base = DecoderConfig(
        plan.vocabulary, plan.hidden_size, plan.hidden_size, 2 + BLOCK_SIZE * STEPS, 4, moe=moe
    )

    def recursive(steps: int = STEPS, **options: Any) -> DecoderConfig:
        recursion = RecursionConfig(steps, **options)
        return replace(base, num_unrolled_layers=2 + BLOCK_SIZE * steps, recursion=recursion)

    # The width router chooses among three experts, and takes two in the mean like the others.
    wide = replace(moe, experts_per_token=3)
    width = DepthAndWidth(mean_experts=2.0)
    found = {"plain MoE": base}
    for depth in (1, 2, 3):
        found[f"fixed depth {depth}"] = recursive(depth, router=FixedDepth())
    found["random depth"] = recursive(router=RandomDepth())
    for name, router in (("expert-choice", ExpertChoice()), ("token-choice", TokenChoice())):
        for routers in ("shared", "per_step"):
            found[f"{name}, {routers} experts"] = recursive(router=router, expert_routers=routers)
    for policy in ("recursion_wise", "exit_state"):
        adaptive = recursive(router=width, kv_policy=policy, expert_routers="per_step")
        found[f"depth and width, {policy}"] = replace(adaptive, moe=wide)
    return found


def train(
    config: DecoderConfig, seed: int, text: TextPieces, plan: Plan, budget: float | None
) -> Run:
    """One model from one seed; `budget` in FLOPs, None for the model that sets it."""
    torch.manual_seed(seed)
    model, run = MoRTransformer(config), Run()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.1)
    warmup = max(1, plan.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warmup))
    generator = torch.Generator().manual_seed(seed)
    spent, step, tokens = 0.0, 0, plan.batch * plan.length
    while step < plan.steps or (budget is not None and spent < budget):
        ids = text.sample(text.training, plan.batch, generator)
        output = training_step(model, optimizer, schedule, ids)
        ran = [float(d.tokens.count) / tokens for d in output.recursions[0].decisions]
        flops = _flops_per_token(config, ran, plan)
        before, spent, step = spent, spent + flops * tokens, step + 1
        run.flops_per_token += (flops - run.flops_per_token) / step
        if step == plan.steps:
            run.equal_tokens = validate(model, text, plan)["loss"]
        if budget is not None and before < budget <= spent:
            run.equal_flops = validate(model, text, plan)["loss"]
            run.steps_at_equal_flops = step
    if budget is None:
        run.equal_flops, run.steps_at_equal_flops = run.equal_tokens, step
    measured = validate(model, text, plan)
    run.shares, run.cells = measured["shares"], measured["cells"]
    run.experts_per_token = measured["experts"]
    if isinstance(config.recursion and config.recursion.router, DepthAndWidth):
        run.dial = dial_curve(model, text, plan)
    return run


def _flops_per_token(config: DecoderConfig, shares: list[float], plan: Plan) -> float:
    routed = config.recursion and not isinstance(config.recursion.router, FixedDepth)
    ran = [share * plan.length for share in shares] if routed else None
    return account(config, plan.length, ran).flops_per_token()


@torch.no_grad()
def validate(model: MoRTransformer, text: TextPieces, plan: Plan) -> dict[str, Any]:
    """Loss on the held-out text, and what the recursion did there."""
    model.eval()
    generator = torch.Generator().manual_seed(1234)
    losses, ran, load = [], 0.0, 0.0
    for _ in range(plan.validation_batches):
        ids = text.sample(text.held_out, plan.batch, generator)
        output = model(ids[:, :-1], labels=ids[:, 1:], causal_routing=True)
        (recursion,) = output.recursions
        losses.append(float(output.lm_loss))
        ran = ran + torch.stack([d.tokens.count for d in recursion.decisions])
        load = load + recursion.expert_load.sum(dim=1)
    model.train()
    layers = len(model.recursions[0].layers.layers)
    return {
        "loss": statistics.fmean(losses),
        "shares": (ran / ran[0]).tolist(),
        "cells": (load / load.sum(dim=-1, keepdim=True).clamp(min=1)).tolist(),
        "experts": (load.sum(dim=-1) / (ran * layers).clamp(min=1)).tolist(),
    }


def dial_curve(model: MoRTransformer, text: TextPieces, plan: Plan) -> list[dict[str, float]]:
    """Compute against loss, for depth turned alone and for width turned alone."""
    points = []
    for what, scale in (("depth", 1.0), ("width", 0.3)):
        for turn in DIALS:
            turn_dial(model, **{what: turn * scale})
            measured = validate(model, text, plan)
            points.append(
                {
                    "turned": what,
                    "by": turn * scale,
                    "mean_depth": sum(measured["shares"]),
                    "experts_per_token": statistics.fmean(measured["experts"]),
                    "loss": measured["loss"],
                }
            )
    turn_dial(model)
    return points


def summary(config: DecoderConfig, runs: list[Run], plan: Plan) -> dict[str, Any]:
    """Mean and spread over seeds, and each run."""

    def over_seeds(name: str) -> dict[str, float]:
        values = [getattr(run, name) for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": statistics.fmean(values), "spread": spread}

    return {
        "parameters": sum(p.numel() for p in MoRTransformer(config).parameters()),
        "flops_per_token": statistics.fmean(run.flops_per_token for run in runs),
        "equal_tokens": over_seeds("equal_tokens"),
        "equal_flops": over_seeds("equal_flops"),
        "runs": [vars(run) for run in runs],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses with spread, the load of every cell, and the dial."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, loads, dial) = plt.subplots(1, 3, figsize=(18, 6), layout="constrained")
    names = list(results)
    for offset, kind in ((-0.15, "equal_tokens"), (0.15, "equal_flops")):
        means = [results[n][kind]["mean"] for n in names]
        spreads = [results[n][kind]["spread"] for n in names]
        places = [i + offset for i in range(len(names))]
        losses.errorbar(means, places, xerr=spreads, fmt="o", label=kind.replace("_", " "))
    losses.set_yticks(range(len(names)), names)
    losses.invert_yaxis()
    losses.set_xlabel("validation loss (nats per token), ± standard deviation over seeds")
    losses.legend()
    rows = [(n, r + 1, c) for n in names for r, c in enumerate(results[n]["runs"][0]["cells"])]
    even = 1 / len(rows[0][2])
    image = loads.imshow([c for *_, c in rows], aspect="auto", cmap="Blues", vmin=0, vmax=2 * even)
    loads.set_yticks(range(len(rows)), [f"{n}, step {r}" for n, r, _ in rows], fontsize=6)
    loads.set_xlabel("expert")
    loads.set_title("share of a step's load (first seed)")
    figure.colorbar(image, ax=loads)
    for name in names:
        for what in ("depth", "width"):
            points = [p for p in results[name]["runs"][0]["dial"] if p["turned"] == what]
            compute = [p["mean_depth"] * p["experts_per_token"] for p in points]
            if points:
                label = f"{name}, {what} turned"
                dial.plot(compute, [p["loss"] for p in points], marker="o", label=label)
    dial.set_xlabel("mean depth × experts per token")
    dial.set_ylabel("validation loss")
    if dial.lines:
        dial.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train everything, print a table, write results.json and results.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/depth_by_expert"))
    parser.add_argument("--steps", type=int, help="optimizer steps of equal tokens")
    parser.add_argument("--seeds", type=int, help="how many seeds")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--length", type=int, help="tokens per sequence")
    parser.add_argument("--hidden-size", type=int, help="width of the models")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows it works")
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else Plan()
    sizes = ("steps", "batch", "length", "hidden_size")
    changed = {name: getattr(given, name) for name in sizes if getattr(given, name)}
    seeds = tuple(range(given.seeds)) if given.seeds else plan.seeds
    plan = replace(plan, seeds=seeds, **changed)
    given.output.mkdir(parents=True, exist_ok=True)
    text, found = TextPieces(plan.vocabulary, plan.length), models(plan)
    results: dict[str, Any] = {}
    budgets: dict[int, float] = {}
    print(f"{'model':34} {'parameters':>11} {'MFLOP/token':>11}  equal tokens    equal FLOPs")
    for name in sorted(found, key=lambda n: n != REFERENCE):
        start, runs = time.monotonic(), []
        for seed in plan.seeds:
            run = train(found[name], seed, text, plan, budgets.get(seed))
            if name == REFERENCE:
                budgets[seed] = run.flops_per_token * plan.steps * plan.batch * plan.length
            runs.append(run)
        results[name] = row = summary(found[name], runs, plan)
        losses = "   ".join(
            f"{row[k]['mean']:.3f} ± {row[k]['spread']:.3f}"
            for k in ("equal_tokens", "equal_flops")
        )
        print(
            f"{name:34} {row['parameters']:11,} {row['flops_per_token'] / 1e6:11.2f}  {losses}"
            f"   ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        results = {n: results[n] for n in found if n in results}
        content = {"plan": vars(plan), "models": results}
        (given.output / "results.json").write_text(json.dumps(content, indent=1))
    draw(results, given.output / "results.png")
    return results


if __name__ == "__main__":
    main()
