"""MoRTransformer as a model of the transformers library: MoRConfig and MoRForCausalLM.

Legend: `b` batch, `s` sequence, `v` vocabulary.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from mor_huggingface.cache import MoRCache
from mor_layers import DecoderConfig, MoRTransformer, from_mapping, to_mapping
from mor_layers.modules import PreciseBuffers
from mor_layers.weights import MODEL_TYPE, SETTINGS


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
            self.num_key_value_heads, self.head_dim = config.kv_heads, config.head_size
        super().__init__(**kwargs)

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
    evaluation mode no token's depth depends on later ones, so `generate` computes, with a `MoRCache`
    or without, just what a pass over the whole text does. Padding may stand anywhere and is as if
    it were not there.
    """

    config_class = MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    """Trainer divides the loss by its number of micro-batches: the routers' losses have no other."""
    _tied_weights_keys: ClassVar = {"model.output.weight": "model.embedding.weight"}

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRTransformer(config.decoder_config)
        # In a model of lower precision too: steps of biases and thresholds would be rounded away.
        self._keep_in_fp32_modules_strict = _precise_buffers(self)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a MoRTransformer comes initialized, and a file lacks no weight."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the recursions' layers are recomputed in the backward pass, step by step.

        Layers outside of recursions keep their activations.
        """
        return all(recursion.recompute for recursion in self.model.recursions)

    def _set_gradient_checkpointing(
        self, enable: bool = True, every_n_layers: int = 1, **options: Any
    ) -> None:
        function = options.get("gradient_checkpointing_func")
        given = {} if function is None else function.keywords
        offloads = function is not None and function.func is not checkpoint
        if every_n_layers != 1 or offloads or given.get("use_reentrant"):
            raise ValueError(
                f"gradient checkpointing with {given}, every_n_layers={every_n_layers} or "
                "offloading is not possible: a recursion recomputes whole steps, without re-entry. "
                'Leave the options out, or give {"use_reentrant": False}.'
            )
        for recursion in self.model.recursions:
            recursion.recompute = enable

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        labels: Int[Tensor, "b s"] | None = None,
        cache: MoRCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits, and the loss where `labels` are given.

        Args:
            input_ids: token ids; with a cache that holds some, those that follow.
            attention_mask: 0 where there is no token, anywhere; with a cache for all tokens up to
                now.
            labels: `input_ids`, with a negative number where nothing should be learnt.
            cache: what earlier calls left; it is lengthened.
            use_cache: begin a cache where none is given. Default: no.
            logits_to_keep: logits of so many last columns only; 0: of all.

        Raises:
            ValueError: a cache in training, with gradients, with labels or of another class; a mask
                of another shape.
        """
        if cache is not None or use_cache:
            _check_cacheable(cache, labels, self.training)
            cache = MoRCache(self.model) if cache is None else cache
            states = cache.extend(input_ids, attention_mask)
            result = CausalLMOutputWithPast(
                logits=self.model.output(states[:, -logits_to_keep:]), cache=cache
            )
            return result if return_dict else result.to_tuple()
        is_token = None
        if attention_mask is not None and not attention_mask.all():
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; without a cache it "
                    f"must be that of input_ids, {tuple(input_ids.shape)}."
                )
            is_token = attention_mask != 0
        logits, loss = self._run(input_ids, is_token, _following(labels))
        result = CausalLMOutputWithPast(loss=loss, logits=logits[:, -logits_to_keep:])
        return result if return_dict else result.to_tuple()

    def _run(
        self, ids: Tensor, is_token: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over whole texts; places are counted from each text's first token."""
        order = is_padding = None
        if is_token is not None:  # tokens first, padding last
            order = is_token.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
            ids, is_padding = ids.gather(1, order), is_token.logical_not().gather(1, order)
            labels = None if labels is None else labels.gather(1, order)
        output = self.model(ids, labels, is_padding=is_padding, causal_routing=not self.training)
        logits = output.logits
        if order is not None:
            back = order.argsort(dim=1)[..., None].expand_as(logits)
            logits = logits.gather(1, back)
        if labels is None:
            return logits, None
        return logits, output.loss if self.training else output.lm_loss

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "b s"],
        next_sequence_length: int | None = None,
        cache: MoRCache | None = None,
        attention_mask: Int[Tensor, "b s"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **of_the_loop: Any,
    ) -> dict[str, Any]:
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *sizes: Any,
        **named: Any,
    ) -> None:
        """The library's hook for the cache that `generate` fills."""
        kind = generation_config.cache_implementation
        if kind is not None:
            raise ValueError(
                f"cache_implementation={kind!r} has no row for a recursion's steps. Leave it out: "
                "this model's cache keeps what its KV policy says."
            )
        if model_kwargs.get("cache") is not None:
            model_kwargs["cache"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = MoRCache(self.model)


def _precise_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that steer routers."""
    return {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, PreciseBuffers)
        for buffer, value in module.named_buffers(recurse=False)
        if value.is_floating_point()
    }


def _check_cacheable(cache: object, labels: Tensor | None, is_training: bool) -> None:
    if cache is not None and not isinstance(cache, MoRCache):
        raise ValueError(
            f"a {type(cache).__name__} has no row for a recursion's steps. Give none and "
            "use_cache=True, or a mor_huggingface.MoRCache(model.model)."
        )
    if is_training:
        raise ValueError("a cache is for generation, and the model is in training. Call eval().")
    if torch.is_grad_enabled():
        raise ValueError("a cache carries no gradients. Call the model within torch.no_grad().")
    if labels is not None:
        raise ValueError("there is no loss with a cache. Leave out labels, or cache and use_cache.")


def _following(labels: Tensor | None) -> Tensor | None:
    """The label after each; the library's labels stand at the token itself."""
    if labels is None:
        return None
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
