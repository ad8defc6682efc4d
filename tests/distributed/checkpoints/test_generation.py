"""Generation by a Megatron model over tensor-parallel ranks: exact, and in step."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    TokenChoice,
)
from mor_layers.generation import CacheSettings, Request, Sampling, shard
from mor_layers.generation.ranks.lockstep import LockstepEngine
from mor_layers.generation.sampling import sample
from mor_layers.layers.relaxation import PROJECTIONS
from mor_layers.models import LatentAttentionConfig
from mor_layers.recursion import KVPolicy
from mor_megatron.checkpoints import load_tensors
from mor_megatron.checkpoints.torch_model import tensor_parallel_decoder
from mor_megatron.checkpoints.weights import megatron_tensors
from tests.distributed import megatron_setup as setup
from tests.distributed.checkpoints.test_weights import gpt
from tests.distributed.pool import WorkerPool

VOCAB_SIZE = 64
ROUTERS = {
    "expert": ExpertChoice(threshold=0.5),
    "token": TokenChoice(),
    "depth and width": DepthAndWidth(),
}
POLICIES: tuple[KVPolicy, ...] = (
    "recursion_wise",
    "recursive_sharing",
    "sharing_with_update",
    "exit_state",
)
SAMPLE = {("expert", "recursion_wise"), ("token", "exit_state"), ("expert", "recursive_sharing")}
PROMPTS = [tuple(range(3, 3 + size)) for size in (1, 9, 5, 12)]


@dataclass(frozen=True)
class Served:
    """What a rank saw of the requests."""

    tokens: dict[int, list[int]]
    logits: list[Tensor]
    reasons: dict[int, str]
    kv_bytes: int
    bytes_left: int


def decoder_config(router: str, policy: KVPolicy, with_experts: bool) -> DecoderConfig:
    keyed = policy in ("recursion_wise", "sharing_with_update")
    names = PROJECTIONS if keyed and not with_experts else ("query", "output")
    kind = "lora" if policy == "exit_state" else "dora"  # Qwen has biases
    relaxation = Relaxation(3, kind, names) if router == "expert" else None
    recursion = RecursionConfig(3, router=ROUTERS[router], kv_policy=policy, relaxation=relaxation)
    if router == "token" and keyed:
        own = ("attention",) if with_experts else ("attention", "mlp")
        recursion = replace(recursion, own_per_step=own)  # type: ignore[arg-type]
    moe = MoEConfig(4, 2, ffn_hidden_size=24) if with_experts else None
    qwen = {"head_dim": 12, "qkv_bias": True, "qk_norm": True} if policy == "exit_state" else {}
    return DecoderConfig(VOCAB_SIZE, 32, 64, 8, 4, 2, **qwen, recursion=recursion, moe=moe)


def torch_model(config: DecoderConfig) -> MoRTransformer:
    torch.manual_seed(0)
    model = MoRTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # apart enough for every depth to occur
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def serve(config: DecoderConfig, tp: int) -> Served:
    """Requests of which one is cancelled and one runs out of time, on all ranks of the group."""
    setup.initialize(tp=tp)
    theirs = gpt(config, sequence_parallel=tp > 1)
    load_tensors([theirs], megatron_tensors(torch_model(config).state_dict(), config))
    model = tensor_parallel_decoder([theirs], config)
    seen: list[Tensor] = []

    def note(logits: Tensor, settings: Any, numbers: Any) -> Tensor:
        seen.extend(logits.clone())
        return sample(logits, settings, numbers)

    cache = CacheSettings(1 << 20, num_slots=3, max_length=40, page_size=4)
    group = torch.distributed.group.WORLD
    engine = LockstepEngine(model, cache, group=group, chunk_size=4, sampler=note)
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    if not engine.leads:
        engine.follow()
    else:
        numbers = [
            engine.submit(Request(ids, 6, Sampling(0.8, seed=i))) for i, ids in enumerate(PROMPTS)
        ]
        engine.submit(Request(PROMPTS[0], 6, timeout=1e-9))
        with pytest.raises(ValueError, match="max_length=40"):
            engine.submit(Request(PROMPTS[0], 60))
        while not engine.is_idle:
            for event in engine.step():
                if event.token is not None:
                    tokens.setdefault(event.number, []).append(event.token)
                if event.finish_reason is not None:
                    reasons[event.number] = event.finish_reason
            if len(tokens.get(numbers[1], ())) == 2:
                engine.cancel(numbers[1])
        engine.close()
    in_use = engine.caches.num_bytes_in_use
    return Served(tokens, seen, reasons, engine.caches.num_bytes, in_use)


@pytest.mark.parametrize(
    ("router", "policy", "with_experts"),
    [
        pytest.param(
            router,
            policy,
            with_experts,
            marks=()
            if (router, policy) in SAMPLE and with_experts == (router == "token")
            else pytest.mark.full,
        )
        for router in ROUTERS
        for policy in POLICIES
        for with_experts in (False, True)
    ],
)
def test_ranks_serve_what_one_process_computes(
    pool: WorkerPool, router: str, policy: KVPolicy, with_experts: bool
) -> None:
    config = decoder_config(router, policy, with_experts)
    first, second = pool.run(serve, 2, config=config, tp=2)
    reasons = {0: "length", 1: "cancelled", 2: "length", 3: "length", 4: "timeout"}
    assert first.reasons == reasons
    assert first.bytes_left == second.bytes_left == 0
    assert first.kv_bytes == second.kv_bytes <= 1 << 20
    assert all(map(torch.equal, first.logits, second.logits))
    model = torch_model(config)
    expected = []
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*prompt, *first.tokens[number]]])
        with torch.no_grad():
            logits = model(ids, causal_routing=True).logits[0]
        expected += logits[len(prompt) - 1 : -1]
    # Requests share ticks, so each row that was seen is found by its values.
    wanted, seen = torch.stack(expected), torch.stack(first.logits)
    nearest = torch.cdist(wanted, seen, p=torch.inf).argmin(dim=1)
    torch.testing.assert_close(seen[nearest], wanted, rtol=1e-5, atol=1e-5)


def refusal(heads: int) -> str:
    setup.initialize(tp=2)
    model = MoRTransformer(DecoderConfig(8, 12, 8, 2, heads))
    with pytest.raises(ValueError, match="is not divisible by the 2 ranks") as caught:
        shard(model, torch.distributed.group.WORLD)
    return str(caught.value)


def sharded_difference(config: DecoderConfig) -> float:
    """Largest difference of a logit between the whole model and the ranks' parts."""
    model, ids = torch_model(config), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids, causal_routing=True).logits
        found = shard(model, torch.distributed.group.WORLD)(ids, causal_routing=True).logits
    return float((found - expected).abs().max())


