"""A mixture of experts that counts per recursion step: route -> dispatch -> compute -> combine.

All steps share the experts. They also share the router, or each step has its own. Balance is tracked
per (step, expert) cell: each cell has its own load, drops, losses and loss-free bias.

Sources: Shazeer et al. 2017; DeepSeek-V2 and -V3 (arXiv 2405.04434, 2412.19437) for a shared expert.
`router` has those of the losses and of the choice.
"""

from mor_layers.layers.moe.config import MOST_EXPERTS, ExpertRouters, MoEConfig
from mor_layers.layers.moe.experts import Experts, SharedExpert
from mor_layers.layers.moe.layer import MoE
from mor_layers.layers.moe.router import Assignment, ExpertRouter

__all__ = [
    "MOST_EXPERTS",
    "Assignment",
    "ExpertRouter",
    "ExpertRouters",
    "Experts",
    "MoE",
    "MoEConfig",
    "SharedExpert",
]
