"""A value of a field of TransformerConfig to try, and short ways to write one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.distributed.fields.comparison import DENSE, MOE


@dataclass(frozen=True)
class Trial:
    """A value to try."""

    value: Any
    given: dict[str, Any] = field(default_factory=dict)
    """Other fields, without which it is illegal or idle."""
    base: dict[str, Any] = field(default_factory=lambda: DENSE)
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of GPTModel."""
    is_initial: bool = False
    """Whether the weights stay as the models made them."""
    tolerance: float = 2e-6
    """Of a token's loss."""
    gradient_tolerance: float = 1e-5
    """Relative to the largest gradient of the same parameter."""
    says: str = ""
    """A part of the error, where a recursion, or Megatron itself, refuses it."""
    note: str = ""
    """For the page."""
    layout: dict[str, int] = field(default_factory=dict)
    """Arguments of `megatron_setup.initialize`; their product is the number of ranks."""
    is_set_later: bool = False
    """Whether it is put into a finished configuration, whose own checks would ask for something that
    this machine does not have before the recursion is asked."""

    @property
    def num_ranks(self) -> int:
        """Processes that it is tried in."""
        return math.prod(self.layout.values())


def spread(value: Any, layout: dict[str, int], note: str = "", **given: Any) -> Trial:
    """A value in a dense model spread over ranks."""
    return Trial(value, given, note=note, layout=layout)


def spread_moe(value: Any, layout: dict[str, int], note: str = "", **given: Any) -> Trial:
    """A value in a model with experts spread over ranks."""
    return Trial(value, given, MOE, note=note, layout=layout)


def refused_later(value: Any, says: str, note: str = "", **given: Any) -> Trial:
    """A value that a recursion refuses, once Megatron has what the value asks for."""
    return Trial(value, given, MOE, says=says, note=note, is_set_later=True)


def dense(value: Any, note: str = "", **given: Any) -> Trial:
    """A value in a model without experts."""
    return Trial(value, given, note=note)


def moe(value: Any, note: str = "", **given: Any) -> Trial:
    """A value in a model with experts."""
    return Trial(value, given, MOE, note=note)


def refused(value: Any, says: str, **given: Any) -> Trial:
    """A value that a recursion in a dense model does not take."""
    return Trial(value, given, says=says)


def refused_moe(value: Any, says: str, **given: Any) -> Trial:
    """A value that a recursion with experts does not take."""
    return Trial(value, given, MOE, says=says)


def rejected(value: Any, says: str, note: str = "", **given: Any) -> Trial:
    """A value that Megatron does not take in a dense model on a CPU."""
    return Trial(value, given, says=says, note=note)


def rejected_moe(value: Any, says: str, note: str = "", **given: Any) -> Trial:
    """A value that Megatron does not take in a model with experts on a CPU."""
    return Trial(value, given, MOE, says=says, note=note)


def constant(value: float) -> Callable[[Tensor], Tensor]:
    """Fills a weight."""
    return lambda weight: weight.fill_(value)


SHARED = {"moe_shared_expert_intermediate_size": 32}
SIGMOID = {"moe_router_score_function": "sigmoid"}
MLA = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    "rope_type": "rope",
}
MTP = {"mtp_num_layers": 2}
MUP = {"use_mup": True, "mup_base_hidden_size": 16}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
CONSTANT = {"init_method": constant(0.02), "output_layer_init_method": constant(0.05)}
ROUNDING = {"tolerance": 2e-2, "gradient_tolerance": 0.1, "note": "up to its rounding"}
