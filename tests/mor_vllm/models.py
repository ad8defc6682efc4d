"""Models that vLLM serves: every KV policy, with routers, experts and what else a config allows.

`test_every_setting_is_served_or_refused` finds the settings that no model here has.
"""

from dataclasses import replace
from typing import Any

import torch

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
    Relaxation,
    RouterConfig,
    TokenChoice,
)
from mor_layers.layers import Sublayer
from mor_layers.models import Llama3Scaling, MultiTokenPrediction, YarnScaling
from mor_layers.recursion import HyperConnections, LoopLoss
from mor_layers.routers import DampedLoops, Deepened, ExitGate
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
NO_MLP = ("query", "output")
OWN_ATTENTION: tuple[Sublayer, ...] = ("attention",)


def recursive(
    router: RouterConfig | None = None,
    block: int = 1,
    moe: MoEConfig | None = None,
    dense_ends: bool = False,
    **more: Any,
) -> DecoderConfig:
    """Two heads of 16 numbers; `block` layers three times, between two others by default."""
    if router is not None:
        more["router"] = router
    recursion = RecursionConfig(3, **more)
    end = int(recursion.sharing.startswith("middle"))
    ends = sum(
        end if given is None else given
        for given in (recursion.prelude_layers, recursion.coda_layers)
    )
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
    "no recursion": replace(
        recursive(),
        recursion=None,
        num_unrolled_layers=3,
        multi_token_prediction=MultiTokenPrediction(2),
        rope_scaling=YarnScaling(16.0, 8, 2.0, 0.5, mscale=1.0, mscale_all_dim=0.3),
    ),
    "fixed depth": recursive(block=2, share_norms=False),
    "fixed depth, sharing, helps": recursive(**SHARING, **HELPED, share_norms=False),
    "random loops, exit state": recursive(RandomLoops(), **EXIT),
    "damped loops": recursive(DampedLoops(0.4), block=2),
    "one by one": recursive(sharing="middle_sequence", block=2),
    "expert choice, sharing": recursive(ExpertChoice(), block=2, **SHARING),
    "expert choice, sharing, skips step 1": recursive(SKIPS_STEP_1, **SHARING),
    "token choice, sharing, helps": recursive(TokenChoice(), block=2, **SHARING, **HELPED),
    "random depth, sharing": recursive(RandomDepth(), **SHARING),
    "depth and width, sharing": recursive(DepthAndWidth(mean_experts=1.5), moe=EXPERTS, **SHARING),
    "Qwen's": replace(
        recursive(TokenChoice(), **SHARING),
        head_dim=32,
        num_heads=4,
        qkv_bias=True,
        qk_norm=True,
        rope_base=500.0,
        rope_scaling=Llama3Scaling(8.0, 8, 0.25, 1.0),
        tie_embeddings=True,
    ),
    "expert choice": recursive(ExpertChoice(), block=2),
    "expert choice, skips step 1": recursive(SKIPS_STEP_1, share_norms=False, **HELPED),
    "token choice, heads of 32": replace(
        recursive(TokenChoice(), block=2), head_dim=32, qk_norm=True
    ),
    "expert choice, cycle": recursive(ExpertChoice(), block=2, sharing="cycle", block_layers=2),
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
    "deltas, fixed depth": recursive(block=2, relaxation=Relaxation(3, scale=0.3), loop_norm=True),
    "deltas, biases, expert choice, update": replace(
        recursive(ExpertChoice(), relaxation=Relaxation(40, "dora"), **UPDATE),
        qkv_bias=True,
        qk_norm=True,
    ),
    "deltas of few projections, experts, token choice, exit state": recursive(
        TokenChoice(), moe=EXPERTS, relaxation=Relaxation(2, "dora", NO_MLP), **EXIT
    ),
    "deltas of gates, expert choice, sharing": recursive(
        ExpertChoice(), block=2, relaxation=Relaxation(2, projections=("gate", "down")), **SHARING
    ),
    "own attention, biases, expert choice": replace(
        recursive(ExpertChoice(), own_per_step=OWN_ATTENTION), qkv_bias=True, qk_norm=True
    ),
    "own attention, experts, expert choice, update": recursive(
        ExpertChoice(), moe=EXPERTS, own_per_step=OWN_ATTENTION, **UPDATE
    ),
    "own MLP, token choice, exit state": recursive(TokenChoice(), own_per_step=("mlp",), **EXIT),
    "own attention and MLP, one by one": recursive(
        sharing="middle_sequence", block=2, own_per_step=("attention", "mlp")
    ),
    "scaled residuals, long ends, token choice": replace(
        recursive(TokenChoice(), residual_scale=1.5, prelude_layers=2, coda_layers=3),
        rms_norm_epsilon=1e-3,
    ),
    "streams, expert choice": recursive(
        ExpertChoice(), hyper_connections=HyperConnections(3), input_injection=True
    ),
    "static streams, token choice, exit state": recursive(
        TokenChoice(), hyper_connections=HyperConnections(2, "static"), loop_norm=True, **EXIT
    ),
    "exit gate": recursive(ExitGate(0.6), loop_loss=LoopLoss()),
    "deepened expert choice, sharing": replace(
        recursive(ExpertChoice(), **SHARING),
        num_unrolled_layers=7,
        recursion=RecursionConfig(5, router=Deepened(ExpertChoice(), 2), **SHARING),
    ),
    "make pretrain": PRETRAINED,
}


def served_model(name: str) -> MoRTransformer:
    """A model with weights that matter, past the warm-up of its router."""
    model = small_model(SERVED[name]).eval()
    generator = torch.Generator().manual_seed(1)
    for buffer, values in model.named_buffers():
        kind = buffer.rpartition(".")[2]
        if kind == "training_steps":
            values.fill_(1000)
        elif buffer.endswith("widths.values"):  # so that some tokens take one expert, others two
            values.fill_(0.3)
        elif kind in ("weight", "bias"):  # of the exit gate, and loss-free; both start at 0
            values.normal_(std=0.3, generator=generator)
    return model


def is_routed(name: str) -> bool:
    """Whether tokens take different numbers of steps."""
    router = SERVED[name].effective_recursion.router
    return not isinstance(router, DampedLoops | FixedDepth | RandomLoops)
