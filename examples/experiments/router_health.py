"""Are routers healthy? Dead tokens, foreseen selections and balance, against published figures.

    python examples/experiments/router_health.py --output runs/router_health
    python examples/experiments/router_health.py --quick

Small models of 1 + 2 × 3 + 1 layers learn the text that ships with Python, each with another router, and
are then inspected on held-out text. What is measured is what arXiv 2507.10524 reports of its models
of 360M parameters and three recursions: tokens that no sequence sends to the last step, how often
expert choice's causal prediction agrees with its selection, and how evenly token choice chooses depths.
Finished runs are kept in results.json, so that an interrupted experiment resumes.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoRTransformer,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.inspection import inspect_text
from mor_tools.comparison.statistics import Spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.text_pieces import TextPieces, training_step

STEPS = 3
BLOCK_SIZE = 2


@dataclass(frozen=True)
class Plan:
    """How long and how large."""

    steps: int = 250
    """Optimizer steps."""
    seeds: int = 3
    batch: int = 8
    length: int = 128
    hidden_size: int = 96
    vocabulary: int = 2048
    learning_rate: float = 5e-3
    warmup_steps: int = 40
    """Of expert choice's capacities."""
    windows: int = 256
    """Held-out sequences that are inspected."""


QUICK = Plan(3, 1, 2, 16, 32, 300, warmup_steps=1, windows=4)


@dataclass(frozen=True)
class Published:
    """What the paper reports of a router; None: nothing."""

    dead: float | None = None
    agreement: float | None = None
    max_violation: float | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class Figures:
    """What one model with one seed does with held-out text."""

    dead: float
    """Share of positions at which no sequence's token runs the last step, routed as in training."""
    agreement: float | None
    """Share of the candidates of later steps for which generation decides as training does; None for
    routers that look at no later token, which always agree."""
    max_violation: float
    """MaxVio of the depths: tokens of the most frequent one over an even share, minus 1."""
    entropy: float
    """Of the shares of the depths, in nats; at most ln 3 = 1.099."""
    entropy_of_tokens: float | None
    """Mean over the tokens of the entropy of the router's distribution; None if it has none."""


def routers(plan: Plan) -> dict[str, tuple[RouterConfig, Published]]:
    """The routers, and what is published of each."""
    expert = ExpertChoice(warmup_steps=plan.warmup_steps)
    return {
        "expert choice (α = 0.1)": (expert, Published(dead=0.001, agreement=0.992)),
        "expert choice, α = 1": (replace(expert, alpha=1.0), Published(dead=0.66)),
        "token choice, balancing loss": (
            TokenChoice(),
            Published(max_violation=0.266, entropy=1.056),
        ),
    }


