"""Recursion steps as virtual pipeline stages: any number computes what one rank computes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomLoops,
    RecursionConfig,
    Relaxation,
    TokenChoice,
)
from mor_layers.layers import NormModulation
from mor_layers.recursion import HistoryInjection, HyperConnections, LoopLoss
from mor_layers.routers import AdaptiveHalting, DampedLoops
from tests.distributed import megatron_setup as setup
from tests.distributed.fields.trial import MLA
from tests.distributed.pipeline.pipeline_setup import (
    DISTRIBUTED,
    EXPERT,
    MOE,
    SEQUENCE_LENGTH,
    TOKEN,
    Case,
    Options,
    Outcome,
    build,
    forward_backward,
    initialize,
    outcome,
    stages_of,
    train_step,
)
from tests.distributed.pool import WorkerPool

SP: Options = {"sequence_parallel": True}
FULL_RECOMPUTE: Options = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE: Options = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "moe"],
}
ROUTERS = {"expert": EXPERT, "token": TOKEN}
SHARING, UPDATE, EXIT = "recursive_sharing", "sharing_with_update", "exit_state"
HELPS: Options = {
    "share_norms": False,
    "step_embeddings": True,
    "input_injection": True,
    "sandwich_norms": True,
    "loop_norm": True,
    "residual_scale": 2.0,
    "norm_modulation": NormModulation(3),
}
PER_TOKEN: Options = {"calculate_per_token_loss": True}
OWN: Options = {"own_per_step": ("attention",)}
LOOPS = RecursionConfig(
    3, router=RandomLoops(seed=0), relaxation=Relaxation(2, projections=("query",))
)
LAST_STEPS = RecursionConfig(
    3, router=RandomLoops(draw="largest", backward_steps=2), input_injection=True
)


STREAMS: Options = {"hyper_connections": HyperConnections(2), "input_injection": True}
EVERY_LOOP: Options = {"loop_loss": LoopLoss("geometric", 0.3, scale_penalty=0.2)}


def recursion(steps: int, router: str, policy: str = "recursion_wise") -> RecursionConfig:
    return RecursionConfig(steps, router=ROUTERS[router], kv_policy=policy)  # type: ignore[arg-type]


SAMPLE = {
    "PP=2, 4 steps, token, update": Case(recursion(4, "token", UPDATE), block_size=2),
    "PP=4, 3 steps, token, sharing": Case(recursion(3, "token", SHARING), pp=4),
    "TP=2+SP x PP=2, 3 steps, expert, MoE": Case(recursion(3, "expert"), tp=2, config=MOE | SP),
    "PP=2, documents and padding, expert, sharing": Case(
        recursion(3, "expert", SHARING), documents=True
    ),
    "PP=2, full recompute, token, sharing": Case(
        recursion(2, "token", SHARING), config=FULL_RECOMPUTE
    ),
    "TP=2+SP x PP=2, helps, token, full recompute": Case(
        replace(recursion(3, "token"), **HELPS), tp=2, config=SP | FULL_RECOMPUTE
    ),
    "TP=2+SP x PP=2, own attention, token, MoE, full recompute": Case(
        replace(recursion(2, "token"), own_per_step=("attention",), expert_routers="per_step"),
        tp=2,
        config=SP | MOE | FULL_RECOMPUTE,
    ),
    "PP=2, random loops": Case(LOOPS),
    "PP=2, random loops, the last step trains, experts": Case(
        replace(LAST_STEPS, router=RandomLoops(draw="largest", backward_steps=1)), config=MOE
    ),
    "TP=2+SP x PP=2, latent attention, token, sharing": Case(
        recursion(2, "token", SHARING), tp=2, config=SP | MLA
    ),
    "PP=2, damped loops": Case(RecursionConfig(3, router=DampedLoops())),
    "PP=2, cycle, fixed depth, a norm a step": Case(
        RecursionConfig(3, sharing="cycle", router=FixedDepth(), share_norms=False)
    ),
}
SAMPLE |= {
    "PP=2 x CP=2, token, exit state, streams, a loss after every loop, documents": Case(
        replace(recursion(3, "token", EXIT), **STREAMS, **EVERY_LOOP),
        cp=2,
        length=16,
        documents=True,
    ),
    "PP=2, expert, exit state, history, full recompute": Case(
        replace(recursion(3, "expert", EXIT), history=HistoryInjection(1)), config=FULL_RECOMPUTE
    ),
    "PP=2, experts with a loss per token, documents": Case(
        recursion(2, "token"), config=MOE | PER_TOKEN, documents=True
    ),
}
MATRIX = {
    f"PP={pp}, {steps} steps, {router}, {policy}": Case(
        recursion(steps, router, policy), pp=pp, block_size=pp if steps > 2 else 2 * pp
    )
    for pp in (2, 4)
    for steps in (2, 3, 4)
    for router in ROUTERS
    for policy in ("recursion_wise", SHARING, UPDATE, EXIT)
}
MORE = {
    f"{name}, {router}, {policy}": Case(recursion(3, router, policy), **options)
    for router in ROUTERS
    for policy in ("recursion_wise", SHARING, UPDATE, EXIT)
    for name, options in {
        "TP=2 x PP=2": {"tp": 2},
        "TP=2+SP x PP=2": {"tp": 2, "config": SP},
        "TP=2+SP x PP=2, MoE": {"tp": 2, "config": MOE | SP},
        "PP=2, MoE": {"config": MOE},
        "PP=2 x CP=2": {"cp": 2, "length": 16},
        "PP=2 x CP=2, MoE, documents and padding": {
            "cp": 2,
            "length": 16,
            "config": MOE,
            "documents": True,
        },
        "PP=2 x DP=2": {"dp": 2},
        "PP=2 x DP=2, overlap": {"dp": 2, "ddp": {"overlap_grad_reduce": True}},
        "PP=2, documents and padding": {"documents": True},
        "TP=2+SP x PP=2, documents and padding": {"tp": 2, "config": SP, "documents": True},
        "PP=2, full recompute": {"config": FULL_RECOMPUTE},
        "PP=2, full recompute, MoE": {"config": FULL_RECOMPUTE | MOE},
        "PP=2, selective recompute, MoE": {"config": SELECTIVE | MOE},
        "PP=2, freed outputs": {"config": {"deallocate_pipeline_outputs": True}},
    }.items()
} | {
    "PP=2, warm-up": Case(RecursionConfig(3, router=ExpertChoice(warmup_steps=4))),
    "PP=2, aux router": Case(
        RecursionConfig(3, router=ExpertChoice("mlp", "tanh", predictor="aux_router"))
    ),
    "PP=2, depth and width": Case(RecursionConfig(3, router=DepthAndWidth(), kv_policy=SHARING)),
    "PP=2, cycle, expert": Case(RecursionConfig(3, sharing="cycle", router=EXPERT)),
    "TP=2+SP x PP=2, 2 steps, token, sharing": Case(
        recursion(2, "token", SHARING), tp=2, config=SP
    ),
    "TP=2+SP x PP=2, token, deltas": Case(
        replace(recursion(2, "token"), relaxation=Relaxation(3, "dora", scale=0.5)),
        tp=2,
        config=SP,
    ),
    "PP=2, helps, expert": Case(
        replace(
            recursion(3, "expert"),
            router=replace(EXPERT, gate_bias=0.5, capacity_multiple=5),
            **HELPS,
        )
    ),
    "TP=2+SP x PP=2, long ends, token": Case(
        replace(recursion(2, "token"), prelude_layers=2, coda_layers=3), tp=2, config=SP
    ),
    "PP=2, no prelude, expert": Case(replace(recursion(2, "expert"), prelude_layers=0)),
    "TP=2+SP x PP=2, random loops, MoE": Case(LOOPS, tp=2, config=SP | MOE),
    "PP=2, helps, fixed depth": Case(RecursionConfig(3, **HELPS)),
    "PP=2, nothing shared, update, expert": Case(
        replace(recursion(3, "expert", UPDATE), own_per_step=("attention", "mlp"))
    ),
    **{
        f"PP=2, latent attention, {router}, {policy}": Case(
            recursion(3, router, policy), config=MLA | FULL_RECOMPUTE
        )
        for router, policy in (("expert", "recursion_wise"), ("token", UPDATE), ("expert", SHARING))
    },
    "PP=2, adaptive halting": Case(RecursionConfig(3, router=AdaptiveHalting())),
    "PP=2, streams, fixed depth": Case(RecursionConfig(3, **STREAMS)),
    "TP=2+SP x PP=2, static streams, full recompute": Case(
        replace(recursion(3, "token"), hyper_connections=HyperConnections(3, "static")),
        tp=2,
        config=SP | FULL_RECOMPUTE,
    ),
    "PP=4, streams, exit state": Case(replace(recursion(3, "expert", EXIT), **STREAMS), pp=4),
    "PP=2, first step routes, exit state, documents": Case(
        RecursionConfig(3, router=ExpertChoice(capacity_factors=(0.9, 0.58, 0.3)), kv_policy=EXIT),
        documents=True,
    ),
    "PP=2, a loss after every loop, fixed depth": Case(RecursionConfig(3, **EVERY_LOOP)),
    "PP=2, a loss after every loop, documents, full recompute": Case(
        replace(recursion(3, "token"), coda_layers=2, **EVERY_LOOP),
        config=FULL_RECOMPUTE,
        documents=True,
    ),
    "PP=2 x CP=2, fixed depth": Case(RecursionConfig(3), cp=2, length=16),
    "PP=2 x CP=2, latent attention, expert, exit state": Case(
        recursion(3, "expert", EXIT), cp=2, length=16, config=MLA
    ),
    "PP=2, a loss per token, experts": Case(recursion(3, "expert"), config=MOE | PER_TOKEN),
    "PP=2 x DP=2, random loops, the last steps train, overlap": Case(
        LAST_STEPS, dp=2, ddp={"overlap_grad_reduce": True}
    ),
    **{
        f"TP=2+SP x PP=2, random loops, the last steps train, {policy}, {what}": Case(
            replace(LAST_STEPS, kv_policy=policy, share_norms=policy == EXIT, **more),
            tp=2,
            config=SP | config,
        )
        for policy in ("recursion_wise", UPDATE, EXIT)
        for what, more, config in (
            ("full recompute", {}, FULL_RECOMPUTE),
            ("streams", {"hyper_connections": HyperConnections(2)}, {}),
        )
    },
    "PP=4, 4 steps, random loops, the last steps train": Case(
        replace(LAST_STEPS, num_recursions=4), pp=4
    ),
    "PP=2, own attention, random loops": Case(replace(LOOPS, relaxation=None, **OWN)),
}


@pytest.fixture(scope="module")
def on_one_rank(pool: WorkerPool):
    known: dict[str, Outcome] = {}

    def compute(case: Case) -> Outcome:
        model = {n: v for n, v in case.config.items() if n in MOE | MLA | PER_TOKEN or n == "bf16"}
        case = replace(case, pp=1, tp=1, dp=1, cp=1, config=model, ddp={})
        if repr(case) not in known:
            known[repr(case)] = pool.run(outcome, 1, case=case, is_pipeline=False)[0]
        return known[repr(case)]

    return compute


def check(pool: WorkerPool, on_one_rank: Any, case: Case) -> None:
    expected = on_one_rank(case)
    for found in pool.run(outcome, case.world_size, case=case, is_pipeline=True):
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(
                gradient, expected.gradients[name], rtol=1e-5, atol=1e-6, msg=partial(_named, name)
            )


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


@pytest.mark.parametrize("name", SAMPLE)
def test_steps_as_virtual_stages_compute_what_one_rank_computes(pool, on_one_rank, name) -> None:
    check(pool, on_one_rank, SAMPLE[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MATRIX)
def test_any_number_of_stages_steps_and_policies(pool, on_one_rank, name: str) -> None:
    check(pool, on_one_rank, MATRIX[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MORE)
def test_other_parallelism_and_settings(pool, on_one_rank, name: str) -> None:
    check(pool, on_one_rank, MORE[name])


def held(case: Case) -> tuple[list[int], set[str]]:
    """Numbers by which a rank's layers last ran, and what its recursion has beside layers."""
    from mor_megatron.layers.experts.moe import RecursiveMoELayer

    initialize(case, is_pipeline=True)
    chunks = build(case, is_pipeline=True)
    forward_backward(chunks, setup.random_tokens(2, SEQUENCE_LENGTH))
    recursion = stages_of(chunks)[0].recursion
    layers = [m for m in recursion.modules() if isinstance(m, RecursiveMoELayer)]
    names = {name.split(".")[0] for name, _ in recursion.named_parameters()}
    return [layer.unrolled_layer_number for layer in layers], names - {"layers"}


