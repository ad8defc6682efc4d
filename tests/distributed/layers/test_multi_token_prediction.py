"""Multi-token prediction behind a recursion: N ranks compute what one rank computes.

That one rank computes what Megatron's unrolled layers compute is in `tests/distributed/fields`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from mor_layers import ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_layers.recursion import KVPolicy
from mor_megatron import (
    mtp_block_spec,
    recursion_block_spec,
    recursion_layer_spec,
    update_routers,
)
from mor_megatron.checkpoints import runs
from tests.distributed import megatron_setup as setup
from tests.distributed.fields.trial import MLA
from tests.distributed.layers.test_context_parallel import (
    FULL_RECOMPUTE,
    MOE,
    POLICIES,
    Outcome,
    assert_alike,
    loss_and_gradients,
)
from tests.distributed.pipeline import pipeline_setup
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

MTP = {"mtp_num_layers": 2}
SP = {"sequence_parallel": True}
ROUTERS = {
    "expert": ExpertChoice(predictor_coefficient=0.1, alpha=0.5),
    "token": TokenChoice(z_loss_coefficient=0.01),
    "fixed": FixedDepth(),
}
# name: ranks, layout, config
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp": (2, {"tp": 2}, {}),
    "tp+sp": (2, {"tp": 2}, SP),
    "pp": (2, {"pp": 2}, {}),
    "pp, repeated head": (2, {"pp": 2}, {"mtp_use_repeated_layer": True}),
    "pp x tp+sp, recomputed": (4, {"pp": 2, "tp": 2}, SP | FULL_RECOMPUTE),
    "ep": (2, {"ep": 2}, MOE),
    "tp+sp x ep": (4, {"tp": 2, "ep": 2}, MOE | SP),
    "recomputed": (1, {}, FULL_RECOMPUTE),
    "latent, pp x tp+sp": (4, {"pp": 2, "tp": 2}, MLA | SP),
}
CASES = [(r, p, layout) for r in ROUTERS for p in POLICIES for layout in LAYOUTS]
DAILY = [
    ("expert", "recursion_wise", "pp x tp+sp, recomputed"),
    ("token", "exit_state", "ep"),
    ("expert", "recursive_sharing", "pp, repeated head"),
]


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool):
    known: dict[Any, Outcome] = {}

    def compute(recursion: RecursionConfig, config: dict[str, Any]) -> Outcome:
        config = {n: v for n, v in config.items() if n not in SP and "recompute" not in n}
        key = (recursion, *sorted(config))
        if key not in known:
            known[key] = pool.run(
                loss_and_gradients, 1, layout={}, recursion=recursion, config=MTP | config
            )[0]
        return known[key]

    return compute


@pytest.mark.parametrize(("router", "policy", "layout"), sweep(CASES, DAILY))
def test_a_layout_computes_what_one_rank_computes(
    pool: WorkerPool, one_rank, router: str, policy: KVPolicy, layout: str
) -> None:
    ranks, parallel, config = LAYOUTS[layout]
    recursion = RecursionConfig(3, router=ROUTERS[router], kv_policy=policy)
    outcomes = pool.run(
        loss_and_gradients, ranks, layout=parallel, recursion=recursion, config=MTP | config
    )
    expected = one_rank(recursion, config)
    assert any("mtp.layers" in name for name in expected.gradients)
    assert_alike(outcomes, expected)


STAGES = [
    pipeline_setup.Case(RecursionConfig(3, router=pipeline_setup.EXPERT), config=MTP),
    pipeline_setup.Case(
        RecursionConfig(2, "cycle", pipeline_setup.TOKEN, kv_policy="recursive_sharing"),
        tp=2,
        config=MTP | SP | FULL_RECOMPUTE,
        documents=True,
    ),
    pipeline_setup.Case(
        RecursionConfig(3, router=pipeline_setup.EXPERT, kv_policy="sharing_with_update"),
        config=MTP | pipeline_setup.MOE,
    ),
]


@pytest.mark.parametrize(
    "case", [STAGES[0], *(pytest.param(case, marks=pytest.mark.full) for case in STAGES[1:])]
)
def test_steps_as_stages_compute_what_one_rank_computes(
    pool: WorkerPool, case: pipeline_setup.Case
) -> None:
    alone = pipeline_setup.Case(case.recursion, config={**case.model}, documents=case.documents)
    alone.config.pop("sequence_parallel", None)
    expected = pool.run(pipeline_setup.outcome, 1, case=alone, is_pipeline=False)[0]
    for outcome in pool.run(pipeline_setup.outcome, case.world_size, case=case, is_pipeline=True):
        assert outcome.loss == pytest.approx(expected.loss, abs=1e-6)
        assert outcome.gradients.keys() == expected.gradients.keys()
        for name, gradient in outcome.gradients.items():
            torch.testing.assert_close(
                gradient, expected.gradients[name], rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format
            )


RESUMED = RecursionConfig(3, router=ExpertChoice(warmup_steps=4))


def run_from(directory: Path, layout: dict[str, Any], first: int) -> dict[str, Tensor]:
    """Parameters after two optimizer steps from `first` on, of a run that a checkpoint precedes."""
    setup.initialize(**layout)
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=8, **MTP),
        block=lambda c, v: recursion_block_spec(c, RESUMED, vp_stage=v),
    )
    wrapped = setup.data_parallel(chunks)
    optimizer = setup.build_optimizer(wrapped)
    if first:
        assert runs.load(directory, wrapped, optimizer).step == first
    for step in range(first, 4):
        if step == 2 and not first:
            runs.save(directory, step, wrapped, optimizer)
        setup.train_step(wrapped, optimizer, setup.random_tokens(4, 12, seed=step))
        update_routers(wrapped)
    return setup.gather_parameters(wrapped)


def test_a_checkpoint_of_two_stages_goes_on_at_one_rank_and_at_two(
    pool: WorkerPool, tmp_path: Path
) -> None:
    expected = pool.run(run_from, 2, directory=tmp_path, layout={"pp": 2}, first=0)[0]
    for ranks, layout in ((1, {}), (2, {"tp": 2})):
        resumed = pool.run(run_from, ranks, directory=tmp_path, layout=layout, first=2)[0]
        assert resumed.keys() == expected.keys()
        for name, values in resumed.items():
            torch.testing.assert_close(
                values, expected[name], rtol=0, atol=1e-4, msg=f"{name}: {{}}".format
            )


def packed_loss_and_gradients(is_packed: bool) -> dict[str, Tensor]:
    """Gradients of two documents, in one sequence or in two.

    They have equal lengths, because Megatron weights the tokens of a micro-batch by the share of them
    that has a token to predict.
    """
    setup.initialize()
    config = setup.tiny_config(num_layers=8, calculate_per_token_loss=True, **MTP)
    recursion = RecursionConfig(3, router=ROUTERS["expert"])
    (model,) = setup.tiny_gpt(config, block=lambda c, v: recursion_block_spec(c, recursion))
    parts = list(setup.random_tokens(2, 12))
    if is_packed:
        ends = torch.tensor([0, 12, 24], dtype=torch.int32)
        packed = PackedSeqParams(
            "thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=12, max_seqlen_kv=12
        )
        ids, labels = (torch.cat([p[cut] for p in parts])[None] for cut in CUTS)
        batches = [(ids, labels, packed)]
    else:
        batches = [(part[None, :-1], part[None, 1:], None) for part in parts]
    for ids, labels, packed in batches:
        positions = torch.arange(ids.shape[1])[None]
        losses = model(ids, positions, None, labels=labels, packed_seq_params=packed)
        losses.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CUTS = (slice(None, -1), slice(1, None))


def test_heads_predict_within_packed_documents(pool: WorkerPool) -> None:
    packed, alone = (
        pool.run(packed_loss_and_gradients, is_packed=is_packed)[0] for is_packed in (True, False)
    )
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(
            gradient, alone[name], rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format
        )


def gradients_over_context(layout: dict[str, int]) -> dict[str, Tensor]:
    """Gradients of one sequence whose tokens count as many on each rank.

    Megatron takes the mean of a head's losses on each rank. The second of two ranks lacks a token, as
    the first, which has the end of the sequence, lacks the one without a next token.
    """
    setup.initialize(**layout)
    config = setup.tiny_config(num_layers=8, mtp_num_layers=1)
    recursion = RecursionConfig(3, router=ROUTERS["token"], kv_policy="recursive_sharing")
    chunks = setup.data_parallel(
        setup.tiny_gpt(config, block=lambda c, v: recursion_block_spec(c, recursion))
    )
    (tokens,), length = setup.random_tokens(1, 24), 24
    mask = torch.ones(length)
    mask[9] = 0
    batch = {
        "tokens": tokens[None, :-1],
        "labels": tokens[None, 1:],
        "positions": torch.arange(length)[None],
        "mask": mask[None],
    }
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)

    def step(_: Any, model: nn.Module) -> Any:
        ids, positions = batch["tokens"], batch["positions"]
        losses = model(ids, positions, None, labels=batch["labels"], loss_mask=batch["mask"])

        def mean(losses: Tensor) -> tuple[Tensor, None]:
            return (losses * batch["mask"]).sum() / mask.sum(), None

        return losses, mean

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=chunks,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
    )
    return setup.gather_gradients(chunks)


def test_context_parallel_ranks_compute_what_one_rank_computes(pool: WorkerPool) -> None:
    (expected,) = pool.run(gradients_over_context, layout={})
    for gradients in pool.run(gradients_over_context, 2, layout={"cp": 2}):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format
            )


def places_of_heads() -> tuple[bool, Any]:
    setup.initialize(pp=2)
    config = setup.tiny_config(num_layers=8, **MTP)
    recursion_block_spec(config, RecursionConfig(3, router=FixedDepth()))
    return mtp_block_spec(config) is not None, config.pipeline_model_parallel_layout.layout


def test_heads_are_in_the_last_stage(pool: WorkerPool) -> None:
    (first, layout), (last, _) = pool.run(places_of_heads, 2)
    assert (first, last) == (False, True)
    assert [kind.name for kind in layout[1][0]][-3:] == ["mtp", "mtp", "loss"]


def test_a_head_that_is_a_recursion_is_refused() -> None:
    config = TransformerConfig(num_layers=8, hidden_size=8, num_attention_heads=2, **MTP)
    inner = recursion_layer_spec([ModuleSpec(module=nn.Identity)], RecursionConfig(2))
    with pytest.raises(ValueError, match="layer_spec is a recursion, but a head of multi-token"):
        mtp_block_spec(config, inner)
