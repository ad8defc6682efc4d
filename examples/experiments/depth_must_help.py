"""Does a model spend depth where depth must help? Pointer chasing, with the number of hops known.

    python examples/experiments/depth_must_help.py --output runs/depth_must_help
    python examples/experiments/depth_must_help.py --task sums
    python examples/experiments/depth_must_help.py --quick

A sequence lists the edges of a random cycle through eight nodes in random order, and then asks
questions "which node is k hops from node a?", with k from 1 to 3 drawn for each. A step of the
recursion, which is one layer, can follow one edge, so a question needs k steps. An edge needs one
step, and later steps must still see it. They do, because all models use `recursive_sharing`: keys
and values of the first step serve all later ones. (With six nodes there are so few cycles that one
layer learns all of them by heart.) With `--task sums`, every edge also has a number, 0 or 1, and the
question is what the numbers of the next k edges add up to: sums of varying length, of which each term is
found only by following the edge before. They are not taken modulo anything: of such a sum, one term
alone says nothing, and in the same number of steps no depth learned more than the first.

All models have the same layer and are trained on the same sequences. Fixed depth 1 to 3 and random
depth are the baselines. Two models are trained at full depth and exit only when they answer: `fixed
prior` has a loss after every step, all equally weighted (arXiv 2607.20519), and `oracle depth` has
one after the first step that is right, and after the last (after arXiv 2609.03379). Their questions
exit when the model is confident, or when a halting head says so, which was taught in the same run at
which steps the answer is right. Finished runs are kept in results.json, so that an interrupted
experiment resumes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RandomDepth,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.generation import calibrate, with_early_exit
from mor_layers.routers import Confidence, Criterion
from mor_tools.comparison.statistics import Difference

HOPS = 3
"""Most hops that are asked for, and steps that adaptive models may take."""
EXPERT_CHOICE = "expert-choice"
PRIOR = "fixed prior"
ORACLE = "oracle depth"
FULL_DEPTH = (PRIOR, ORACLE)
"""Models that are trained at full depth, and exit afterwards."""
BY_CONFIDENCE, BY_HEAD = "exit by confidence", "exit by halting head"
FIXED = tuple(f"fixed depth {depth}" for depth in range(1, HOPS + 1))
NO_ANSWER = -100
Task = Literal["hops", "sums"]
"""What is asked for: the node that is k hops away, or the sum of the numbers of the k edges."""


@dataclass(frozen=True)
class Plan:
    """How long and how large."""

    steps: int = 1100
    """Optimizer steps."""
    seeds: int = 3
    batch: int = 32
    nodes: int = 8
    questions: int = 32
    """Questions per sequence."""
    hidden_size: int = 32
    learning_rate: float = 1e-2
    evaluation_batches: int = 20
    confidence: float = 0.9
    """Probability, of the likeliest answer or of being right, at which a question exits."""
    task: Task = "hops"

    @property
    def numbers(self) -> int:
        """How many different numbers an edge can have: of sums, 0 and 1."""
        return 2 if self.task == "sums" else 1

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.nodes + self.questions

    @property
    def vocabulary(self) -> int:
        """Tokens: every edge with every number, and every start with every number of hops. Answers,
        which are nodes or sums, are the first of them."""
        return self.nodes**2 * self.numbers + self.nodes * HOPS

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the tokens that need each step: all the first, then questions not yet answered."""
        late = (self.questions * (HOPS - step) / HOPS / self.length for step in range(1, HOPS))
        return (1.0, *late)


QUICK = Plan(steps=4, seeds=2, batch=4, evaluation_batches=2)


@dataclass(frozen=True)
class Batch:
    """Sequences and what is known about them."""

    ids: Tensor
    """`[b s]`"""
    answers: Tensor
    """`[b s]`: the node or the sum that is asked for; `NO_ANSWER` at edges."""
    hops: Tensor
    """`[b s]`: the hops that are asked for; 0 at edges."""