def test_ranks_divide_the_shared_expert_and_heads_of_latent_attention(pool: WorkerPool) -> None:
    moe = MoEConfig(4, 2, ffn_hidden_size=24, scores="sigmoid", shared_ffn_hidden_size=20)
    config = DecoderConfig(
        VOCAB_SIZE, 32, 64, 8, 4, recursion=RecursionConfig(3, router=ROUTERS["token"]), moe=moe,
        latent_attention=LatentAttentionConfig(16, 8, 4, 12),
    )  # fmt: skip
    assert max(pool.run(sharded_difference, 2, config=config)) < 1e-5


def test_heads_that_do_not_divide_are_refused(pool: WorkerPool) -> None:
    assert pool.run(refusal, 2, heads=3)[0].startswith("num_heads=3")


def follower_calls() -> str:
    setup.initialize(tp=2)
    model = MoRTransformer(DecoderConfig(8, 8, 8, 2, 2))
    engine = LockstepEngine(model, CacheSettings(1 << 14), group=torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match=r"first rank") as caught:
        engine.follow() if engine.leads else engine.submit(Request((1,), 1))
    return str(caught.value)


def test_each_rank_keeps_to_its_part(pool: WorkerPool) -> None:
    leader, other = pool.run(follower_calls, 2)
    assert "Call submit() and step() there" in leader and "only the first rank may submit" in other
