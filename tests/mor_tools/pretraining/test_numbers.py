"""What a run of the pretraining script does, against numbers worked out by hand.

The other tests compare runs with one another, and what is wrong in all of them alike escapes them.
Here the expected numbers come from formulas, from plain PyTorch, and from the files that a run read.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mor_layers import MoRTransformer, load_model, save_model
from mor_layers.weights import open_model
from mor_megatron.checkpoints import open_checkpoint
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.models import build
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import SMALL, TINY, history, pretrain_on_rank

STEPS, WARMUP, DECAY, RATE, FINAL_RATE, WEIGHT_DECAY = 6, 2, 3, 4e-3, 1e-3, 25.0
RATES = [2e-3, 4e-3, 4e-3, 3e-3, 2e-3, 1e-3]
"""Of each step: up to RATE in WARMUP steps, and down to FINAL_RATE in the last DECAY steps."""
CAPACITY_WARMUP = 3
COMMON = [
    *(change for change in SMALL if not change.startswith("recursion.router.")),
    "model.moe=null",
    "data.vocabulary_size=384",  # so that no row of the embedding is padding, which costs loss
    f"training.steps={STEPS}",
    f"training.warmup_steps={WARMUP}",
    f"training.decay_steps={DECAY}",
    f"training.learning_rate={RATE}",
    f"training.final_learning_rate={FINAL_RATE}",
    f"training.weight_decay={WEIGHT_DECAY}",
    "training.checkpoint_every=1",
    "evaluation.every=6",
    "evaluation.batches=2",
    "log_every=1",
]
EXPERT_CHOICE = [
    "data.reset_attention_mask=false",  # a share is then one of the whole sequence
    f"recursion.router.warmup_steps={CAPACITY_WARMUP}",
    "recursion.router.alpha=1",  # lets the choice weigh enough for both validation losses to differ
]
BIAS_STEP = 0.05
TOKEN_CHOICE = [
    "recursion.router.type=token_choice",
    "recursion.router.balancing=loss_free",
    f"recursion.router.balancing_coefficient={BIAS_STEP}",
]


@dataclass(frozen=True)
class Run:
    """A run that stopped after two steps and went on."""

    arguments: list[str]
    folder: Path
    initial: dict[str, Tensor]
    """Weights that it began with."""

    def weights(self, step: int) -> dict[str, Tensor]:
        """Those of the checkpoint of a step."""
        weights = open_checkpoint(self.folder / "checkpoints" / f"step_{step:08d}").weights
        return {name: weights[name] for name in weights}


def varied_text(folder: Path) -> list[str]:
    """Settings that name a text of few letters whose tokenizer gets as many tokens as it may have."""
    source = random.Random(3)
    words = ["".join(source.choices("abcdefgh", k=source.randint(2, 6))) for _ in range(200)]
    lines = (json.dumps({"text": " ".join(source.choices(words, k=30))}) for _ in range(60))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return [f"data.path={folder}/text.jsonl", f"data.prepared_folder={folder}/prepared"]


def run_in(pool: WorkerPool, folder: Path, changes: list[str]) -> Run:
    settings = [*varied_text(folder), *COMMON, *changes, f"output={folder / 'run'}"]
    arguments = ["--config", TINY, *settings]
    torch.manual_seed(5)
    model = MoRTransformer(
        build.decoder_config(load_settings(arguments), vocab_size(pool, arguments))
    )
    save_model(model, folder / "initial")
    arguments.append(f"training.initial_weights={folder / 'initial'}")
    pool.run(pretrain_on_rank, arguments=[*arguments, "training.stop_after=2"])
    printed = pool.run(pretrain_on_rank, arguments=arguments)[0]
    assert f"resumed at step 2 of {STEPS}" in printed
    return Run(arguments, folder / "run", {n: t.clone() for n, t in model.state_dict().items()})


def vocab_size(pool: WorkerPool, arguments: list[str]) -> int:
    return pool.run(text_of_a_run, arguments=arguments)[0][0]


def text_of_a_run(*, arguments: list[str]) -> tuple[int, set[int], list[dict[str, Tensor]]]:
    """On a rank: size of the vocabulary, every token id of the text, held-out micro-batches."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from mor_megatron.platform import cpu
    from mor_tools.pretraining import distributed
    from mor_tools.pretraining.data.datasets import batches, build_datasets
    from mor_tools.pretraining.data.text import TextTokenizer, prepare

    cpu.enable()
    settings = load_settings(arguments)
    text = prepare(settings.data)
    tokenizer = TextTokenizer(text.tokenizer, settings.data.end_of_document)
    documents = IndexedDataset(str(text.prefix))
    ids = set(numpy.concatenate([documents[i] for i in range(len(documents))]).tolist())
    with distributed.model_parallel(settings):
        data = build_datasets(settings, text, tokenizer)
        held_out = list(batches(data.held_out, settings))
    return tokenizer.vocab_size, ids, held_out


