"""Which ingredient of looped models lowers the loss on text? A comparison at equal FLOPs.

    python examples/experiments/text_at_equal_flops.py --output runs/text_at_equal_flops
    python examples/experiments/text_at_equal_flops.py --quick

`mor compare` trains every model twice over. First, one seed of each with several learning rates, for a
share of the budget: the same search for all, in which a model whose best rate is the lowest or the
highest tries one more beyond it. Then three seeds of each, with the best of these. All have eight
unrolled layers and spend the training FLOPs of the plain one. A loop is compared with the plain
model of its kind, dense or of experts, and every ingredient with the loop that lacks it, seed by seed.
Started again, the script keeps the runs that are done.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mor_tools.comparison.statistics import Difference, Spread


@dataclass(frozen=True)
class Plan:
    """How long and how large."""

    steps: int = 500
    """Optimizer steps of the plain model; others take as many as its FLOPs allow."""
    tuning_share: float = 0.4
    """Of the budget, for each learning rate."""
    learning_rates: tuple[float, ...] = (2e-3, 5e-3, 1.25e-2)
    seeds: int = 3
    hidden_size: int = 96
    length: int = 128
    batch: int = 8
    vocabulary: int = 2048


QUICK = Plan(8, 0.5, (2e-3, 5e-3), 1, 32, 32, 2, 300)


@dataclass(frozen=True)
class Family:
    """A kind of model, by what its settings have beside those that all have."""

    base: str | None
    """The family that it is compared with; None for the plain dense model."""
    recursion: dict[str, Any] | None = None
    num_experts: int = 0
    model: dict[str, Any] = field(default_factory=dict)


DENSE_LOOP: dict[str, Any] = {"num_recursions": 3, "router": {"type": "fixed_depth"}}
"""1 + 2 × 3 + 1 layers."""
EXPERT_LOOP: dict[str, Any] = {
    "num_recursions": 2,
    "prelude_layers": 2,
    "coda_layers": 2,
    "router": {"type": "fixed_depth"},
    "expert_routers": "per_step",
}
"""2 + 2 × 2 + 2 layers, so that six layers of eight experts have the parameters of eight of six."""
OWN_ATTENTION: dict[str, Any] = {**EXPERT_LOOP, "own_per_step": ["attention"], "share_norms": False}
HYPER: dict[str, Any] = {"hyper_connections": {"streams": 4}}
MODULATION: dict[str, Any] = {"norm_modulation": {"rank": 8}}
SCALING: dict[str, Any] = {"residual_scale": 1.0}
HISTORY: dict[str, Any] = {"history": {"window": 1}}

FAMILIES = {
    "plain": Family(None),
    "loop": Family("plain", DENSE_LOOP),
    "loop_hyper": Family("loop", DENSE_LOOP | HYPER),
    "loop_modulated": Family("loop", DENSE_LOOP | MODULATION),
    "loop_scaled": Family("loop", DENSE_LOOP | SCALING),
    "loop_history": Family("loop", DENSE_LOOP | HISTORY),
    "mor": Family("loop", DENSE_LOOP | {"router": {"type": "expert_choice", "warmup_steps": 40}}),
    "experts": Family("plain", num_experts=6),
    "expert_loop": Family("experts", EXPERT_LOOP, 8),
    "expert_loop_own": Family("experts", OWN_ATTENTION, 8),
    "expert_loop_own_hyper": Family("expert_loop_own", OWN_ATTENTION | HYPER, 8),
    "expert_loop_own_modulated": Family(
        "expert_loop_own", {**OWN_ATTENTION, "share_norms": True} | MODULATION, 8
    ),
    "expert_loop_own_scaled": Family("expert_loop_own", OWN_ATTENTION | SCALING, 8),
}


def settings(family: Family, plan: Plan, learning_rate: float) -> dict[str, Any]:
    """Settings of the pretraining script."""
    width = plan.hidden_size
    model: dict[str, Any] = {
        "hidden_size": width,
        "ffn_hidden_size": width * 8 // 3,
        "num_unrolled_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_embeddings": True,
    }
    if family.num_experts:
        model["moe"] = {
            "num_experts": family.num_experts,
            "experts_per_token": 2,
            "ffn_hidden_size": width * 4 // 3,  # two of them have the FLOPs of the dense MLP
            "dense_ends": False,
        }
    recursion = {} if family.recursion is None else {"recursion": family.recursion}
    return {
        "model": model,
        **recursion,
        "data": {"vocabulary_size": plan.vocabulary, "sequence_length": plan.length},
        "training": {
            "steps": plan.steps,
            "learning_rate": learning_rate,
            "warmup_steps": plan.steps // 20,
            "decay_steps": plan.steps * 3 // 10,
            "global_batch_size": plan.batch,
            "micro_batch_size": plan.batch,
            "checkpoint_every": plan.steps * 10,  # only at the end: runs are short
        },
        "evaluation": {"every": max(1, plan.steps // 4), "batches": 16, "sample_tokens": 0},
        "log_every": max(1, plan.steps // 20),
    }


def write_files(
    folder: Path, plan: Plan, rates: Iterable[tuple[str, float]], *, name_rates: bool
) -> list[Path]:
    """A file of settings for each family and learning rate."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, rate in rates:
        file = folder / f"{name}@{rate:g}.yaml" if name_rates else folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings(FAMILIES[name], plan, rate), sort_keys=False))
        files.append(file)
    return files