@dataclass
class Outcome:
    """What one model with one seed reached on the evaluation sequences."""

    accuracy: float = float("nan")
    by_hops: list[float] = field(default_factory=list)
    """Accuracy of the questions of 1, 2, ... hops."""
    mean_depth: float = float("nan")
    """Steps per token."""
    question_depth: float = float("nan")
    """Steps per question."""
    depth_by_hops: list[float] = field(default_factory=list)
    """Mean steps of the questions of 1, 2, ... hops."""


def answers_of(following: Tensor, numbers: Tensor | None, starts: Tensor, hops: Tensor) -> Tensor:
    """The answers to questions, `[b q]`.

    Args:
        following: the node after each node, `[b n]`.
        numbers: that of the edge that leaves each node, `[b n]`; None: the node is asked for.
        starts: node at which each question starts, `[b q]`.
        hops: edges that each question follows, `[b q]`.
    """
    nodes, sums = starts, torch.zeros_like(starts)
    for hop in range(HOPS):
        if numbers is not None:
            sums = torch.where(hops > hop, sums + numbers.gather(1, nodes), sums)
        nodes = torch.where(hops > hop, following.gather(1, nodes), nodes)
    return nodes if numbers is None else sums


def draw_batch(plan: Plan, generator: torch.Generator) -> Batch:
    """Random sequences."""
    b, n = plan.batch, plan.nodes
    order = torch.rand(b, n, generator=generator).argsort(dim=-1)
    following = torch.empty_like(order).scatter_(1, order, order.roll(-1, dims=1))
    listed = torch.rand(b, n, generator=generator).argsort(dim=-1)
    starts = torch.randint(n, (b, plan.questions), generator=generator)
    hops = torch.randint(1, HOPS + 1, (b, plan.questions), generator=generator)
    edges, numbers = listed * n + following.gather(1, listed), None
    if plan.task == "sums":
        numbers = torch.randint(plan.numbers, (b, n), generator=generator)
        edges = edges * plan.numbers + numbers.gather(1, listed)
    answers = answers_of(following, numbers, starts, hops)
    questions = n * n * plan.numbers + starts * HOPS + hops - 1
    return Batch(
        torch.cat([edges, questions], dim=1),
        torch.cat([torch.full_like(edges, NO_ANSWER), answers], dim=1),
        torch.cat([torch.zeros_like(edges), hops], dim=1),
    )


def models(plan: Plan) -> dict[str, DecoderConfig]:
    """The models that are trained."""

    def looped(depth: int, router: RouterConfig) -> DecoderConfig:
        recursion = RecursionConfig(depth, "cycle", router, kv_policy="recursive_sharing")
        h = plan.hidden_size
        return DecoderConfig(
            plan.vocabulary, h, 2 * h, depth, 2, rope_base=1e5, recursion=recursion
        )

    shares = plan.shares
    kept = tuple(later / share for share, later in pairwise(shares))
    found = {name: looped(d, FixedDepth()) for d, name in enumerate(FIXED, start=1)}
    found |= {
        "random depth": looped(HOPS, RandomDepth(shares)),
        EXPERT_CHOICE: looped(HOPS, ExpertChoice(capacity_factors=shares)),
        "token-choice": looped(HOPS, TokenChoice()),
        "depth and width": looped(HOPS, DepthAndWidth(continue_shares=kept)),
    }
    found |= {name: looped(HOPS, FixedDepth()) for name in FULL_DEPTH}
    return found


class HaltingHead(nn.Module):
    """Predicts from a state after a step whether its read-out is right."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.scorer = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Logits `[...]` of states `[... h]`."""
        return self.scorer(F.rms_norm(states, states.shape[-1:]))[..., 0]


@dataclass(frozen=True)
class Taught(Criterion):
    """Stop once the read-out is right with this probability, according to the halting head."""

    head: HaltingHead
    threshold: float
    numbers = 0

    def observe(self, hidden: Tensor, read_out: Callable[[Tensor], Tensor]) -> Tensor:
        return self.head(hidden.float())[..., None]

    def is_met(self, *observed: Tensor) -> Tensor:
        return observed[-1][..., 0].sigmoid() >= self.threshold


