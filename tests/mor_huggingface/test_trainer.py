"""transformers' Trainer: losses, updates of routers, checkpoints, recomputation."""

from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mor_huggingface import MoRConfig, MoRForCausalLM, RouterUpdates
from mor_huggingface.training import Counts
from mor_layers import DepthAndWidth, ExpertChoice, MoEConfig, RecursionConfig, TokenChoice
from tests.mor_layers.small_models import random_ids, small_config, small_model
from tests.pairs import sweep

LEARNING_RATE = 0.01
CONFIGS = {
    "warm-up": small_config(ExpertChoice(warmup_steps=6)),
    "loss-free": small_config(TokenChoice(balancing="loss_free", balancing_coefficient=0.03)),
    "thresholds and experts": replace(
        small_config(DepthAndWidth(), kv_policy="exit_state"),
        moe=MoEConfig(4, 2, bias_update_rate=0.1),
    ),
    "experts between two recursions": replace(
        small_config(),
        num_unrolled_layers=3 + 4,
        recursion=(
            RecursionConfig(3, "cycle", ExpertChoice(warmup_steps=6), block_layers=1),
            RecursionConfig(2, block_layers=1),
        ),
        moe=MoEConfig(4, 2, bias_update_rate=0.1),
    ),
}


def wrapped(config) -> MoRForCausalLM:
    model = MoRForCausalLM(MoRConfig.from_decoder(config))
    model.model.load_state_dict(small_model(config).state_dict())
    return model


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in random_ids(16, 8)]


class InOrder(Trainer):
    def _get_train_sampler(self, *arguments):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, folder, steps=4, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no"} | options,
    )
    return InOrder(model, arguments, train_dataset=rows(), callbacks=[RouterUpdates()])


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def by_hand(config, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training as a plain loop over the core's own calls."""
    model, seen = small_model(config).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    batches = iter(random_ids(16, 8).split(2))
    for _ in range(steps):
        outputs = []
        for ids in (next(batches), next(batches)):
            labels = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], dim=1)
            outputs.append(model(ids, labels))
            (outputs[-1].loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.advance(outputs)
        seen.append(sum(output.loss.item() for output in outputs) / 2)
    return seen, model.state_dict()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_equals_a_loop_over_the_core(config, tmp_path) -> None:
    model = wrapped(config)
    before = {name: value.clone() for name, value in model.model.named_buffers()}
    run = trainer(model, tmp_path)
    run.train()
    expected, state = by_hand(config, 4)
    assert losses(run) == pytest.approx(expected, abs=1e-4)
    for name, value in model.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)
    after = dict(model.model.named_buffers())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert not model.model._forward_hooks


@pytest.mark.parametrize(
    "name", sweep([(n,) for n in CONFIGS], [("loss-free",), ("experts between two recursions",)])
)
def test_a_resumed_run_goes_on_with_its_losses(name, tmp_path) -> None:
    config = CONFIGS[name]
    whole = trainer(wrapped(config), tmp_path / "whole")
    whole.train()
    trainer(wrapped(config), tmp_path / "cut", steps=2, save_strategy="steps", save_steps=2).train()
    resumed = trainer(wrapped(replace(config)), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for one, other in zip(
        whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_recomputation_changes_nothing_but_memory(tmp_path) -> None:
    config = CONFIGS["thresholds and experts"]
    plain = trainer(wrapped(config), tmp_path)
    recomputed = trainer(wrapped(config), tmp_path, activation_checkpointing=True)
    plain.train()
    recomputed.train()
    assert recomputed.model.model.recursions[0].recompute
    assert not plain.model.model.recursions[0].recompute
    assert losses(recomputed) == losses(plain)


def test_recomputation_in_another_way_is_refused() -> None:
    model = wrapped(CONFIGS["warm-up"])
    with pytest.raises(ValueError, match="without re-entry"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers=2"):
        model.activation_checkpointing_enable(every_n_layers=2)
    assert not model.gradient_checkpointing


def test_updates_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="not a Linear"):
        RouterUpdates().on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))


def counted(config) -> dict[str, torch.Tensor]:
    """Buffers after a step whose batch the ranks share, counted on each of them."""
    model = small_model(config).train()
    counts = Counts(model)
    model.register_forward_hook(counts.add)
    shares = random_ids(8, 8).chunk(torch.distributed.get_world_size())
    for ids in shares[torch.distributed.get_rank()].split(2):
        model(ids)
    counts.advance()
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_two_processes_update_as_one(config, pool) -> None:
    (one,) = pool.run(counted, world_size=1, config=config)
    for other in pool.run(counted, world_size=2, config=config):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name])
