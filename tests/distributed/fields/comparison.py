"""A recursion of fixed depth against Megatron's own layers, unrolled, under one configuration.

Both are unmodified GPTModels with the same weights in the same layout of ranks: eight plain layers, of
which six are three copies of two, and a prelude, two layers that run three times, and a coda. Whatever a
field of TransformerConfig means for plain layers, it must mean for the recursion.

Legend: `b` batch, `s` sequence.
"""

import copy
import math
import os
import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from mor_layers import RecursionConfig
from mor_megatron import SDPACoreAttention, recursion_block_spec
from mor_megatron.layers import validate
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import forget_losses

NUM_LAYERS, STEPS = 8, 3
SEQUENCE_LENGTH, NUM_SEQUENCES = 12, 4

DENSE: dict[str, Any] = {"num_layers": NUM_LAYERS, "transformer_impl": "local"}
"""What every row starts from."""
MOE = DENSE | {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
}
"""What rows about experts start from."""


@dataclass(frozen=True)
class Outcome:
    """What came of one configuration."""

    loss_difference: float = 0.0
    """Largest difference of a token's loss between recursion and plain layers."""
    gradient_difference: float = 0.0
    """Largest difference of a gradient, over the largest gradient of that parameter."""
    effect: float = 0.0
    """Largest difference that the fields make to plain layers: in a loss, or relative in a gradient.
    Infinite where the layers are spread over ranks, which is an effect too."""
    refused: str | None = None
    """What the recursion said, where it did not take the configuration."""
    refused_by_megatron: str | None = None
    """What Megatron said of the configuration, or of plain layers."""


@dataclass(frozen=True)
class Trained:
    """One batch through one model."""

    losses: Tensor  # [b s]
    gradients: dict[str, Tensor]


def compare(
    base: dict[str, Any],
    fields: dict[str, Any],
    model: dict[str, Any] | None = None,
    is_initial: bool = False,
    is_spread: bool = False,
) -> Outcome:
    """Both models under `base | fields`, and the plain ones under `base` alone.

    Args:
        base: DENSE or MOE.
        fields: of TransformerConfig.
        model: arguments of GPTModel.
        is_initial: leave weights as the models are made.
        is_spread: whether several ranks compare, each what it holds.
    """
    model = model or {}
    try:
        plain = _train(_plain(base, fields, model), True, is_initial)
    except Exception as error:
        return Outcome(refused_by_megatron=_said(error), refused=_refusal(base, fields, model))
    try:
        ours = _train(_recursive(base, fields, model), False, is_initial)
    except Exception as error:
        return Outcome(refused=_said(error))
    difference = Outcome(
        loss_difference=_largest(ours.losses - plain.losses),
        gradient_difference=_relative(ours.gradients, plain.gradients),
        effect=math.inf,
    )
    if is_spread:
        return difference
    without = _train(_plain(base, {}, {}), True, is_initial)
    effects = (
        _largest(plain.losses - without.losses),
        _relative(plain.gradients, without.gradients),
    )
    return replace(difference, effect=max(effects))


def said_later(base: dict[str, Any], fields: dict[str, Any]) -> Outcome:
    """What the recursion says of fields that are put into a finished configuration."""
    config = setup.tiny_config(**base)
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        validate(config, RecursionConfig(STEPS))
    except Exception as error:
        return Outcome(refused=_said(error))
    return Outcome()


def _plain(base: dict[str, Any], fields: dict[str, Any], model: dict[str, Any]) -> GPTModel:
    config = setup.tiny_config(**(base | fields))
    if config.experimental_attention_variant is not None:
        block = get_transformer_block_with_experimental_attention_variant_spec(config)
    elif config.sequence_parallel:  # which Megatron's local norm refuses
        block = setup.local_block(config, None)
    else:
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
    if config.multi_latent_attention:  # for which Megatron's local core attention cannot be built
        for spec in block.layer_specs or ():
            spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    built = _gpt(config, block, model)
    for layer in built.decoder.layers:
        router = getattr(layer.mlp, "router", None)
        if router is not None and 1 < layer.layer_number < config.num_layers:
            # The losses of experts that run three times count once.
            router.config = _with_shares(router.config)
    return built


def _with_shares(config: TransformerConfig) -> TransformerConfig:
    shared, coefficient = copy.copy(config), config.moe_aux_loss_coeff
    if isinstance(coefficient, list):
        shared.moe_aux_loss_coeff = [c / STEPS for c in coefficient]
    else:
        shared.moe_aux_loss_coeff = coefficient / STEPS
    if config.moe_z_loss_coeff is not None:
        shared.moe_z_loss_coeff = config.moe_z_loss_coeff / STEPS
    return shared


def _recursive(base: dict[str, Any], fields: dict[str, Any], model: dict[str, Any]) -> GPTModel:
    config = setup.tiny_config(**(base | fields))
    return _gpt(config, recursion_block_spec(config, RecursionConfig(STEPS)), model)