@pytest.fixture(scope="module")
def expert_choice(pool: WorkerPool, tmp_path_factory) -> Run:
    return run_in(pool, tmp_path_factory.mktemp("expert_choice"), EXPERT_CHOICE)


@pytest.fixture(scope="module")
def token_choice(pool: WorkerPool, tmp_path_factory) -> Run:
    return run_in(pool, tmp_path_factory.mktemp("token_choice"), TOKEN_CHOICE)


def test_the_learning_rate_rises_stays_and_falls_to_the_final_one(expert_choice: Run):
    found = [row["learning_rate"] for row in history(expert_choice.folder)]
    assert found == pytest.approx(RATES, rel=1e-9)


def test_matrices_decay_with_the_learning_rate_and_vectors_do_not(pool, expert_choice: Run):
    """Adam's first step moves a number by the learning rate at most, so what is more is decay."""
    before, after = expert_choice.initial, expert_choice.weights(1)
    assert set(before) == set(after)
    slack = 1e-6
    for name, weight in before.items():
        if not weight.is_floating_point() or name.endswith(".bars"):
            continue
        kept = 1 - RATES[0] * WEIGHT_DECAY if weight.dim() > 1 else 1.0
        moved = (after[name] - kept * weight).abs()
        assert moved.max() <= RATES[0] + slack, name
        if weight.dim() == 1:  # ones at first, so 5 % of decay would show
            assert moved.max() > 0.9 * RATES[0], name
    # A row of the embedding that no text asks for has no gradient: nothing but decay moves it.
    _, ids, _ = pool.run(text_of_a_run, arguments=expert_choice.arguments)[0]
    name = "embedding.weight"
    unseen = sorted(set(range(len(before[name]))) - ids)
    assert len(unseen) > 50
    last = expert_choice.weights(STEPS)
    kept = math.prod(1 - rate * WEIGHT_DECAY for rate in RATES)
    torch.testing.assert_close(last[name][unseen], kept * before[name][unseen], rtol=1e-5, atol=0)


def shares_by_hand(steps: int, final: list[float], sequence: int = 32) -> list[list[float]]:
    """Share of the tokens that run each recursion step, at each optimizer step."""
    rows = []
    for step in range(steps):
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / CAPACITY_WARMUP)))
        shares = [share + (1 - share) * left for share in final]
        rows.append([max(1, math.floor(share * sequence)) / sequence for share in shares])
    return rows


def shares_of(folder: Path) -> list[list[float]]:
    return [row["routing"]["shares"] for row in history(folder)]


def test_capacities_warm_up_along_the_cosine_through_a_stop(expert_choice: Run):
    expected = shares_by_hand(STEPS, [1.0, 0.5])
    assert [row[1] for row in expected] == [1.0, 28 / 32, 20 / 32, 0.5, 0.5, 0.5]
    assert shares_of(expert_choice.folder) == expected


