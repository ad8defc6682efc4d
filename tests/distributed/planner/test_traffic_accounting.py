"""What the planner counts, against the collectives and tensors of real runs."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from mor_layers import DecoderConfig, ExpertChoice, MoEConfig, RecursionConfig, Relaxation
from mor_layers.costs import ModelShape
from mor_layers.models import LatentAttentionConfig
from mor_tools.planner import HARDWARE, Layout, Workload, evaluate
from mor_tools.planner.memory import Kept, kept_by_layer
from tests.distributed import megatron_setup as setup
from tests.distributed.fields.trial import MLA
from tests.distributed.pipeline import pipeline_setup
from tests.distributed.planner.traffic import SentBytes, kept_bytes
from tests.distributed.pool import WorkerPool

LENGTH, SEQUENCES = 16, 4
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 64}
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, ffn_hidden_size=48)
LATENT = LatentAttentionConfig(16, 8, 4, 12, q_lora_rank=24)
DIRECT = MLA | {"q_lora_rank": None}  # queries without a latent row


def decoder(options: dict[str, Any], num_layers: int = 8, **changes: Any) -> DecoderConfig:
    """What Megatron builds of these options, in plain PyTorch."""
    latent = "multi_latent_attention" in options
    return DecoderConfig(
        **SIZES,
        num_unrolled_layers=num_layers,
        num_heads=4,
        num_kv_heads=4 if latent else 2,
        latent_attention=replace(LATENT, q_lora_rank=options["q_lora_rank"]) if latent else None,
        moe=EXPERTS if "num_moe_experts" in options else None,
        **changes,
    )


@dataclass(frozen=True)
class Case:
    """A layout of a tiny model, and what kinds of traffic it must have."""

    layout: Layout
    options: dict[str, Any] = field(default_factory=dict)
    """Of Megatron's configuration."""
    is_recursive: bool = True
    distributed_optimizer: bool = False

    @property
    def recursion(self) -> RecursionConfig | None:
        return RecursionConfig(3, router=pipeline_setup.EXPERT) if self.is_recursive else None

    @property
    def is_spread(self) -> bool:
        return self.layout.pipeline_layout == "steps_as_stages"

    def work(self) -> Workload:
        model = decoder(self.options, recursion=self.recursion)
        return Workload(model, LENGTH, SEQUENCES, False, self.distributed_optimizer)


CASES = {
    "TP": Case(Layout(tensor=2)),
    "TP, plain": Case(Layout(tensor=2), is_recursive=False),
    "TP+SP": Case(Layout(tensor=2, sequence_parallel=True)),
    "TP+SP, full recompute": Case(Layout(tensor=2, sequence_parallel=True, recompute="full")),
    "DP": Case(Layout(data=2)),
    "distributed optimizer": Case(Layout(data=2), distributed_optimizer=True),
    "PP, one stage": Case(Layout(pipeline=2)),
    "PP, steps as stages": Case(Layout(pipeline=2, pipeline_layout="steps_as_stages")),
    "CP": Case(Layout(context=2)),
    "EP": Case(Layout(expert=2, data=2), pipeline_setup.MOE),
    "TP+SP, experts": Case(Layout(tensor=2, sequence_parallel=True), pipeline_setup.MOE),
    "TP+SP x EP": Case(Layout(tensor=2, sequence_parallel=True, expert=2), pipeline_setup.MOE),
    "TP, latent attention": Case(Layout(tensor=2), MLA),
    "TP+SP, latent attention": Case(Layout(tensor=2, sequence_parallel=True), MLA),
    "TP+SP, latent attention, direct": Case(Layout(tensor=2, sequence_parallel=True), DIRECT),
    "CP, latent attention": Case(Layout(context=2), MLA),
}
AXES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "EXPERT_TENSOR_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "data",
}


def run(case: Case) -> tuple[Counter, int, dict[str, int]]:
    """Bytes sent in an optimizer step, parameters of this rank, and bytes of what it holds."""
    from mor_megatron import connect_stages, recursion_block_spec, recursion_pipeline_spec

    layout, recursion = case.layout, case.recursion
    setup.initialize(
        tp=layout.tensor, pp=layout.pipeline, vpp=3 if case.is_spread else None,
        ep=layout.expert, etp=1 if layout.expert > 1 else None, cp=layout.context,
    )  # fmt: skip
    recompute: dict[str, Any] = {}
    if layout.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform",
                     "recompute_num_layers": 1}  # fmt: skip
    config = setup.tiny_config(
        num_layers=8, sequence_parallel=layout.sequence_parallel, **case.options, **recompute
    )
    spec = recursion_pipeline_spec if case.is_spread else recursion_block_spec
    if recursion is None:
        chunks = setup.tiny_gpt(config)
    else:
        chunks = setup.tiny_gpt(config, block=lambda c, v: spec(c, recursion, vp_stage=v))
    if case.is_spread:
        connect_stages(chunks)
    wrapped = setup.data_parallel(chunks, use_distributed_optimizer=case.distributed_optimizer)
    optimizer = setup.build_optimizer(wrapped)
    forward_backward = pipeline_setup.forward_backward if case.is_spread else setup.forward_backward
    with SentBytes() as counted:
        forward_backward(wrapped, setup.random_tokens(SEQUENCES, LENGTH))
        optimizer.step()
    sent: Counter = Counter()
    for (group, collective), count in counted.sent.items():
        axis = "pipeline" if collective == "send" else AXES.get(group)
        if axis is not None:
            sent[axis, collective] += count
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    states = [
        value
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for state in part.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    held = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": sum(state.nbytes for state in states),
    }
    return sent, sum(p.numel() for p in parameters), held


