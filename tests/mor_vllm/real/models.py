"""Models that vLLM serves: every KV policy, with routers, experts and what else a config allows."""

from dataclasses import replace
from typing import Any

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RandomDepth,
    RandomLoops,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from tests.mor_layers.small_models import small_model

HELPED = {
    "step_embeddings": True,
    "input_injection": True,
    "sandwich_norms": True,
    "loop_norm": True,
}
SHARING = {"kv_policy": "recursive_sharing"}
UPDATE = {"kv_policy": "sharing_with_update"}
EXIT = {"kv_policy": "exit_state"}
SKIPS_STEP_1 = ExpertChoice(
    activation="tanh", capacity_factors=(0.8, 0.5, 0.3), predictor="aux_router"
)
EXPERTS = MoEConfig(4, 2, ffn_hidden_size=24)


def recursive(
    router: RouterConfig | None = None,
    block: int = 1,
    moe: MoEConfig | None = None,
    dense_ends: bool = False,
    **more: Any,
) -> DecoderConfig:
    """Two heads of 16 numbers; `block` layers three times, between two others."""
    if router is not None:
        more["router"] = router
    recursion = RecursionConfig(3, **more)
    ends = 2 if recursion.sharing.startswith("middle") else 0
    sizes = 257, 32, 48, ends + 3 * block, 2, 2
    return DecoderConfig(*sizes, recursion=recursion, moe=moe, dense_ends=dense_ends)


PRETRAINED = DecoderConfig(
    257,
    192,
    512,
    8,
    num_heads=6,
    num_kv_heads=2,
    moe=MoEConfig(4, 2, ffn_hidden_size=256),
    recursion=RecursionConfig(3, router=ExpertChoice(warmup_steps=60)),
)
"""What `make pretrain` trains, with fewer ids."""

SERVED: dict[str, DecoderConfig] = {
    "no recursion": replace(recursive(), recursion=None, num_unrolled_layers=3),
    "fixed depth": recursive(block=2, share_norms=False),
    "fixed depth, sharing, helps": recursive(**SHARING, **HELPED, share_norms=False),
    "random loops, exit state": recursive(RandomLoops(), **EXIT),
    "one by one": recursive(sharing="middle_sequence", block=2),
    "expert choice, sharing": recursive(ExpertChoice(), block=2, **SHARING),
    "expert choice, sharing, skips step 1": recursive(SKIPS_STEP_1, **SHARING),
    "token choice, sharing, helps": recursive(TokenChoice(), block=2, **SHARING, **HELPED),
    "random depth, sharing": recursive(RandomDepth(), **SHARING),
    "depth and width, sharing": recursive(DepthAndWidth(), moe=EXPERTS, **SHARING),
    "Qwen's": replace(
        recursive(TokenChoice(), **SHARING),
        head_dim=32,
        num_heads=4,
        qkv_bias=True,
        qk_norm=True,
        rope_base=500.0,
        tie_embeddings=True,
    ),
    "expert choice": recursive(ExpertChoice(), block=2),
    "expert choice, skips step 1": recursive(SKIPS_STEP_1, share_norms=False, **HELPED),
    "token choice, heads of 32": replace(
        recursive(TokenChoice(), block=2), head_dim=32, qk_norm=True
    ),
    "expert choice, cycle": recursive(ExpertChoice(), block=2, sharing="cycle"),
    "expert choice, update": recursive(ExpertChoice(), block=2, **UPDATE),
    "token choice, update": recursive(TokenChoice(), share_norms=False, **UPDATE),
    "expert choice, update, skips step 1": recursive(SKIPS_STEP_1, **UPDATE),
    "expert choice, exit state": recursive(ExpertChoice(), block=2, **EXIT),
    "token choice, exit state, helps": recursive(TokenChoice(), block=2, **EXIT, **HELPED),
    "expert choice, exit state, skips step 1": recursive(SKIPS_STEP_1, **EXIT),
    "experts, no recursion": replace(
        recursive(moe=EXPERTS, dense_ends=True), recursion=None, num_unrolled_layers=3
    ),
    "experts, fixed depth, routers per step": recursive(
        block=2, moe=MoEConfig(5, 1), dense_ends=True, expert_routers="per_step"
    ),
    "experts, token choice, loss-free bias": recursive(
        TokenChoice(),
        moe=replace(EXPERTS, bias_update_rate=0.01),
        expert_routers="per_step",
        **SHARING,
    ),
    "experts, expert choice, exit state": recursive(ExpertChoice(), block=2, moe=EXPERTS, **EXIT),
    "make pretrain": PRETRAINED,
}


def served_model(name: str) -> MoRTransformer:
    """A model with weights that matter, past the warm-up of its router."""
    model = small_model(SERVED[name]).eval()
    for recursion in model.recursions:
        if hasattr(recursion.router, "training_steps"):
            recursion.router.training_steps.fill_(1000)
    return model


def is_routed(name: str) -> bool:
    """Whether tokens take different numbers of steps."""
    router = SERVED[name].effective_recursion.router
    return not isinstance(router, FixedDepth | RandomLoops)
