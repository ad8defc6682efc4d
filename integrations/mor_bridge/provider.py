"""MoRModelProvider: the settings from which Megatron-Bridge builds a GPTModel with recursions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional as F

from mor_layers import DecoderConfig, RecursionConfig, from_mapping, to_mapping
from mor_megatron.layers import validate
from mor_megatron.models.gpt import final_norm, recursion_block_spec, unrolled_layer_specs
from mor_megatron.parallel import rotary_settings
from mor_megatron.platform import has_transformer_engine


def recursive_layers(
    config: "MoRModelProvider", vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, for `transformer_layer_spec`.

    Routers are updated and their figures logged after each batch, as with
    `mor_megatron.models.megatron_lm.recursion_builder`.
    """
    recursion = config.recursion_config
    if recursion is None:
        specs = unrolled_layer_specs(config)
        first = get_transformer_layer_offset(config, vp_stage)
        own = specs[first : first + get_num_layers_to_build(config, vp_stage)]
        return TransformerBlockSubmodules(layer_specs=own, layer_norm=final_norm(specs[-1]))
    return recursion_block_spec(config, recursion, None, vp_stage)


@dataclass
class MoRModelProvider(GPTModelProvider):
    """A GPTModel whose layers form a Mixture-of-Recursions.

    Parallelism, precision and recomputation are set as with any GPTModelProvider. `num_layers` counts
    the unrolled depth.
    """

    transformer_layer_spec: Any = recursive_layers
    recursion: dict[str, Any] | None = field(default=None)
    """`to_mapping` of a RecursionConfig, which a run's YAML can hold; None: a plain GPTModel."""

    @classmethod
    def from_decoder(
        cls,
        decoder: DecoderConfig,
        params_dtype: torch.dtype = torch.float32,
        seq_length: int | None = None,
    ) -> "MoRModelProvider":
        """The provider for a model with these settings.

        Args:
            decoder: the settings.
            params_dtype: data type of the parameters.
            seq_length: longest sequence. Default: that of GPTModelProvider.

        Raises:
            ValueError: Megatron does not support a setting.
        """
        for name in decoder.beyond_llama:
            raise ValueError(
                f"{name}={getattr(decoder, name)} is not converted to Megatron. Leave it out, or use "
                "the PyTorch model."
            )
        if decoder.latent_attention is not None:
            raise ValueError(
                "latent_attention is not converted by this bridge. Build the GPTModel with "
                "mor_megatron.recursion_block_spec, and its weights with "
                "mor_megatron.checkpoints.weights."
            )
        rotary = rotary_settings(decoder.rope_base, decoder.rope_scaling)
        has_gpu = torch.cuda.is_available()
        fields: dict[str, Any] = {
            "num_layers": decoder.num_unrolled_layers,
            "hidden_size": decoder.hidden_size,
            "ffn_hidden_size": decoder.ffn_hidden_size,
            "num_attention_heads": decoder.num_heads,
            "num_query_groups": decoder.kv_heads,
            "kv_channels": decoder.head_size,
            "add_qkv_bias": decoder.qkv_bias,
            "qk_layernorm": decoder.qk_norm,
            "layernorm_epsilon": decoder.rms_norm_epsilon,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **rotary.model,
            **rotary.attributes,
            "share_embeddings_and_output_weights": decoder.tie_embeddings,
            "vocab_size": decoder.vocab_size,
            # Padded to a multiple of the tensor-parallel ranks, and cut again on export.
            "should_pad_vocab": True,
            "make_vocab_size_divisible_by": 1,
            "bf16": params_dtype == torch.bfloat16,
            "fp16": params_dtype == torch.float16,
            "params_dtype": params_dtype,
            "pipeline_dtype": params_dtype,
            "bias_activation_fusion": has_gpu,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
            "cross_entropy_loss_fusion": has_gpu,
        }
        if seq_length is not None:
            fields["seq_length"] = seq_length
        if decoder.moe is not None:
            fields |= _expert_fields(decoder, grouped=has_gpu and has_transformer_engine())
        recursion = decoder.only_recursion("mor_bridge")
        recursion = None if recursion is None else to_mapping(recursion)
        return cls(**fields, recursion=recursion)

    @property
    def recursion_config(self) -> RecursionConfig | None:
        """The recursion, if there is one."""
        if self.recursion is None:
            return None
        return from_mapping(RecursionConfig, self.recursion, "recursion")

    def finalize(self) -> None:
        """Check the settings, after parallelism and other fields were overridden.

        Raises:
            ValueError: a setting cannot be used with a recursion.
        """
        super().finalize()
        recursion = self.recursion_config
        if recursion is not None:
            validate(self, recursion)


def _expert_fields(decoder: DecoderConfig, grouped: bool) -> dict[str, Any]:
    moe, schedule = decoder.moe, decoder.schedule
    assert moe is not None
    if moe.beyond_plain:
        raise ValueError(
            f"{moe.shown_beyond_plain()} is not converted to Megatron. Keep the model in our format, or "
            "leave these settings out."
        )
    if moe.bias_update_rate:
        raise ValueError(
            f"MoEConfig.bias_update_rate={moe.bias_update_rate} adds a bias to softmax scores, but "
            "Megatron supports expert biases only with sigmoid scores. Use a balance loss instead."
        )
    at_ends = 0 if decoder.dense_ends else 1
    between = decoder.num_unrolled_layers - schedule.prelude - schedule.coda
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.experts_per_token,
        "moe_ffn_hidden_size": moe.ffn_hidden_size or decoder.ffn_hidden_size,
        "moe_layer_freq": [at_ends] * schedule.prelude + [1] * between + [at_ends] * schedule.coda,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": moe.balance_coefficient,
        "moe_z_loss_coeff": moe.z_loss_coefficient or None,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_token_drop_policy": "position" if moe.drop_policy == "position" else "probs",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
    }