def train(router: RouterConfig, seed: int, text: TextPieces, plan: Plan) -> MoRTransformer:
    """One model from one seed."""
    torch.manual_seed(seed)
    recursion = RecursionConfig(STEPS, router=router)
    layers, h = 2 + BLOCK_SIZE * STEPS, plan.hidden_size
    sizes = (plan.vocabulary, h, h * 8 // 3, layers, 4, 2)
    model = MoRTransformer(DecoderConfig(*sizes, tie_embeddings=True, recursion=recursion))
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=0.1)

    def rate(step: int) -> float:
        """Warm-up over a twentieth of the steps, decay over the last third."""
        return min(1.0, 20 * (step + 1) / plan.steps, 3 * (plan.steps - step) / plan.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(plan.steps):
        ids = text.sample(text.training, plan.batch, generator)
        training_step(model, optimizer, schedule, ids)
    return model


def measure(model: MoRTransformer, ids: Tensor, window: int) -> Figures:
    """What a model does with a text `[t]`, cut into windows."""
    seen = inspect_text(model, ids, window)
    shares = depth_shares(seen.training_depths, STEPS)
    config = model.config.recursion
    assert isinstance(config, RecursionConfig)
    return Figures(
        dead=seen.dead_shares[-1],
        agreement=None if config.router.is_causal else sum(seen.agreement[1:]) / (STEPS - 1),
        max_violation=max(shares) * STEPS - 1,
        entropy=entropy(torch.tensor(shares)),
        # Token choice's scores are the probabilities of the depths.
        entropy_of_tokens=entropy(seen.scores.T)
        if isinstance(config.router, TokenChoice)
        else None,
    )


def depth_shares(depths: Tensor, steps: int) -> list[float]:
    """Shares of the tokens that end at each of the depths 1 to `steps`, among those of them that run."""
    counts = depths.bincount(minlength=steps + 1)[1:].double()
    return (counts / counts.sum()).tolist()


def entropy(probabilities: Tensor) -> float:
    """Of distributions `[... n]` in nats, mean over them."""
    return float(torch.special.entr(probabilities.double()).sum(dim=-1).mean())


def markdown(results: dict[str, list[Figures]], plan: Plan) -> str:
    """The table of results, with the published figures beside."""
    lines = [
        "| router | dead tokens | published | agreement | published | MaxVio | published "
        "| entropy of the shares | of the tokens | published |",
        "|---" + "|---:" * 9 + "|",
    ]
    for name, (_, published) in routers(plan).items():
        found = results[name]

        def shown(figure: str, form: str, of: list[Figures] = found) -> str:
            values = [getattr(run, figure) for run in of]
            if None in values:
                return ""
            spread = Spread.of(values)
            return " ± ".join(
                format(v, form) for v in (spread.mean, spread.deviation) if v is not None
            )

        lines.append(
            f"| {name} | {shown('dead', '.1%')} | {_told(published.dead, '.1%')} "
            f"| {shown('agreement', '.1%')} | {_told(published.agreement, '.1%')} "
            f"| {shown('max_violation', '.3f')} | {_told(published.max_violation, '.3f')} "
            f"| {shown('entropy', '.3f')} | {shown('entropy_of_tokens', '.3f')} "
            f"| {_told(published.entropy, '.3f')} |"
        )
    return "\n".join(lines)


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: list[str] | None = None) -> dict[str, list[Figures]]:
    """Train and inspect what is not done, print the table, write results.json and results.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/router_health"))
    parser.add_argument("--seeds", type=int, help="how many seeds")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows it works")
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else Plan()
    plan = plan if given.seeds is None else replace(plan, seeds=given.seeds)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "results.json"
    fixed = {key: value for key, value in asdict(plan).items() if key != "seeds"}
    stored: dict[str, Any] = {"plan": fixed, "runs": {}, "seconds": 0.0}
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["plan"] != fixed:
            parser.error(f"{file} has runs of another plan. Choose another --output.")
    text = TextPieces(plan.vocabulary, plan.length)
    passage = text.held_out[: plan.windows * plan.length]
    for seed in range(plan.seeds):
        for name, (router, _) in routers(plan).items():
            if f"{name}, seed {seed}" in stored["runs"]:
                continue
            begin = time.process_time()
            figures = measure(train(router, seed, text, plan), passage, plan.length)
            stored["runs"][f"{name}, seed {seed}"] = asdict(figures)
            stored["seconds"] += time.process_time() - begin
            file.write_text(json.dumps(stored, indent=1))
            print(f"seed {seed}, {name}: {_line(figures)}", flush=True)
    results = {
        name: [Figures(**stored["runs"][f"{name}, seed {seed}"]) for seed in range(plan.seeds)]
        for name in routers(plan)
    }
    table = markdown(results, plan)
    print(table)
    print(f"{stored['seconds']:.0f} seconds of processor time")
    (given.output / "results.md").write_text(table + "\n")
    return results


def _line(figures: Figures) -> str:
    values = {name: v for name, v in asdict(figures).items() if v is not None}
    return ", ".join(f"{name} {v:.3f}" for name, v in values.items() if math.isfinite(v))


if __name__ == "__main__":
    main()