def test_a_rank_holds_its_part_of_the_block_and_the_first_one_routes(pool) -> None:
    settings = replace(recursion(3, "expert"), step_embeddings=True)
    first, last = pool.run(held, 2, case=Case(settings, config=MOE))
    # One layer before the recursion; its last step runs the block's four layers after twice four.
    assert first == ([10, 11], {"router", "step_input"})
    assert last == ([12, 13], set())


def numbers_kept(case: Case) -> int:
    """How many numbers a rank keeps for the backward passes of a batch, beside its parameters."""
    initialize(case, is_pipeline=True)
    chunks, kept = build(case, is_pipeline=True), 0
    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in own:
            kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(chunks, setup.random_tokens(2, SEQUENCE_LENGTH))
    return kept


@pytest.mark.full
def test_steps_that_do_not_train_keep_nothing_on_any_rank(pool) -> None:
    routers = (RandomLoops(draw="largest", backward_steps=1), FixedDepth())
    kept = [
        pool.run(numbers_kept, 2, case=Case(replace(LAST_STEPS, router=router)))
        for router in routers
    ]
    for one_step, all_steps in zip(*kept, strict=True):
        assert one_step < 0.6 * all_steps  # of three steps, and of the ends


BF16: Options = {
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
}


@pytest.mark.parametrize(
    "settings", [recursion(3, "expert"), recursion(3, "token", SHARING)], ids=["expert", "token"]
)
def test_routing_in_bf16_is_that_of_one_rank_bit_by_bit(pool, on_one_rank, settings) -> None:
    case = Case(settings, config=BF16, ddp={"grad_reduce_in_fp32": True})
    expected, found = on_one_rank(case), pool.run(outcome, 2, case=case, is_pipeline=True)
    assert len(found[0].decisions) == len(expected.decisions) == 4
    for ours, theirs in zip(found[0].decisions, expected.decisions, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert found[0].loss == expected.loss
    for name, gradient in found[0].gradients.items():
        scale = expected.gradients[name].abs().max()
        assert (gradient - expected.gradients[name]).abs().max() < 0.02 * scale, name


def train(case: Case, is_pipeline: bool) -> tuple[Any, dict[str, torch.Tensor], Any, int]:
    """Losses and gradient norms of three steps, then parameters, router state, parameter count."""
    from mor_megatron import routing_reports

    initialize(case, is_pipeline)
    chunks = build(case, is_pipeline)
    optimizer = setup.build_optimizer(chunks, clip_grad=0.1, adam_eps=1e-2, weight_decay=0.1)
    steps = []
    for seed in range(3):
        batch = setup.random_tokens(4 * case.dp, SEQUENCE_LENGTH, seed)
        steps.append(train_step(chunks, optimizer, batch))
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook()  # fetches what the next forward pass would
    reports = routing_reports(chunks)
    count = torch.tensor(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
    from megatron.core import parallel_state

    torch.distributed.all_reduce(count, group=parallel_state.get_pipeline_model_parallel_group())
    first = stages_of(chunks)[0]
    buffers = dict(first.recursion.router.named_buffers()) if first.is_entry else {}
    return steps, setup.gather_parameters(chunks), (reports, buffers), int(count)


@pytest.mark.parametrize(
    "ddp",
    [
        pytest.param({}, id="plain", marks=pytest.mark.full),
        pytest.param(
            {"overlap_grad_reduce": True, "bucket_size": 5000}, id="overlap", marks=pytest.mark.full
        ),
        pytest.param(DISTRIBUTED, id="distributed", marks=pytest.mark.full),
        pytest.param(
            DISTRIBUTED | {"overlap_param_gather": True, "bucket_size": 5000},
            id="distributed, parameters gathered on the way",
        ),
    ],
)
def test_optimizer_norm_and_clipping_see_each_weight_once(pool, ddp: Options) -> None:
    router = TokenChoice(balancing="loss_free", balancing_coefficient=0.01)
    case = Case(RecursionConfig(3, router=router, kv_policy=SHARING), dp=2, config=MOE, ddp=ddp)
    alone = replace(case, ddp={})
    steps, parameters, (reports, buffers), count = pool.run(
        train, 1, case=alone, is_pipeline=False
    )[0]
    ours = pool.run(train, 4, case=case, is_pipeline=True)
    for found, values, (own_reports, _), own_count in ours:
        assert own_count == count
        assert torch.allclose(torch.tensor(found), torch.tensor(steps), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values, parameters, rtol=1e-4, atol=2e-6)
        assert len(own_reports) == 1
        assert own_reports[0].shares == pytest.approx(reports[0].shares)
        assert torch.equal(own_reports[0].expert_load, reports[0].expert_load)
    assert torch.equal(ours[0][2][1]["depth_bias"], buffers["depth_bias"])


def save_or_resume(case: Case, layout: str, directory: Path, resumes: bool) -> Any:
    """Train two steps and save, or load; then losses and parameters two steps later."""
    from mor_megatron.checkpoints import runs

    if layout == "block in one stage":
        setup.initialize(pp=2)
    else:
        initialize(case, layout == "steps as stages")
    chunks = build(case, layout == "steps as stages")
    optimizer = setup.build_optimizer(chunks, adam_eps=1e-2)
    batches = [setup.random_tokens(4, SEQUENCE_LENGTH, seed) for seed in range(4)]
    if resumes:
        assert runs.load(directory, chunks, optimizer).step == 2
    else:
        for batch in batches[:2]:
            train_step(chunks, optimizer, batch)
        runs.save(directory, 2, chunks, optimizer)
    losses = [train_step(chunks, optimizer, batch)[0] for batch in batches[2:]]
    return losses, setup.gather_parameters(chunks)


LAYOUTS = {"one rank": 1, "block in one stage": 2, "steps as stages": 2}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("steps as stages", "one rank"),
        ("steps as stages", "block in one stage"),
        ("one rank", "steps as stages"),
        pytest.param("block in one stage", "steps as stages", marks=pytest.mark.full),
        pytest.param("steps as stages", "steps as stages", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize(
    "ddp", [{}, pytest.param({"use_distributed_optimizer": True}, marks=pytest.mark.full)]
)
def test_a_run_moves_between_layouts(pool, tmp_path: Path, saved, loaded, ddp) -> None:
    router = ExpertChoice(warmup_steps=3, gate_bias=0.5)
    settings = RecursionConfig(2, router=router, kv_policy=UPDATE, **HELPS)
    case = Case(replace(settings, hyper_connections=HyperConnections(2)), ddp=ddp)
    arguments = {"case": case, "directory": tmp_path}
    losses, parameters = pool.run(
        save_or_resume, LAYOUTS[saved], layout=saved, resumes=False, **arguments
    )[0]
    resumed = pool.run(save_or_resume, LAYOUTS[loaded], layout=loaded, resumes=True, **arguments)[0]
    assert resumed[0] == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(resumed[1], parameters, rtol=1e-5, atol=2e-6)


def evaluate(case: Case) -> tuple[float, float]:
    from tests.distributed.pipeline.pipeline_setup import assert_nothing_waits

    initialize(case, True)
    chunks = build(case, True)
    tokens = setup.random_tokens(4, SEQUENCE_LENGTH)
    trained = forward_backward(chunks, tokens)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        evaluated = forward_backward(chunks, tokens, forward_only=True)
    assert_nothing_waits(chunks)
    return trained, evaluated


def test_evaluation_leaves_nothing_behind(pool) -> None:
    trained, evaluated = pool.run(evaluate, 2, case=Case(recursion(2, "token", SHARING)))[0]
    assert evaluated == trained


def refuse(steps: int, vpp: int | None, options: Options, message: str, pp: int = 2) -> None:
    from mor_megatron import recursion_pipeline_spec

    settings = options.pop("recursion", recursion(steps, "expert"))
    setup.initialize(pp=pp, vpp=vpp)
    config = setup.tiny_config(**({"num_layers": 4 * steps + 2} | options))
    with pytest.raises(ValueError, match=message):
        recursion_pipeline_spec(config, settings, vp_stage=0)


@pytest.mark.parametrize(
    ("steps", "vpp", "options", "message"),
    [
        (2, 2, {"batch_p2p_comm": True, "overlap_p2p_comm": False}, r"batch_p2p_comm=False"),
        (3, 2, {}, r"Use virtual_pipeline_model_parallel_size=3"),
        (2, None, {}, r"Use virtual_pipeline_model_parallel_size=2"),
        (2, 2, {"num_layers": 8}, r"block of 3 layers .* over 2 stages. Use num_layers=6 or 10"),
        (2, 2, {"num_layers": 4}, r"block of 1 layers .* over 2 stages. Use num_layers=6"),
        (
            2,
            2,
            {"recursion": RecursionConfig(2, sharing="middle_sequence")},
            r"Use 'cycle' or 'middle_cycle', or recursion_block_spec",
        ),
        (2, 2, {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}, "=False"),
        (2, 2, {"pipeline_dtype": torch.bfloat16}, r"Use pipeline_dtype=torch.float32"),
        (2, 2, FULL_RECOMPUTE | {"recompute_method": "block"}, "Use 'uniform'"),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(pool, steps, vpp, options, message) -> None:
    pool.run(refuse, 2, steps=steps, vpp=vpp, options=options, message=message)


def misuse() -> None:
    from mor_megatron import connect_stages, recursion_pipeline_spec

    settings = recursion(2, "expert")
    setup.initialize(pp=2, vpp=2)
    config = setup.tiny_config(num_layers=6)
    chunks = setup.tiny_gpt(config, lambda c, v: recursion_pipeline_spec(c, settings, vp_stage=v))
    inputs = setup.random_tokens(1, SEQUENCE_LENGTH)[:, :-1]
    with pytest.raises(ValueError, match=r"Call connect_stages\(chunks\)"):
        chunks[1].decoder.layers[0](torch.zeros(30, 1, 32))
    with pytest.raises(ValueError, match="all chunks of this rank in order"):
        connect_stages(chunks[::-1])
    connect_stages(chunks)
    if torch.distributed.get_rank() == 0:
        with pytest.raises(ValueError, match=r"seq_length=carried_length\(chunks, 14\)"):
            chunks[0](inputs, torch.arange(SEQUENCE_LENGTH)[None], None)
    else:
        with pytest.raises(ValueError, match="sends 14 rows between stages"):
            chunks[0].decoder.layers[0](torch.zeros(14, 1, 32))


def test_a_wrong_call_says_what_to_do(pool) -> None:
    pool.run(misuse, 2)