def _gpt(
    config: TransformerConfig, block: TransformerBlockSubmodules, model: dict[str, Any]
) -> GPTModel:
    further = None
    if config.mtp_num_layers:
        (*_, last) = get_gpt_decoder_layer_specs(
            config, use_transformer_engine=False, normalization=config.normalization
        )
        if config.multi_latent_attention:
            last.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        further = get_gpt_mtp_block_spec(config, last, use_transformer_engine=False)
    arguments = {
        "position_embedding_type": "rope",
        "mtp_block_spec": further,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    arguments |= model
    return GPTModel(
        config,
        block,
        vocab_size=setup.VOCAB_SIZE,
        max_sequence_length=setup.MAX_SEQUENCE_LENGTH,
        **arguments,
    )


def shared_name(name: str, config: TransformerConfig) -> str:
    """A plain model's parameter as the recursion names the one that it is a copy of.

    Layers are numbered from 0 within their stage, and the recursion has the place of its first.
    """
    offset = get_transformer_layer_offset(config)
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    number = -1 if found is None else int(found[1]) + offset
    if found is None or not 1 <= number < config.num_layers - 1:
        return name
    index = (number - 1) % _block_size(config)
    return f"decoder.layers.{1 - offset}.recursion.layers.{index}.{found[2]}"


def _own_buffer(name: str, config: TransformerConfig) -> str:
    """A plain router's bias as the recursion names it, which has one for each step."""
    found = re.fullmatch(r"(decoder\.layers\.(\d+)\..*)\.expert_bias", name)
    if found is None or (shared := shared_name(found[1], config)) == found[1]:
        return name
    step = (int(found[2]) - 1) // _block_size(config)
    return f"{shared}.biases.{step}.expert_bias"


def _block_size(config: TransformerConfig) -> int:
    return (config.num_layers - 2) // STEPS


def _values(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = 0.1 * torch.randn(like.shape, generator=generator)
    return (values + 1 if "norm" in name and name.endswith("weight") else values).to(like.dtype)


@torch.no_grad()
def _fill(model: GPTModel, is_plain: bool) -> None:
    for name, parameter in model.named_parameters():
        shared = shared_name(name, model.config) if is_plain else name
        parameter.copy_(_values(shared, parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            own = _own_buffer(name, model.config) if is_plain else name
            buffer.copy_(_values(own, buffer))


def _train(model: GPTModel, is_plain: bool, is_initial: bool = False) -> Trained:
    """One batch of two microbatches through Megatron's schedule."""
    model_parallel_cuda_manual_seed(123)
    torch.manual_seed(0)
    forget_losses()
    for name in ("FLASH", "FUSED", "UNFUSED"):  # GPTModel's choice for the process
        os.environ.pop(f"NVTE_{name}_ATTN", None)
    if not is_initial:
        _fill(model, is_plain)
    per_token = model.config.calculate_per_token_loss
    chunks = setup.data_parallel([model])
    kept = []

    def average(losses: Tensor) -> Any:
        kept.append(losses.detach().float())
        if per_token:
            count = torch.tensor(losses.numel(), dtype=torch.int)
            return losses.sum(), count, {}
        return losses.mean(), {}

    def step(batches: Any, wrapped: nn.Module) -> Any:
        ids = next(batches)
        positions = torch.arange(SEQUENCE_LENGTH).expand(len(ids), -1)
        if model.position_embedding_type == "mrope":
            # Time, height and width, other ones in each sequence.
            shift = torch.arange(len(ids))[:, None]
            positions = torch.stack([positions, 2 * positions + shift, positions // 3])
        return wrapped(ids[:, :-1], positions, None, labels=ids[:, 1:]), average

    tokens = setup.random_tokens(NUM_SEQUENCES, SEQUENCE_LENGTH)
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(tokens.chunk(2)),
        model=chunks,
        num_microbatches=2,
        seq_length=SEQUENCE_LENGTH,
        micro_batch_size=NUM_SEQUENCES // 2,
    )
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = shared_name(name, model.config) if is_plain else name
        gradient = parameter.main_grad.float()
        gradients[name] = gradients[name] + gradient if name in gradients else gradient.clone()
    # Only the last stage has losses.
    return Trained(torch.cat([torch.zeros(0, SEQUENCE_LENGTH), *kept]), gradients)


def _refusal(base: dict[str, Any], fields: dict[str, Any], model: dict[str, Any]) -> str | None:
    try:
        _train(_recursive(base, fields, model), is_plain=False)
    except Exception as error:
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    if ours.keys() != theirs.keys():
        return float("inf")
    pairs = [(ours[name], theirs[name]) for name in ours]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(_largest(a - b) / max(_largest(b), 1e-6) for a, b in pairs)


def _largest(difference: Tensor) -> float:
    """Of the absolute values; nan counts as infinite."""
    if not difference.numel():
        return 0.0
    return difference.abs().nan_to_num(nan=float("inf")).max().item()