@contextmanager
def states_after_steps(model: MoRTransformer) -> Iterator[list[Tensor]]:
    """The states `[s b h]` after each step of the forward passes within the context."""
    states: list[Tensor] = []
    layers = model.recursions[0].layers
    handle = layers.register_forward_hook(lambda _, arguments, output: states.append(output))
    try:
        yield states
    finally:
        handle.remove()


def losses_of_steps(
    name: str, model: MoRTransformer, head: HaltingHead, states: list[Tensor], batch: Batch
) -> Tensor:
    """The loss of a model of `FULL_DEPTH`, and that of its halting head.

    The head's targets are whether the answer that the step gives is right; an edge, which has nothing
    to answer, may always stop. Its states are detached, so that it changes nothing in the model.
    """
    is_asked = batch.answers != NO_ANSWER
    after = torch.stack(states).transpose(1, 2)  # [r s b h] -> [r b s h]
    logits = model.output(model.norm(after))
    is_right = (logits.argmax(dim=-1) == batch.answers) | ~is_asked  # [r b s]
    taught = F.binary_cross_entropy_with_logits(head(after.detach()), is_right.float())
    answers = batch.answers.expand(len(states), -1, -1)
    answering = F.cross_entropy(
        logits.flatten(0, 2), answers.flatten(), ignore_index=NO_ANSWER, reduction="none"
    ).view(is_right.shape)[:, is_asked]  # [r q], of the questions
    if name == PRIOR:
        return answering.mean() + taught
    can_stop = is_right[:, is_asked].clone()
    can_stop[-1] = True  # where no step is right
    first = can_stop.byte().argmax(dim=0, keepdim=True)
    return (answering.gather(0, first) + answering[-1]).mean() / 2 + taught


def initialize(model: MoRTransformer, plan: Plan) -> None:
    """Draw weights for a narrow model, whose tokens begin as sums of what they consist of.

    A deviation of 0.02, which suits wide models, would take a width of 32 several times as many
    steps. An edge begins as its source plus its target, and its number if it has one, a question as its
    start, a source, plus its hops.
    """
    n, h = plan.nodes, plan.hidden_size
    values = plan.numbers if plan.task == "sums" else 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".router." not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    parts = nn.init.orthogonal_(torch.empty(2 * n + HOPS + values, h)) * h**0.5
    sources, targets, hops, numbers = parts.split([n, n, HOPS, values])
    edges = sources[:, None] + targets[None]
    if values:
        edges = edges.flatten(0, 1)[:, None] + numbers[None]
    questions = sources[:, None] + hops[None]
    tokens = torch.cat([edges.flatten(0, 1), questions.flatten(0, 1)])
    with torch.no_grad():
        model.embedding.weight.copy_(tokens)