SAMPLE = {
    "TP+SP, latent attention",
    "TP+SP, full recompute", "distributed optimizer", "PP, steps as stages", "CP", "TP+SP x EP",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.full) for name in CASES],
)
def test_counted_traffic_and_memory_are_those_of_a_real_step(pool: WorkerPool, name: str) -> None:
    case = CASES[name]
    plan = evaluate(case.work(), case.layout, HARDWARE["cpu"])
    results = pool.run(run, case.layout.num_devices, case=case)
    # Ranks differ where experts are unevenly loaded, and stages hold different parts.
    if case.layout.pipeline > 1:
        sent, parameters, held = max(results, key=lambda r: r[1])
        sent = max((r[0] for r in results), key=lambda s: sum(s.values()))
    else:
        sent, parameters, held = results[0]
        sent = sum((r[0] for r in results), Counter())
        sent = Counter({key: value / len(results) for key, value in sent.items()})
    assert plan.parameters == parameters
    assert plan.memory.weights == held["weights"]
    assert plan.memory.gradients == held["gradients"]
    rel = 0.02 if case.distributed_optimizer else 0  # buffers are padded for the replicas
    assert held["optimizer"] == pytest.approx(plan.memory.optimizer, rel=rel)
    ours = {key: value for key, value in plan.traffic.items() if value}
    assert ours.keys() == sent.keys()
    assert {k: v / ours[k] for k, v in sent.items()} == pytest.approx(
        dict.fromkeys(ours, 1), rel=0.02
    )


def kept(recursion: RecursionConfig | None, num_layers: int, options: dict[str, Any]) -> int:
    """Bytes that the forward pass of one sequence leaves for the backward pass, on this rank."""
    from mor_megatron import recursion_block_spec

    tensor = 2 if options.get("sequence_parallel") else 1
    setup.initialize(tp=tensor)
    config = setup.tiny_config(num_layers=num_layers, **options)
    spec = recursion or RecursionConfig(1, sharing="cycle")
    chunks = setup.tiny_gpt(config, block=lambda c, v: recursion_block_spec(c, spec, vp_stage=v))
    wrapped = setup.data_parallel(chunks)
    tokens = setup.random_tokens(1, LENGTH * 2)
    with kept_bytes(list(chunks[0].parameters())) as report:
        wrapped[0](tokens[:, :-1], torch.arange(LENGTH * 2)[None], None, labels=tokens[:, 1:])
    return report["bytes"]


BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
SP = {"sequence_parallel": True}
PLAIN = RecursionConfig(3, router=ExpertChoice())
LORA = replace(PLAIN, sandwich_norms=True, relaxation=Relaxation(5))
DORA = replace(PLAIN, relaxation=Relaxation(5, "dora", ("query", "output", "gate", "up", "down")))


@pytest.mark.parametrize(
    ("recursion", "options", "tolerance"),
    [
        (PLAIN, {}, 0.02),  # what norms and attention note of each token is not counted
        (PLAIN, SP, 0.05),  # 21 tokens are filled up to 22
        (PLAIN, BF16, 0.02),
        (PLAIN, pipeline_setup.MOE, 0.15),  # what a dispatcher notes of each token is not counted
        (LORA, BF16, 0.02),
        pytest.param(LORA, SP, 0.05, marks=pytest.mark.full),
        pytest.param(DORA, {}, 0.02, marks=pytest.mark.full),
        (DORA, SP, 0.05),
        (PLAIN, MLA, 0.02),
        pytest.param(PLAIN, MLA | SP, 0.05, marks=pytest.mark.full),
    ],
    ids=[
        "fp32",
        "TP+SP",
        "bf16",
        "experts",
        "lora",
        "lora, TP+SP",
        "dora",
        "dora, TP+SP",
        "latent",
        "latent, TP+SP",
    ],
)
def test_a_layer_keeps_what_is_counted(
    pool: WorkerPool, recursion: RecursionConfig, options: dict[str, Any], tolerance: float
) -> None:
    run = partial(pool.run, kept, 2 if "sequence_parallel" in options else 1, recursion=recursion)
    real = run(num_layers=8, options=options)[0] - run(num_layers=5, options=options)[0]
    model = decoder(options, recursion=recursion)
    spread = options.get("sequence_parallel", False)
    how = Kept(2 if "bf16" in options else 4, 2 if spread else 1, spread)
    shape = ModelShape.from_decoder(model)
    (block,) = (stack for stack in shape.stacks if stack.name == "block")
    counted = sum(kept_by_layer(shape, block, k, how) for k in (32, 21, 10))
    if recursion is DORA:  # norms and quotients of rows, whatever the tokens, at each step
        rows = (32 + 64 + 64) // how.tensor + 32 + 32
        real -= 3 * 2 * rows * 4
    assert counted == pytest.approx(real, rel=tolerance)


@pytest.mark.parametrize(
    "recursion",
    [PLAIN, replace(PLAIN, step_embeddings=True, input_injection=True, loop_norm=True)],
)
def test_a_whole_model_keeps_what_is_counted(pool: WorkerPool, recursion: RecursionConfig) -> None:
    (real,) = pool.run(kept, recursion=recursion, num_layers=14, options={})
    model = DecoderConfig(
        **SIZES, num_unrolled_layers=14, num_heads=4, num_kv_heads=2, recursion=recursion
    )
    plan = evaluate(Workload(model, LENGTH * 2, 1, False), Layout(), HARDWARE["cpu"])
    assert plan.memory.activations == pytest.approx(real, rel=0.05)