def compare(files: Sequence[Path], output: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Run, or resume, `mor compare`; its results by model."""
    command = [sys.executable, "-m", "mor_tools.commands", "compare", *map(str, files)]
    subprocess.run([*command, "--equal=flops", f"--output={output}", *options], check=True)
    found = json.loads((output / "compare.json").read_text())
    return {model["name"]: model for model in found["models"]}


def further_rates(best: dict[str, float], plan: Plan) -> list[tuple[str, float]]:
    """One more learning rate for each family whose best is at an end of the grid, as far beyond it as
    the next one is on its other side."""
    grid, further = sorted(plan.learning_rates), []
    for name, rate in best.items():
        if rate == grid[0]:
            further.append((name, grid[0] ** 2 / grid[1]))
        elif rate == grid[-1]:
            further.append((name, grid[-1] ** 2 / grid[-2]))
    return further


def best_rates(
    tuned: dict[str, dict[str, Any]], tried: Iterable[tuple[str, float]]
) -> dict[str, float]:
    """The learning rate with the lowest held-out loss, by family; of runs that did not diverge."""
    best, tried = {}, list(tried)
    for name in FAMILIES:
        losses = {
            rate: tuned[label]["held_out_loss"]["mean"]
            for family, rate in tried
            if family == name and (label := f"{name}@{rate:g}") in tuned
        }
        if not losses:
            raise RuntimeError(f"{name} diverged with every learning rate.")
        best[name] = min(losses, key=lambda rate: losses[rate])
    return best


def tune(
    pairs: list[tuple[str, float]], output: Path, plan: Plan, *options: str
) -> dict[str, dict[str, Any]]:
    """Short runs of families with learning rates; those that are done are not run again."""
    files = write_files(output / "tuning-settings", plan, pairs, name_rates=True)
    steps = f"--set=training.steps={round(plan.steps * plan.tuning_share)}"
    return compare(files, output / "tuning", "--seeds=1", steps, *options)


def losses(found: dict[str, Any]) -> dict[int, float]:
    """Held-out losses by seed."""
    return {run["seed"]: run["loss"] for run in found["runs"]}


def difference(found: dict[str, dict[str, Any]], name: str, other: str) -> Difference:
    """Between two families, over the seeds that both have."""
    ours, theirs = losses(found[name]), losses(found[other])
    seeds = sorted(ours.keys() & theirs.keys())
    return Difference.between([ours[s] for s in seeds], [theirs[s] for s in seeds])


def markdown(found: dict[str, dict[str, Any]], rates: dict[str, float]) -> str:
    """The table of results."""
    lines = [
        "| model | parameters | KV bytes per token | steps | learning rate | held-out loss "
        "| compared with | difference |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name, family in FAMILIES.items():
        if name not in found:
            continue
        model, base = found[name], family.base
        compared = "" if base not in found else difference(found, name, base).verdict()
        lines.append(
            f"| `{name}` | {model['parameters']:,} | {model['kv_bytes_per_token']:,.0f} "
            f"| {model['steps']} | {rates[name]:g} "
            f"| {Spread.of(list(losses(model).values())).shown()} | {base or ''} | {compared} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Differences with their confidence intervals, each from the model that lacks the ingredient."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(found) + 1), layout="constrained")
    names = [name for name in FAMILIES if name in found and FAMILIES[name].base in found]
    for row, name in enumerate(reversed(names)):
        base = FAMILIES[name].base
        assert base is not None
        shown = difference(found, name, base)
        axes.errorbar(
            shown.mean, row, xerr=shown.half_width or 0, fmt="o", color="tab:blue", capsize=3
        )
    labels = [f"{name} − {FAMILIES[name].base}" for name in reversed(names)]
    axes.set_yticks(range(len(names)), labels)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_xlabel("difference in held-out loss (nats per token)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run what is not done, print the table, write results.md and results.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/text_at_equal_flops"))
    parser.add_argument("--processes", type=int, default=1, help="processes of each run")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows it works")
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else Plan()
    processes = f"--processes={given.processes}"

    pairs = [(name, rate) for name in FAMILIES for rate in plan.learning_rates]
    tuned = tune(pairs, given.output, plan, processes)
    further = further_rates(best_rates(tuned, pairs), plan)
    if further:
        pairs += further
        tuned = tune(pairs, given.output, plan, processes)

    rates = best_rates(tuned, pairs)
    files = write_files(given.output / "settings", plan, rates.items(), name_rates=False)
    seeds = f"--seeds={plan.seeds}"
    found = compare(files, given.output / "runs", seeds, processes)
    table = markdown(found, rates)
    print(table)
    (given.output / "results.md").write_text(table + "\n")
    draw(found, given.output / "results.png")
    return found


if __name__ == "__main__":
    main()
