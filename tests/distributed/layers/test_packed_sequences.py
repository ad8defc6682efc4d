"""Documents packed into one sequence (`thd`) compute what each of them computes alone, in every layout.

Gradients are sums over tokens here (`calculate_per_token_loss`), and so are losses of routers as long as
the share of a document's tokens that runs a step is the same in each. Lengths are multiples of 3, the
number of steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from mor_layers import ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_layers.recursion import KVPolicy
from mor_megatron import (
    connect_stages,
    recursion_block_spec,
    recursion_forward_backward,
    recursion_pipeline_spec,
)
from mor_megatron.step import packed_documents, zigzag_positions
from tests.distributed import megatron_setup as setup
from tests.distributed.fields.comparison import shared_name
from tests.distributed.fields.trial import MLA
from tests.distributed.layers.test_context_parallel import FULL_RECOMPUTE, MOE, POLICIES
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

PACKS = ((12, 6, 15, 9), (18, 9, 6, 9))
"""Lengths of the documents of two micro-batches."""
MULTIPLE, PADDED_LENGTH = 4, 56
"""What each document is padded to under context parallelism, and then the sequence."""

ROUTERS = {
    "expert": ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5),
    "token": TokenChoice(balancing="none", z_loss_coefficient=0.01),
    "fixed": FixedDepth(),
}
SP = {"sequence_parallel": True}
CORE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
EXPERTS = MOE | {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
LATENT = MLA | {"v_head_dim": 8}  # other than that of queries and keys
WINDOW = {"window_size": (5, 0), "window_attn_skip_freq": 2, "softmax_type": "learnable"}


@dataclass(frozen=True)
class Layout:
    """Where packed documents run."""

    ranks: int = 1
    parallel: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    is_padded: bool = False
    steps_as_stages: bool = False


LAYOUTS = {
    "one rank": Layout(),
    "padded": Layout(is_padded=True),
    "recomputed": Layout(config=FULL_RECOMPUTE, is_padded=True),
    "core recomputed": Layout(config=CORE_RECOMPUTE),
    "tp": Layout(2, {"tp": 2}),
    "tp+sp": Layout(2, {"tp": 2}, SP),
    "tp+sp, padded": Layout(2, {"tp": 2}, SP, is_padded=True),
    "pp": Layout(2, {"pp": 2}),
    "steps as stages": Layout(2, {"pp": 2, "vpp": 3}, is_padded=True, steps_as_stages=True),
    "steps as stages, tp+sp": Layout(4, {"pp": 2, "vpp": 3, "tp": 2}, SP, steps_as_stages=True),
    "cp": Layout(2, {"cp": 2}, is_padded=True),
    "cp x tp+sp": Layout(4, {"cp": 2, "tp": 2}, SP, is_padded=True),
    "experts": Layout(config=EXPERTS),
    "tp+sp, experts": Layout(2, {"tp": 2}, EXPERTS | SP, is_padded=True),
    "ep": Layout(2, {"ep": 2}, EXPERTS),
    "latent": Layout(config=LATENT, is_padded=True),
    "latent, tp+sp": Layout(2, {"tp": 2}, LATENT | SP),
    "latent, cp": Layout(2, {"cp": 2}, LATENT, is_padded=True),
    "windows and sinks": Layout(config=WINDOW, is_padded=True),
    "windows and sinks, cp": Layout(2, {"cp": 2}, WINDOW, is_padded=True),
}
CASES = [
    (router, policy, layout)
    for router in ROUTERS
    for policy in POLICIES
    for layout in LAYOUTS
    if not (LAYOUTS[layout].steps_as_stages and policy == "exit_state")
]
DAILY = [
    ("expert", "recursion_wise", "padded"),
    ("token", "recursive_sharing", "tp+sp"),
    ("expert", "sharing_with_update", "steps as stages"),
    ("token", "exit_state", "cp x tp+sp"),
    ("expert", "recursive_sharing", "latent, cp"),
]


@dataclass(frozen=True)
class Outcome:
    """The mean loss of all tokens, and its gradients."""

    loss: float
    gradients: dict[str, Tensor]


def documents() -> list[list[Tensor]]:
    """Of each micro-batch, tokens and their next ones, `[length + 1]` each."""
    rows = setup.random_tokens(sum(map(len, PACKS)), max(map(max, PACKS)))
    lengths = iter(rows)
    return [[next(lengths)[: length + 1] for length in pack] for pack in PACKS]


def pack(parts: list[Tensor], is_padded: bool) -> dict[str, Any]:
    """The documents in one sequence: tokens, labels, positions, mask `[1 s]`, and their boundaries."""
    multiple = MULTIPLE if is_padded else 1
    sizes = [len(part) - 1 for part in parts]
    extra = [-size % multiple for size in sizes]
    if is_padded:  # all of it belongs to a document: Megatron's rotary embedding wants that
        extra[-1] += PADDED_LENGTH - sum(sizes) - sum(extra)
    ends = torch.tensor(sizes).cumsum(0)
    padded_ends = (torch.tensor(sizes) + torch.tensor(extra)).cumsum(0)
    columns = [
        torch.cat([F.pad(values, (0, more)) for values, more in zip(rows, extra, strict=True)])
        for rows in (
            [part[:-1] for part in parts],
            [part[1:] for part in parts],
            [torch.arange(size) for size in sizes],
            [torch.ones(size) for size in sizes],
        )
    ]
    names = ("tokens", "labels", "positions", "mask")
    batch: dict[str, Any] = {n: c[None] for n, c in zip(names, columns, strict=True)}
    longest = max(size + more for size, more in zip(sizes, extra, strict=True))
    borders, padded_borders = (F.pad(e, (1, 0)).int() for e in (ends, padded_ends))
    batch["packed"] = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=padded_borders if is_padded else None,
        cu_seqlens_kv_padded=padded_borders if is_padded else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return batch


def on_this_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows of this context-parallel rank."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return batch
    found = packed_documents(batch["packed"], batch["tokens"].shape[1])
    positions = zigzag_positions(len(found.offsets), group.size(), packed=found)[group.rank()]
    rows = {n: v[:, positions] for n, v in batch.items() if n != "packed"}
    return rows | {"packed": batch["packed"]}


def build(layout: Layout, recursion: RecursionConfig | None, config: dict[str, Any]) -> list[Any]:
    setup.initialize(**(layout.parallel or {}))
    fields: dict[str, Any] = {"num_layers": 8, "calculate_per_token_loss": True}
    made = setup.tiny_config(**(fields | (layout.config or {}) | config))
    if layout.steps_as_stages:
        chunks = setup.tiny_gpt(
            made,
            block=lambda c, v: recursion_pipeline_spec(c, recursion, vp_stage=v, documents=True),
        )
        connect_stages(chunks)
    else:
        chunks = setup.tiny_gpt(
            made, block=lambda c, v: recursion_block_spec(c, recursion, vp_stage=v)
        )
    return setup.data_parallel(chunks)


def run(chunks: list[Any], batches: list[dict[str, Any]]) -> float:
    """One batch through the layout's schedule. Returns the mean loss of its tokens."""
    world, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    share = [batches[index] for index in range(rank, len(batches), world)]

    def forward_step(iterator: Any, model: nn.Module) -> Any:
        batch = on_this_rank(next(iterator))
        packed = {} if batch["packed"] is None else {"packed_seq_params": batch["packed"]}
        losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"], **packed)

        def total(losses: Tensor) -> Any:
            loss, count = (losses * batch["mask"]).sum(), batch["mask"].sum()
            return loss, count.int(), {"sums": torch.stack([loss.detach(), count])}

        return losses, total

    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = (recursion_forward_backward if len(chunks) > 1 else get_forward_backward_func())(
        forward_step_func=forward_step,
        data_iterator=[iter(share) for _ in chunks],
        model=chunks,
        num_microbatches=len(share),
        seq_length=batches[0]["tokens"].shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    sums = sum((report["sums"] for report in reports), torch.zeros(2)).double()
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def packed_outcome(layout: str, recursion: RecursionConfig) -> Outcome:
    where = LAYOUTS[layout]
    chunks = build(where, recursion, {})
    loss = run(chunks, [pack(parts, where.is_padded) for parts in documents()])
    return Outcome(loss, setup.gather_gradients(chunks))


def outcome_of_each_alone(recursion: RecursionConfig, config: dict[str, Any]) -> Outcome:
    chunks = build(Layout(), recursion, config)
    alone = [pack([part], False) | {"packed": None} for parts in documents() for part in parts]
    loss = run(chunks, alone)
    return Outcome(loss, setup.gather_gradients(chunks))


@pytest.fixture(scope="module")
def alone(pool: WorkerPool):
    known: dict[Any, Outcome] = {}

    def compute(recursion: RecursionConfig, config: dict[str, Any]) -> Outcome:
        config = {n: v for n, v in config.items() if n not in SP and "recompute" not in n}
        key = (recursion, *sorted(config))
        if key not in known:
            known[key] = pool.run(outcome_of_each_alone, 1, recursion=recursion, config=config)[0]
        return known[key]

    return compute


def assert_alike(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.loss == pytest.approx(expected.loss, abs=1e-6)
    assert outcome.gradients.keys() == expected.gradients.keys()
    for name, gradient in outcome.gradients.items():
        torch.testing.assert_close(
            gradient, expected.gradients[name], rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format
        )


@pytest.mark.parametrize(("router", "policy", "layout"), sweep(CASES, DAILY))
def test_packed_documents_compute_what_each_computes_alone(
    pool: WorkerPool, alone, router: str, policy: KVPolicy, layout: str
) -> None:
    recursion = RecursionConfig(3, router=ROUTERS[router], kv_policy=policy)
    where = LAYOUTS[layout]
    outcomes = pool.run(packed_outcome, where.ranks, layout=layout, recursion=recursion)
    expected = alone(recursion, where.config or {})
    for outcome in outcomes:
        assert_alike(outcome, expected)


def packed_and_unrolled() -> list[Outcome]:
    """A recursion over packed documents, and Megatron's own layers over each of them."""
    setup.initialize()
    outcomes, values = [], {}
    for recursion in (RecursionConfig(3, router=FixedDepth()), None):
        config = setup.tiny_config(num_layers=8, calculate_per_token_loss=True)
        if recursion is None:
            chunks = setup.tiny_gpt(config)
            batches = [pack([p], False) | {"packed": None} for parts in documents() for p in parts]
        else:
            block = recursion_block_spec(config, recursion)
            chunks = setup.tiny_gpt(config, block=lambda _c, _v, block=block: block)
            batches = [pack(parts, False) for parts in documents()]
            values = dict(chunks[0].named_parameters())
        names = {
            n: n if recursion else shared_name(n, config) for n, _ in chunks[0].named_parameters()
        }
        for name, parameter in chunks[0].named_parameters():
            parameter.data.copy_(values[names[name]])
        loss = run(setup.data_parallel(chunks), batches)
        gradients: dict[str, Tensor] = {}
        for name, parameter in chunks[0].named_parameters():
            gradients[names[name]] = gradients.get(names[name], 0) + parameter.main_grad
        outcomes.append(Outcome(loss, gradients))
    return outcomes


def test_a_recursion_over_packed_documents_computes_what_plain_layers_compute_of_each(
    pool: WorkerPool,
) -> None:
    ours, plain = pool.run(packed_and_unrolled)[0]
    assert_alike(ours, plain)


def boundaries(*ends: int, **others: Any) -> PackedSeqParams:
    borders = torch.tensor([0, *ends], dtype=torch.int32)
    given = {"qkv_format": "thd", "cu_seqlens_q": borders, "cu_seqlens_kv": borders}
    return PackedSeqParams(**(given | others))


def test_documents_are_found_by_their_boundaries():
    padded = torch.tensor([0, 4, 8, 8], dtype=torch.int32)
    packed = boundaries(3, 7, 7, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    found = packed_documents(packed, 10)
    assert found.offsets.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert found.lengths.tolist() == [4] * 8 + [2] * 2
    assert found.is_padding is not None
    assert found.is_padding.tolist() == [False] * 3 + [True] + [False] * 4 + [True] * 2
    assert found.longest == 4
    visible = found.is_visible[0, 0]
    assert visible[2, :3].all() and not visible[4, :4].any()  # its own document only
    assert visible[3].nonzero().flatten().tolist() == [0, 1, 2, 3]  # padding sees itself
    assert visible[9].nonzero().flatten().tolist() == [9]
    assert packed_documents(boundaries(3, 10), 10).is_padding is None


def test_boundaries_are_read_once_until_they_change():
    packed = boundaries(4, 9)
    first = packed_documents(packed, 9)
    assert packed_documents(packed, 9) is first
    packed.cu_seqlens_q[1] = 2
    assert packed_documents(packed, 9).offsets.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (boundaries(4, 9, qkv_format="sbhd"), "qkv_format='sbhd'"),
        (boundaries(4, 9, local_cp_size=2), "hybrid context parallelism"),
        (boundaries(4, 9, cu_seqlens_q=torch.zeros(1, 3)), "no vector"),
        (boundaries(4, 9, cu_seqlens_kv=torch.tensor([0, 3, 9])), "must agree"),
        (boundaries(4, 10), "not exceed the tokens"),
        (boundaries(4, 3), "not decrease"),
        (boundaries(4, 9, cu_seqlens_q_padded=torch.tensor([0, 9])), "one entry for the end"),
        (boundaries(4, 9, cu_seqlens_q_padded=torch.tensor([0, 3, 9])), "must agree"),
    ],
)
def test_other_boundaries_are_refused(packed: PackedSeqParams, says: str):
    with pytest.raises(ValueError, match=says):
        packed_documents(packed, 9)


def test_rows_of_several_sequences_are_refused():
    with pytest.raises(ValueError, match="2 sequences of tokens"):
        packed_documents(boundaries(4, 9), 9, batch=2)


def test_each_document_is_split_in_zigzag_order():
    found = packed_documents(boundaries(4, 12), 12)
    assert zigzag_positions(12, 2, packed=found).tolist() == [
        [0, 3, 4, 5, 10, 11],
        [1, 2, 6, 7, 8, 9],
    ]
    with pytest.raises(ValueError, match="Pad each document to a multiple of 4"):
        zigzag_positions(12, 2, packed=packed_documents(boundaries(6, 12), 12))


def refusals() -> list[str]:
    setup.initialize()
    config = setup.tiny_config(
        num_layers=8, **EXPERTS | {"moe_router_load_balancing_type": "seq_aux_loss"}
    )
    block = recursion_block_spec(config, RecursionConfig(3, router=ROUTERS["expert"]))
    (model,) = setup.tiny_gpt(config, block=lambda _c, _v: block)
    batch, said = pack(documents()[0], False), []
    length = batch["tokens"].shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    layer, hidden = model.decoder.layers[1], torch.zeros(length, 1, config.hidden_size)
    table = torch.zeros(14, 1, 1, 8)
    joined = replace(batch["packed"], tokens_per_sample=length // 2)
    for given in (
        {"attention_mask": mask},
        {"rotary_pos_emb": table},
        {"packed_seq_params": joined},
    ):
        try:
            layer(hidden, **({"packed_seq_params": batch["packed"]} | given))
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_does_not_go_with_packed_documents_is_refused(pool: WorkerPool) -> None:
    mask, table, joined = pool.run(refusals)[0]
    assert "attention_mask would have no effect" in mask
    assert "max_seqlen_q=14, but a document of 15 tokens" in table
    assert "Use a micro-batch of one sample" in joined
