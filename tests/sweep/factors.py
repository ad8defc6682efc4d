"""The choices of the sweep: recursions, layers, layouts and what else meets in a training step.

A case takes one value of every factor. The first one is the usual one.
"""

from dataclasses import dataclass
from typing import Any

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomLoops,
    Relaxation,
    TokenChoice,
)
from mor_layers.layers import NormModulation
from mor_layers.recursion import KV_POLICIES, HistoryInjection, HyperConnections, LoopLoss
from mor_layers.routers import AdaptiveHalting, DampedLoops, ExitGate
from tests.distributed.fields.trial import MLA

LENGTH = 24
"""Tokens of a sequence: three steps of half as many, less a few, do not divide by the ranks."""
NUM_SEQUENCES = 4
"""Sequences of a batch, each a micro-batch."""
NUM_RECURSIONS = 3
BLOCK_SIZE = 2


@dataclass(frozen=True)
class Layout:
    """How many ranks share what."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    spreads_steps: bool = False
    """Whether the steps are virtual pipeline stages."""
    ep: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def groups(self) -> dict[str, Any]:
        """What `megatron_setup.initialize` takes."""
        etp = 1 if self.ep > 1 else None
        vpp = NUM_RECURSIONS if self.spreads_steps else None
        return dict(tp=self.tp, cp=self.cp, pp=self.pp, ep=self.ep, etp=etp, vpp=vpp)


ROUTERS = {
    "fixed depth": FixedDepth(),
    "expert choice": ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5),
    "expert choice, odd capacities": ExpertChoice(
        capacity_factors=(0.9, 0.58, 0.3), predictor="aux_router", alpha=0.5
    ),
    "expert choice, tiles": ExpertChoice(alpha=0.5, capacity_multiple=5),
    "token choice": TokenChoice(z_loss_coefficient=0.01),
    "token choice, loss-free": TokenChoice(balancing="loss_free"),
    "depth and width": DepthAndWidth(),
    "random loops": RandomLoops(seed=0),
    "random loops, the last train": RandomLoops(draw="largest", backward_steps=2),
    "damped loops": DampedLoops(),
    "adaptive halting": AdaptiveHalting(),
    "exit gate": ExitGate(),
    "taught exit gate": ExitGate(teaching=0.5),
}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cycle": {"sharing": "cycle"},
    "sequence": {"sharing": "middle_sequence"},
    "longer ends": {"prelude_layers": 2, "coda_layers": 3},
    "LoRA": {"relaxation": Relaxation(3, projections=("query", "output"))},
    "DoRA": {"relaxation": Relaxation(2, "dora", ("query", "output"), 0.5), "share_norms": False},
    "stabilised": {
        "step_embeddings": True,
        "input_injection": True,
        "sandwich_norms": True,
        "loop_norm": True,
    },
    "scaled residuals": {"residual_scale": 1.5, "share_norms": False},
    "own attention": {"own_per_step": ("attention",), "share_norms": False},
    "own MLP": {"own_per_step": ("mlp",)},
    "streams": {"hyper_connections": HyperConnections(2), "input_injection": True},
    "static streams": {"hyper_connections": HyperConnections(3, "static")},
    "modulated norms": {"norm_modulation": NormModulation(4)},
    "history": {"history": HistoryInjection(1), "step_embeddings": True},
    "loss after every loop": {"loop_loss": LoopLoss("geometric", 0.3, scale_penalty=0.2)},
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}
LAYERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "GELU with biases": {"gated_linear_unit": False, "add_bias_linear": True},
    "norms of queries and keys": {"qk_layernorm": True, "add_qkv_bias": True},
    "windows and sinks": {"window_size": (5, 0), "softmax_type": "learnable"},
    "gated attention, some without RoPE": {"attention_output_gate": True, "no_rope_freq": 2},
    "latent attention": MLA,
    "latent attention, experts": MLA | EXPERTS,
    "experts": EXPERTS,
    "experts, allgather": EXPERTS | {"moe_token_dispatcher_type": "allgather"},
    "sigmoid experts with a bias": EXPERTS
    | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
    },
    "experts beside a shared one": EXPERTS | {"moe_shared_expert_intermediate_size": 32},
}
LAYOUTS = {
    "DP": Layout(dp=2),
    "TP": Layout(tp=2),
    "TP+SP": Layout(tp=2, sp=True),
    "CP": Layout(cp=2),
    "CP=4": Layout(cp=4),
    "PP": Layout(pp=2),
    "PP=3": Layout(pp=3),
    "steps as stages": Layout(pp=2, spreads_steps=True),
    "CP × steps as stages": Layout(cp=2, pp=2, spreads_steps=True),
    "DP=4": Layout(dp=4),
    "EP": Layout(ep=2, dp=2),
    "EP=4": Layout(ep=4, dp=4),
    "TP+SP × DP": Layout(tp=2, sp=True, dp=2),
    "TP+SP × CP": Layout(tp=2, sp=True, cp=2),
    "TP × PP": Layout(tp=2, pp=2),
    "TP+SP × PP": Layout(tp=2, sp=True, pp=2),
    "TP+SP × steps as stages": Layout(tp=2, sp=True, pp=2, spreads_steps=True),
    "TP+SP × EP": Layout(tp=2, sp=True, ep=2),
    "CP × EP": Layout(cp=2, ep=2),
    "CP × PP": Layout(cp=2, pp=2),
    "PP × EP": Layout(pp=2, ep=2, dp=2),
    "steps as stages × EP": Layout(pp=2, spreads_steps=True, ep=2, dp=2),
    "TP+SP × PP × DP": Layout(tp=2, sp=True, pp=2, dp=2),
    "TP+SP × CP × PP": Layout(tp=2, sp=True, cp=2, pp=2),
    "TP+SP × PP × EP": Layout(tp=2, sp=True, pp=2, ep=4, dp=2),
    "TP+SP × CP × steps as stages": Layout(tp=2, sp=True, cp=2, pp=2, spreads_steps=True),
    "TP+SP × CP × EP": Layout(tp=2, sp=True, cp=2, ep=4, dp=2),
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "everything": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "MLP": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "experts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe"],
    },
    "keys and values of latent rows": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mla_up_proj"],
    },
}
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": {"overlap_grad_reduce": True},
    "distributed optimizer": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
}
FACTORS: dict[str, tuple[str, ...]] = {
    "router": tuple(ROUTERS),
    "keys and values": tuple(KV_POLICIES),
    "recipe": tuple(RECIPES),
    "layers": tuple(LAYERS),
    "routers over experts": ("shared", "per_step"),
    "layout": tuple(LAYOUTS),
    "recomputed": tuple(RECOMPUTE),
    "data parallel": tuple(DATA_PARALLEL),
    "sequences": ("whole", "documents and padding"),
    "output": ("untied", "tied"),
}