STEPS_AS_STAGES = ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"]
DEEPENED = [
    "model.num_unrolled_layers=5",
    "recursion.num_recursions=3",
    "recursion.router.type=deepened",
    "recursion.router.extra_steps=1",
    f"recursion.router.router={{type: expert_choice, warmup_steps: {CAPACITY_WARMUP}}}",
]


@pytest.mark.parametrize(
    ("ranks", "changes", "final"),
    [
        pytest.param(
            2,
            [*EXPERT_CHOICE, *STEPS_AS_STAGES],
            [1.0, 0.5],
            id="steps as stages",
            marks=pytest.mark.full,
        ),
        pytest.param(2, EXPERT_CHOICE, [1.0, 0.5], id="two copies", marks=pytest.mark.full),
        # A deepened router asks the trained one's last step for each further one.
        pytest.param(1, [EXPERT_CHOICE[0], *DEEPENED], [1.0, 0.5, 0.5], id="deepened"),
    ],
)
def test_capacities_warm_up_in_every_layout(pool, tmp_path, ranks, changes, final):
    output = tmp_path / "run"
    few = ["training.steps=4", "training.decay_steps=1", "training.checkpoint_every=4"]
    arguments = ["--config", TINY, *varied_text(tmp_path), *COMMON, *changes, *few]
    pool.run(pretrain_on_rank, ranks, arguments=[*arguments, f"output={output}"])
    assert shares_of(output) == shares_by_hand(4, final)
    weights = open_model(output / "model").weights
    (counter,) = (name for name in weights if name.endswith("training_steps"))
    assert weights[counter].item() == 4


def test_a_checkpoint_counts_the_steps_of_its_router(expert_choice: Run):
    name = "recursions.0.router.training_steps"
    found = [expert_choice.weights(step)[name].item() for step in range(1, STEPS + 1)]
    assert found == list(range(1, STEPS + 1))
    assert open_model(expert_choice.folder / "model").weights[name].item() == STEPS


def test_a_loss_free_bias_moves_by_its_step_against_the_shares(token_choice: Run):
    bias = [0.0, 0.0]
    for step, (first, second) in enumerate(shares_of(token_choice.folder), start=1):
        assert first == 1.0
        ended = [first - second, second]  # share of the tokens that took one step, and two
        for depth, share in enumerate(ended):
            bias[depth] += BIAS_STEP * ((share < 0.5) - (share > 0.5))
        found = token_choice.weights(step)["recursions.0.router.depth_bias"]
        assert found.tolist() == pytest.approx(bias, abs=1e-6), step
    assert any(bias)


@pytest.mark.parametrize("name", ["expert_choice", "token_choice"])
def test_held_out_losses_are_those_of_plain_pytorch(pool, request, name):
    """The saved model, on the held-out text, routed as in training and as in generation."""
    run: Run = request.getfixturevalue(name)
    _, _, held_out = pool.run(text_of_a_run, arguments=run.arguments)[0]
    held_out = held_out[: 2 * 4]  # evaluation.batches of training.global_batch_size
    model = load_model(run.folder / "model").eval()
    losses = [loss_in_torch(model, held_out, causal) for causal in (False, True)]
    row: dict[str, Any] = history(run.folder)[-1]
    found = [row["validation_loss"], row["causal_validation_loss"]]
    assert found == pytest.approx(losses, rel=1e-5)
    if name == "expert_choice":  # a depth that depends on later tokens gives another loss
        assert abs(losses[0] - losses[1]) > 1e-3


@torch.no_grad()
def loss_in_torch(model: MoRTransformer, held_out: list[dict[str, Tensor]], causal: bool) -> float:
    losses = []
    for batch in held_out:
        assert batch["loss_mask"].all()
        given = batch["tokens"], batch["labels"], batch.get("documents")
        output = model(*given, causal_routing=causal)
        assert output.lm_loss is not None
        losses.append(output.lm_loss.item())
    return sum(losses) / len(losses)
