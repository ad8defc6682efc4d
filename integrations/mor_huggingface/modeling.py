"""MoRTransformer as a model of the transformers library: MoRConfig and MoRForCausalLM.

Legend: `b` batch, `s` sequence, `v` vocabulary.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mor_layers import DecoderConfig, MoRTransformer, from_mapping, to_mapping
from mor_layers.model_folder import MODEL_TYPE, SETTINGS


class MoRConfig(PretrainedConfig):
    """A DecoderConfig, as the library stores and passes it.

    Args:
        mor: `to_mapping` of a DecoderConfig. Without it the config holds defaults of the
            library only, and no model can be built from it.
    """

    model_type = MODEL_TYPE

    def __init__(self, mor: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.mor = mor
        if mor is not None:
            config = self.decoder_config
            kwargs |= {"tie_word_embeddings": config.tie_embeddings}
            self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
            self.num_hidden_layers = config.num_unrolled_layers
            self.num_attention_heads = config.num_heads
        super().__init__(**kwargs | {"use_cache": False})

    @classmethod
    def from_decoder(cls, config: DecoderConfig, **kwargs: Any) -> "MoRConfig":
        """The config of a model with these settings."""
        return cls(to_mapping(config), **kwargs)

    @property
    def decoder_config(self) -> DecoderConfig:
        """The settings.

        Raises:
            ValueError: there are none, or one is not allowed.
        """
        return from_mapping(DecoderConfig, self.mor, SETTINGS)


class MoRForCausalLM(PreTrainedModel, GenerationMixin):
    """A MoRTransformer with the library's interface.

    In training mode tokens are routed as in training, and the loss holds the routers' losses. In
    evaluation mode no token's depth depends on later ones, so `generate` computes just what a pass
    over the whole text does. It keeps no cache: every new token costs a pass over all before it.
    `mor_layers.DepthBatchingEngine(model.model, ...)` generates the same tokens with caches.
    """

    config_class = MoRConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"model.output.weight": "model.embedding.weight"}

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRTransformer(config.decoder_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a MoRTransformer comes initialized, and a file lacks no weight."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        labels: Int[Tensor, "b s"] | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits, and the loss where `labels` are given.

        Args:
            input_ids: token ids.
            attention_mask: 0 where `input_ids` holds no token; on either side.
            labels: `input_ids`, with a negative number where nothing should be learnt.
        """
        is_padding = None
        if attention_mask is not None and not attention_mask.all():
            is_padding = attention_mask == 0
        output = self.model(
            input_ids, _following(labels), is_padding=is_padding, causal_routing=not self.training
        )
        loss = output.lm_loss
        if loss is not None and self.training:
            for recursion in output.recursions:
                loss = loss + sum(recursion.losses.values())
        result = CausalLMOutput(loss=loss, logits=output.logits)
        return result if return_dict else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _following(labels: Tensor | None) -> Tensor | None:
    """The label after each; the library's labels stand at the token itself."""
    if labels is None:
        return None
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