def train(
    name: str, config: DecoderConfig, seed: int, plan: Plan
) -> tuple[MoRTransformer, HaltingHead]:
    """One model from one seed, with a halting head that only models of `FULL_DEPTH` teach."""
    torch.manual_seed(seed)
    model, head = MoRTransformer(config), HaltingHead(plan.hidden_size)
    initialize(model, plan)
    parameters = [*model.parameters(), *(head.parameters() if name in FULL_DEPTH else ())]
    optimizer = torch.optim.AdamW(parameters, plan.learning_rate, (0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:  # warm-up over a tenth of the steps, decay over the last third
        return min(1.0, 10 * (step + 1) / plan.steps, 3 * (plan.steps - step) / plan.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(plan.steps):
        batch = draw_batch(plan, generator)
        with states_after_steps(model) as states:
            output = model(batch.ids)
        if name in FULL_DEPTH:
            loss = losses_of_steps(name, model, head, states, batch)
        else:
            is_asked = batch.answers != NO_ANSWER
            loss = F.cross_entropy(output.logits[is_asked], batch.answers[is_asked])
            loss = sum(output.losses.values(), loss)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        model.advance([output])
    return model, head


@torch.no_grad()
def evaluate(model: MoRTransformer, plan: Plan) -> Outcome:
    """Accuracy and depth on sequences that are the same for all models, routed as in generation."""
    model.eval()
    generator = torch.Generator().manual_seed(10_000)
    right, depths, hops = [], [], []
    for _ in range(plan.evaluation_batches):
        batch = draw_batch(plan, generator)
        output = model(batch.ids, causal_routing=True)
        right.append(output.logits.argmax(dim=-1) == batch.answers)
        depths.append(output.depths)
        hops.append(batch.hops)
    is_right, depth, asked = torch.cat(right), torch.cat(depths).float(), torch.cat(hops)

    def by_hops(values: Tensor) -> list[float]:
        return [float(values[asked == number].float().mean()) for number in range(1, HOPS + 1)]

    is_question = asked > 0
    return Outcome(
        float(is_right[is_question].float().mean()),
        by_hops(is_right),
        float(depth.mean()),
        float(depth[is_question].mean()),
        by_hops(depth),
    )


def outcomes(name: str, config: DecoderConfig, seed: int, plan: Plan) -> dict[str, Outcome]:
    """What a trained model reaches, in each of the ways in which its tokens can exit."""
    model, head = train(name, config, seed, plan)
    if name == EXPERT_CHOICE:  # its thresholds for generation, on other sequences
        generator = torch.Generator().manual_seed(20_000)
        calibrate(model, (draw_batch(plan, generator).ids for _ in range(4)))
    found = {name: evaluate(model, plan)}
    if name in FULL_DEPTH:
        exits = {
            BY_CONFIDENCE: Confidence(plan.confidence),
            BY_HEAD: Taught(head, plan.confidence),
        }
        for way, criterion in exits.items():
            with_early_exit(model, criterion)
            found[f"{name}, {way}"] = evaluate(model, plan)
    return found


def verdict(results: dict[str, list[Outcome]]) -> list[str]:
    """Which adaptive models reach the best fixed depth's accuracy, and with which share of its steps."""
    accuracy = {name: statistics.fmean(o.accuracy for o in runs) for name, runs in results.items()}
    best = max((name for name in results if name in FIXED), key=lambda name: accuracy[name])
    depth, reference = FIXED.index(best) + 1, [o.accuracy for o in results[best]]
    told = [f"best fixed depth: {best}, accuracy {accuracy[best]:.3f}"]
    for name, runs in results.items():
        if name in FIXED or name in FULL_DEPTH:
            continue
        difference = Difference.between([o.accuracy for o in runs], reference)
        share = statistics.fmean(o.mean_depth for o in runs) / depth
        asked = statistics.fmean(o.question_depth for o in runs) / depth
        rises = all(a < b for o in runs for a, b in pairwise(o.depth_by_hops))
        told.append(
            f"{name}: accuracy {difference.verdict()}; {share:.2f} of the steps ({asked:.2f} of those "
            f"of questions); depth {'rises' if rises else 'does not rise'} with the number of hops in "
            "every seed"
        )
    return told


def markdown(results: dict[str, list[Outcome]]) -> str:
    """The table of results: mean ± standard deviation over the seeds."""
    lines = ["| model | accuracy | 1 / 2 / 3 hops | steps per token | per question | by hops |"]
    lines.append("|---|---|---|---|---|---|")
    for name, runs in results.items():
        columns = zip(*(o.by_hops for o in runs), strict=True)
        right = " / ".join(f"{statistics.fmean(column):.2f}" for column in columns)
        columns = zip(*(o.depth_by_hops for o in runs), strict=True)
        depth = " / ".join(f"{statistics.fmean(column):.2f}" for column in columns)
        lines.append(
            f"| {name} | {_spread([o.accuracy for o in runs])} | {right} | "
            f"{statistics.fmean(o.mean_depth for o in runs):.2f} | "
            f"{statistics.fmean(o.question_depth for o in runs):.2f} | {depth} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def draw(results: dict[str, list[Outcome]], path: Path) -> None:
    """Accuracy against depth with every seed, and depth and accuracy by the number of hops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (spent, given, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    colors = plt.get_cmap("tab20")
    hops = range(1, HOPS + 1)
    for index, (name, runs) in enumerate(results.items()):
        if name in FULL_DEPTH:
            continue  # the same model as with exits, at full depth
        color, marker = colors(index), "s" if name in FIXED else "o"
        x, y = [o.mean_depth for o in runs], [o.accuracy for o in runs]
        spent.plot(x, y, marker, color=color, label=name)
        if name not in FIXED:
            depths = zip(*(o.depth_by_hops for o in runs), strict=True)
            given.plot(hops, list(map(statistics.fmean, depths)), "o-", color=color, label=name)
        accuracy = zip(*(o.by_hops for o in runs), strict=True)
        style = "s--" if name in FIXED else "o-"
        right.plot(hops, list(map(statistics.fmean, accuracy)), style, color=color)
    spent.set_xlabel("steps per token")
    spent.set_ylabel("accuracy (every seed)")
    spent.legend(fontsize=7)
    given.set_xlabel("hops that are asked for")
    given.set_ylabel("steps per question (mean over the seeds)")
    right.set_xlabel("hops that are asked for")
    right.set_ylabel("accuracy (mean over the seeds)")
    for axes in (given, right):
        axes.set_xticks(list(hops))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, list[Outcome]]:
    """Train everything that is not done, print a table, write results.json and results.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=get_args(Task), default="hops", help="what is asked for")
    parser.add_argument("--output", type=Path, help="default: runs/depth_must_help[_sums]")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seeds", type=int, help="how many seeds")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows it works")
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else Plan()
    changed = {n: getattr(given, n) for n in ("steps", "seeds", "task") if getattr(given, n)}
    plan = replace(plan, **changed)
    ending = "" if plan.task == "hops" else f"_{plan.task}"
    output = given.output or Path(f"runs/depth_must_help{ending}")
    output.mkdir(parents=True, exist_ok=True)
    file, configs = output / "results.json", models(plan)
    fixed = {key: value for key, value in asdict(plan).items() if key != "seeds"}
    stored: dict[str, Any] = {"plan": fixed, "runs": {}, "seconds": 0.0}
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["plan"] != fixed:
            parser.error(f"{file} has runs of another plan. Choose another --output.")
    wanted = [(name, seed, plan) for seed in range(plan.seeds) for name in configs]
    missing = [run for run in wanted if f"{run[0]}, seed {run[1]}" not in stored["runs"]]
    with _mapped(given.processes) as mapped:
        for name, seed, found, seconds in mapped(_run, missing):
            stored["runs"][f"{name}, seed {seed}"] = {n: asdict(o) for n, o in found.items()}
            stored["seconds"] += seconds
            file.write_text(json.dumps(stored, indent=1))
            shown = "; ".join(
                f"{n}: accuracy {o.accuracy:.3f}, {o.mean_depth:.2f} steps"
                for n, o in found.items()
            )
            print(f"seed {seed}: {shown} ({seconds:.0f} s)", flush=True)
    results = _by_model(stored["runs"], configs, plan.seeds)
    print(markdown(results), *verdict(results), sep="\n")
    print(f"{stored['seconds']:.0f} seconds of processor time")
    draw(results, output / "results.png")
    return results


@contextmanager
def _mapped(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` that works in this process or in several, and yields results as they come."""
    if processes == 1:
        yield map
        return
    with get_context("spawn").Pool(processes) as pool:
        yield pool.imap_unordered


def _run(run: tuple[str, int, Plan]) -> tuple[str, int, dict[str, Outcome], float]:
    """One model from one seed: its outcomes, and seconds of processor time."""
    name, seed, plan = run
    torch.set_num_threads(1)
    start = time.process_time()
    found = outcomes(name, models(plan)[name], seed, plan)
    return name, seed, found, time.process_time() - start


def _by_model(
    runs: dict[str, Any], configs: dict[str, DecoderConfig], seeds: int
) -> dict[str, list[Outcome]]:
    """The outcomes of all seeds by model and way to exit."""
    results: dict[str, list[Outcome]] = {}
    for name in configs:
        for seed in range(seeds):
            for way, values in runs[f"{name}, seed {seed}"].items():
                results.setdefault(way, []).append(Outcome(**values))
    return results


if __name__ == "__main__":
    main()
