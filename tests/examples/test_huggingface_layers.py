"""The example that wraps layers of transformers."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import huggingface_layers
from huggingface_layers import HuggingFaceLayers, RecursiveLM
from mor_huggingface.checkpoints.llama import llama_names
from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RecursionBlock,
    TokenChoice,
    Tokens,
)
from mor_layers.models import DecoderStack
from mor_layers.recursion import KVPolicy

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(num_layers: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=num_layers, **options))


def ids(length: int = 11) -> torch.Tensor:
    return torch.randint(31, (3, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 11])
def test_one_recursion_is_the_model_it_wraps_gradients_included(attention, length):
    model = llama(4, attn_implementation=attention)
    expected = copy.deepcopy(model)
    recursive = RecursiveLM(model, FixedDepth(), num_recursions=1)
    logits, _ = recursive(ids(length))
    wanted = expected(ids(length)).logits
    torch.testing.assert_close(logits, wanted)
    logits.square().sum().backward()
    wanted.square().sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_scaled_rope_and_what_other_layers_add_stay_the_models_own():
    scaled = llama(3, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    others = (
        Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=4)),
        Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=3)),
        MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=3, sliding_window=None)),
    )
    for model in (scaled, *others):
        expected = model(ids()).logits
        logits, _ = RecursiveLM(model, FixedDepth(), num_recursions=1)(ids())
        torch.testing.assert_close(logits, expected)


def test_a_fixed_depth_is_a_loop_over_the_shared_layers():
    looped = llama(8)  # a layer, three times the same two, a layer
    for step in (1, 2):
        for layer in (1, 2):
            repeat = looped.model.layers[2 * step + layer]
            repeat.load_state_dict(looped.model.layers[layer].state_dict())
    shared = llama(4)
    shared.lm_head.load_state_dict(looped.lm_head.state_dict())
    shared.model.embed_tokens.load_state_dict(looped.model.embed_tokens.state_dict())
    for ours, theirs in zip(shared.model.layers, (0, 1, 2, 7), strict=True):
        ours.load_state_dict(looped.model.layers[theirs].state_dict())
    expected = looped(ids()).logits
    logits, output = RecursiveLM(shared, FixedDepth(), num_recursions=3)(ids())
    torch.testing.assert_close(logits, expected)
    assert (output.depths == 3).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "router", [ExpertChoice(alpha=0.7), TokenChoice()], ids=["expert", "token"]
)
@pytest.mark.parametrize(
    "kv_policy", ["recursion_wise", "recursive_sharing", "sharing_with_update"]
)
def test_selected_tokens_attend_as_in_our_own_layers(
    attention: str, router: ExpertChoice | TokenChoice, kv_policy: KVPolicy
) -> None:
    model = llama(2, attn_implementation=attention)
    config = DecoderConfig(
        vocab_size=31,
        hidden_size=16,
        ffn_hidden_size=24,
        num_unrolled_layers=2,
        num_heads=4,
        num_kv_heads=2,
        rope_base=1e4,
        rms_norm_epsilon=model.config.rms_norm_eps,
    )
    ours = MoRTransformer(config)
    weights = model.state_dict()
    ours.load_state_dict(
        {name: weights[theirs] for name, theirs in llama_names(config).items()}, strict=False
    )
    stack = ours.recursions[0].layers
    assert isinstance(stack, DecoderStack)
    torch.manual_seed(3)
    routing = router.build(16, 3)
    theirs = HuggingFaceLayers(model.model.layers, model.model.rotary_emb)
    documents = torch.tensor([[0] * 13, [0] * 5 + [1] * 8]).T
    is_padding = torch.zeros(13, 2, dtype=torch.bool)
    is_padding[10:, 0] = True
    tokens = Tokens.whole_sequence(13, 2, None, documents, is_padding)
    results = []
    for layers in (stack, theirs):
        hidden = torch.randn(13, 2, 16, generator=torch.Generator().manual_seed(4))
        hidden.requires_grad_()
        output = RecursionBlock(layers, routing, kv_policy)(hidden, tokens)
        assert output.depths.unique().numel() > 1
        kept = output.hidden.masked_fill(is_padding[..., None], 0.0)
        (gradient,) = torch.autograd.grad(kept.square().sum(), hidden)
        results.append((kept, gradient, output.depths))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_what_a_step_cannot_keep_to_is_refused():
    sliding = MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=3, sliding_window=4))
    with pytest.raises(ValueError, match="layer 0 attends within sliding_window=4"):
        RecursiveLM(sliding, FixedDepth(), 2)
    model = llama(3)
    with pytest.raises(ValueError, match="prelude=2 and coda=1 leave none of the 3 layers"):
        RecursiveLM(model, FixedDepth(), 2, prelude=2)
    exits = RecursiveLM(model, ExpertChoice(), 2, kv_policy="exit_state")
    with pytest.raises(ValueError, match="kv_policy='exit_state' needs keys"):
        exits(ids())
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation='flex_attention'; expected one of"):
        RecursiveLM(model, FixedDepth(), 2)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = RecursiveLM(huggingface_layers.small_llama(), ExpertChoice(), num_recursions=3)
    losses = [loss for loss, _ in huggingface_layers.train(model, 15)]
    assert losses[-1] < losses[0] - 1.0
