"""Documents packed into a training sequence see nothing of one another."""

from dataclasses import replace

import pytest

from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.data.text import TextTokenizer, prepare
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import SMALL, TINY, write_text


def losses_of_last_documents(*, settings: list[str]) -> list[list[float]]:
    """Loss of the last document of some sequences, before and after the others change.

    A pair for training's routing and one for that of generation.
    """
    from mor_megatron.platform import cpu
    from mor_tools.pretraining import distributed
    from mor_tools.pretraining.data.datasets import build_datasets
    from mor_tools.pretraining.models import build
    from mor_tools.pretraining.models.decoder import decoder_config
    from mor_tools.pretraining.training import Trainer
    from mor_tools.pretraining.watch import shared_watch

    cpu.enable()
    run = load_settings(["--config", TINY, *settings])
    tokenizer = TextTokenizer(prepare(run.data).tokenizer, run.data.end_of_document)
    with distributed.model_parallel(run):
        packed = replace(run, data=replace(run.data, reset_attention_mask=True))
        train = build_datasets(packed, prepare(run.data), tokenizer).train
        samples = [s for s in map(train.__getitem__, range(len(train))) if s["documents"][-1] > 0]
        samples, changed = samples[:4], []
        for sample in samples:
            is_last = sample["documents"] == sample["documents"][-1]
            sample["loss_mask"] = is_last.float()
            keeps = is_last | (sample["tokens"] == tokenizer.eod)
            others = (sample["tokens"] + 7) % 256 + 1  # any but the end of a document
            changed.append(sample | {"tokens": sample["tokens"].where(keeps, others)})
        distributed.seed(run.training.seed, step=0)
        trainer = Trainer(
            run,
            build.build_model(run, tokenizer.vocab_size),
            decoder_config(run, tokenizer.vocab_size),
            shared_watch(run.training.timeout_seconds),
        )
        if not run.data.reset_attention_mask:
            for sample in samples + changed:
                del sample["documents"]
        return [
            [trainer.evaluate(held_out, causal)[0] for held_out in (samples, changed)]
            for causal in (False, True)
        ]


STEPS_AS_STAGES = ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"]
EXPERT_CHOICE = [*SMALL, "recursion.router.warmup_steps=0"]
TOKEN_CHOICE = [s for s in SMALL if not s.startswith("recursion.router")]
TOKEN_CHOICE += ["recursion.router.type=token_choice"]


@pytest.mark.parametrize("router", [EXPERT_CHOICE, TOKEN_CHOICE], ids=["expert", "token"])
@pytest.mark.parametrize("layout", [[], STEPS_AS_STAGES], ids=["one process", "steps as stages"])
def test_a_token_is_blind_to_earlier_documents(pool: WorkerPool, tmp_path, layout, router):
    settings = [*router, *layout, *write_text(tmp_path), f"output={tmp_path}/run"]
    prepare(load_settings(["--config", TINY, *settings]).data)  # once, for all ranks
    losses = pool.run(losses_of_last_documents, 2 if layout else 1, settings=settings)[0]
    for before, after in losses:
        assert after == pytest.approx(before, abs=1e-6)


def test_without_the_mask_it_is_not(pool: WorkerPool, tmp_path):
    settings = [*EXPERT_CHOICE, *write_text(tmp_path), f"output={tmp_path}/run"]
    settings += ["data.reset_attention_mask=false"]
    for before, after in pool.run(losses_of_last_documents, settings=settings)[0]:
        assert abs(after - before) > 1e-4
