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
    """A DecoderConfig in the form of the library.

    Args:
        mor: `to_mapping` of a DecoderConfig. Without it, the config only contains defaults of the
            library, and no model can be built from it.
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
            if config.moe is not None:
                self.num_experts = config.moe.num_experts
                self.num_experts_per_tok = config.moe.experts_per_token
        super().__init__(**kwargs)

    @classmethod
    def from_decoder(cls, config: DecoderConfig, **kwargs: Any) -> "MoRConfig":
        """The config of a model with these settings."""
        return cls(to_mapping(config), **kwargs)

    @property
    def decoder_config(self) -> DecoderConfig:
        """The settings as a DecoderConfig.

        Raises:
            ValueError: there are no settings, or one is not valid.
        """
        return from_mapping(DecoderConfig, self.mor, SETTINGS)


class MoRForCausalLM(PreTrainedModel, GenerationMixin):
    """A MoRTransformer with the library's interface.

    In training mode, tokens are routed as in training, and the loss includes the losses of routers. In
    evaluation mode, a token's depth does not depend on later tokens, so `generate` gives the same
    result as a forward pass over the whole text, with or without a `MoRCache`. Padding may be anywhere
    and has no effect.
    """

    config_class = MoRConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["RecursionBlock"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """What stays on one device, and what FSDP gathers at once: all steps of a recursion use the same
    weights, which would travel once per step if its layers were gathered one by one."""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    """False: Trainer divides the loss by the number of micro-batches, and not by the number of labels.
    The losses of routers need the former."""
    _tied_weights_keys: ClassVar = {"model.output.weight": "model.embedding.weight"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRTransformer(config.decoder_config)
        # The buffers of routers stay in fp32 in a model of lower precision, because the small updates
        # of biases and thresholds would be rounded away.
        self._keep_in_fp32_modules_strict = _precise_buffers(self)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing. A MoRTransformer initializes itself, and files contain all weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the layers of recursions are recomputed in the backward pass, step by step.

        Layers outside of recursions keep their activations.
        """
        return all(recursion.recompute for recursion in self.model.recursions)

    def _set_gradient_checkpointing(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, enable: bool = True, every_n_layers: int = 1, **options: Any
    ) -> None:
        function = options.get("gradient_checkpointing_func")
        given = {} if function is None else function.keywords
        offloads = function is not None and function.func is not checkpoint
        if every_n_layers != 1 or offloads or given.get("use_reentrant"):
            raise ValueError(
                f"gradient checkpointing with {given}, every_n_layers={every_n_layers} or "
                "offloading is not supported: a recursion recomputes whole steps without re-entry. "
                'Leave the options out, or pass {"use_reentrant": False}.'
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
        return_dict: bool | None = True,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Compute logits, and the loss if there are `labels`.

        Args:
            input_ids: token ids. With a cache, only those that follow the cached tokens.
            attention_mask: 0 for padding, which may be anywhere. With a cache, the mask covers the
                cached tokens and the new ones.
            labels: `input_ids`, with a negative number for tokens that the loss should ignore.
            cache: the cache of earlier calls. The new tokens are added to it.
            use_cache: create a cache if none is given. Default: False.
            logits_to_keep: compute logits only for this number of columns at the end. 0: for all.
            unsupported: arguments of other models, such as `inputs_embeds`. Wrappers such as peft
                pass them as None or False, which has no effect.

        Raises:
            TypeError: an unsupported argument is set.
            ValueError: a cache is used in training mode, with gradients or with labels, or has
                another class; or the mask has the wrong shape.
        """
        given = [
            name for name, value in unsupported.items() if value is not None and value is not False
        ]
        if given:
            raise TypeError(f"{', '.join(given)} cannot be given to this model. Leave it out.")
        if return_dict is None:
            return_dict = True
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
        """Run whole texts. Positions are counted from the first token of each text.

        The model only supports padding at the end, so padding is moved there, and the logits are
        moved back.
        """
        order = is_padding = None
        if is_token is not None:  # sort tokens before padding
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

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
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

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *sizes: Any,
        **named: Any,
    ) -> None:
        """The library's hook that creates the cache for `generate`."""
        kind = generation_config.cache_implementation
        if kind is not None:
            raise ValueError(
                f"cache_implementation={kind!r} cannot store the rows of recursion steps. Leave it "
                "out, and the model creates a cache for its KV policy."
            )
        if model_kwargs.get("cache") is not None:
            model_kwargs["cache"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = MoRCache(self.model)


def _precise_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that must keep their precision, such as biases and thresholds."""
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
            f"a {type(cache).__name__} cannot store the rows of recursion steps. Pass no cache and "
            "use_cache=True, or pass a mor_huggingface.MoRCache(model.model)."
        )
    if is_training:
        raise ValueError("a cache needs evaluation mode. Call eval() on the model.")
    if torch.is_grad_enabled():
        raise ValueError("a cache has no gradients. Call the model within torch.no_grad().")
    if labels is not None:
        raise ValueError("there is no loss with a cache. Leave out labels, or cache and use_cache.")


def _following(labels: Tensor | None) -> Tensor | None:
    """Shift labels by one. The library's labels are at the token itself, ours at the one before."""
    if labels is None:
        return None
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
