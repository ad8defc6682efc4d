"""Recursions in Megatron's HybridModel compute what they compute in a GPTModel."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from mor_layers import ExpertChoice, FixedDepth, RecursionConfig, TokenChoice
from mor_megatron import Norm, default_layer_spec, recursion_layer_spec
from mor_megatron.models.hybrid import recursion_hybrid_spec
from mor_megatron.models.hybrid_pattern import HybridPattern
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

EXPERT = RecursionConfig(
    3,
    router=ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5),
    sandwich_norms=True,
    step_embeddings=True,
)
CASES = {
    "expert": ("*-[*-*-]x3*-", EXPERT),
    "token, experts": ("*-[*-*E]x3*-", replace(EXPERT, router=TokenChoice())),
    "sharing, experts": ("*-[*-*E]x3*-", replace(EXPERT, kv_policy="recursive_sharing")),
    "attention alone": ("-[**E]x2*", replace(EXPERT, num_recursions=2)),
}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def hybrid_config(pattern: HybridPattern, **options: Any) -> TransformerConfig:
    experts = MOE if "E" in pattern.unrolled else {}
    return setup.tiny_config(num_layers=pattern.num_layers, **experts, **options)


def hybrid_model(
    config: TransformerConfig, pattern: HybridPattern, recursion: RecursionConfig
) -> HybridModel:
    model = HybridModel(
        config,
        recursion_hybrid_spec(config, pattern, recursion),
        vocab_size=setup.VOCAB_SIZE,
        max_sequence_length=setup.MAX_SEQUENCE_LENGTH,
        hybrid_layer_pattern=pattern.unrolled,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    setup.fill_parameters([model])
    return model


def run(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name with the losses of the routers in them."""
    inputs = tokens[:, :-1]
    positions = torch.arange(inputs.size(1)).expand(len(inputs), -1)
    logits = model(inputs, positions, None)
    model(inputs, positions, None, labels=tokens[:, 1:]).mean().backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def of_both_models(pattern: str, recursion: RecursionConfig) -> Any:
    """Logits and gradients of a GPTModel and of a HybridModel with its weights."""
    setup.initialize()
    # As a GPTModel writes it: an attention and the MLP after it are one layer.
    config = setup.tiny_config(num_layers=8, **(MOE if "E" in pattern else {}))
    dense = default_layer_spec(config, is_moe=False)
    second = default_layer_spec(config) if "E" in pattern else dense
    block = TransformerBlockSubmodules(
        [dense, recursion_layer_spec([dense, second], recursion), dense], layer_norm=Norm
    )
    gpt = setup.tiny_gpt(config, block=lambda *_: block)[0]
    read = HybridPattern.parse(pattern)
    hybrid = hybrid_model(hybrid_config(read), read, recursion)
    weights = {_hybrid_name(name, read): p for name, p in gpt.named_parameters()}
    own = dict(hybrid.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    tokens = setup.random_tokens(3, 14)
    gpt_logits, gpt_gradients = run(gpt, tokens)
    logits, gradients = run(hybrid, tokens)
    gpt_gradients = {_hybrid_name(name, read): g for name, g in gpt_gradients.items()}
    return (logits.detach(), gradients), (gpt_logits.detach(), gpt_gradients)


def _hybrid_name(name: str, pattern: HybridPattern) -> str:
    """Where a HybridModel keeps a parameter of the GPTModel with a layer on either side."""
    half = int(".mlp." in name or "pre_mlp_layernorm" in name)
    last = pattern.num_layers - 2
    if ".recursion." in name:
        return name.replace("decoder.layers.1.", "decoder.layers.2.")
    name = name.replace("decoder.final_layernorm", "decoder.final_norm")
    name = name.replace("decoder.layers.0.", f"decoder.layers.{half}.")
    return name.replace("decoder.layers.2.", f"decoder.layers.{last + half}.")


@pytest.mark.parametrize("case", ["expert", "token, experts", "sharing, experts"])
def test_a_hybrid_model_is_the_gpt_model_of_the_same_recursion(pool: WorkerPool, case: str) -> None:
    pattern, recursion = CASES[case]
    hybrid, gpt = pool.run(of_both_models, pattern=pattern, recursion=recursion)[0]
    assert torch.equal(hybrid[0], gpt[0])
    assert hybrid[1].keys() == gpt[1].keys()
    for name, gradient in hybrid[1].items():
        torch.testing.assert_close(gradient, gpt[1][name], rtol=1e-5, atol=1e-7, msg=name)


def in_layout(
    layout: dict[str, Any], pattern: str, recursion: RecursionConfig, options: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    setup.initialize(**layout)
    read = HybridPattern.parse(pattern)
    model = hybrid_model(hybrid_config(read, **options), read, recursion)
    wrapped = setup.data_parallel([model])  # type: ignore[list-item]
    loss = setup.forward_backward(wrapped, setup.random_tokens(4, 14), 1)
    return loss, setup.gather_gradients(wrapped)


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP=2": (2, {"tp": 2}, {}),
    "TP=2 with sequence parallel": (2, {"tp": 2}, {"sequence_parallel": True}),
    "PP=2": (2, {"pp": 2}, {}),
    "EP=2": (2, {"ep": 2}, {}),
    "recomputation": (1, {}, FULL),
}
IN_SHORT = [
    ("expert", "TP=2"),
    ("token, experts", "TP=2 with sequence parallel"),
    ("expert", "PP=2"),
    ("sharing, experts", "recomputation"),
    ("attention alone", "TP=2 with sequence parallel"),
]
ALL = [
    (case, layout)
    for case in CASES
    for layout in LAYOUTS
    if layout != ("TP=2" if "E" in CASES[case][0] else "EP=2")  # Megatron wants SP with experts
]


@pytest.mark.parametrize(
    ("case", "layout"),
    [c if c in IN_SHORT else pytest.param(*c, marks=pytest.mark.full) for c in ALL],
)
def test_a_layout_computes_what_one_rank_computes(pool: WorkerPool, case: str, layout: str) -> None:
    pattern, recursion = CASES[case]
    size, parallel, options = LAYOUTS[layout]
    plain = partial(pool.run, in_layout, recursion=recursion)
    expected_loss, expected = plain(layout={}, pattern=pattern, options={})[0]
    staged = pattern.replace("[", "|[", 1) if "pp" in parallel else pattern
    for loss, gradients in plain(size, layout=parallel, pattern=staged, options=options):
        assert loss == pytest.approx(expected_loss, abs=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


parts = st.one_of(
    st.sampled_from("*-EMGD+"),
    st.builds(
        lambda layers, times: f"[{''.join(layers)}]x{times}",
        st.lists(st.sampled_from(["*", "*-", "*E"]), min_size=1, max_size=4),
        st.integers(1, 12),
    ),
)
stages = st.lists(parts, min_size=1, max_size=5).map("".join)


@given(st.lists(stages, min_size=1, max_size=3).map("|".join))
def test_a_pattern_is_read_and_written_alike(text: str) -> None:
    pattern = HybridPattern.parse(text)
    assert str(pattern) == text
    assert HybridPattern.parse(text.replace("*", " * ").replace("[", " [ ")) == pattern


def test_a_pattern_unrolls_to_the_one_megatron_reads() -> None:
    pattern = HybridPattern.parse(" *- | [*- *E]x3 [*]x2 | M*- ")
    assert pattern.unrolled == "*-|*-*E*-*E*-*E**|M*-"
    assert pattern.num_layers == get_hybrid_total_layer_count(pattern.unrolled) == 19
    assert [part.num_recursions for part in pattern.recursions] == [3, 2]
    assert [part.layers for part in pattern.recursions] == [["*-", "*E"], ["*"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "stage without layers"),
        ("*-||*-", "stage without layers"),
        ("*-[*-*E]*-", r"does not say how often it runs. Write for example \[\*-\*E\]x3"),
        ("*-[*-]x0", "at least once"),
        ("[*-|*-]x2", "split by a stage"),
        ("[]x2", "contains nothing"),
        ("[M*-]x2", "contains attention, MLP, Mamba.* would leave a gap in that step's state"),
        ("[G-]x2", "as in M-\\[\\*-\\]x3M-"),
        ("[-*]x2", "'\\*', '\\*-' or '\\*E'"),
        ("[*--]x2", "or followed by an MLP or experts"),
        ("[*-[*-]x2]x3", "'\\[' at 0 has no matching bracket"),
        ("*-]x3", "']' at 2 has no matching bracket"),
        ("*-x3", "'x' at 2 is not a layer. Use \\* \\(attention\\), - \\(MLP\\)"),
        ("*-[*-]x2/*-", "multi-token prediction"),
    ],
)
def test_a_pattern_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HybridPattern.parse(text)


def refusals() -> dict[str, str]:
    """What each wrong model is refused with."""
    setup.initialize()
    two = RecursionConfig(2, router=FixedDepth())
    pattern = HybridPattern.parse("*-[*-]x2")

    def spec(text: str, recursion: Any = two, **options: Any) -> None:
        read = HybridPattern.parse(text)
        config = setup.tiny_config(**({"num_layers": read.num_layers} | options))
        recursion_hybrid_spec(config, read, recursion)

    def other_pattern() -> None:
        config = hybrid_config(pattern)
        spec = recursion_hybrid_spec(config, pattern, two)
        HybridModel(config, spec, 64, 64, hybrid_layer_pattern="*-*-")

    wrong = {
        "steps": lambda: spec("[*-]x3"),
        "none": lambda: spec("*-*-"),
        "number": lambda: spec("[*-]x2[*-]x2", [two]),
        "depth": lambda: spec("[*-]x2", num_layers=8),
        "stages": lambda: spec("*-|[*-]x2"),
        "experts": lambda: spec("[*E]x2"),
        "mamba": lambda: spec("M[*-]x2"),
        "fp8": lambda: spec("[*-]x2", fp8="hybrid"),
        "other": other_pattern,
    }
    said = {}
    for name, build in wrong.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011  (the test reads the message)
            build()
        said[name] = str(error.value)
    return said


def test_a_model_that_cannot_be_built_is_refused(pool: WorkerPool) -> None:
    said = pool.run(refusals)[0]
    for name, part in {
        "steps": "[*-]x3 runs 3 times, but its RecursionConfig has num_recursions=2",
        "none": "'*-*-' has 0 recursions, but 0 RecursionConfigs",
        "number": "2 recursions, but 1 RecursionConfigs",
        "depth": "Set num_layers=4, not 8",
        "stages": "2 stages, but pipeline_model_parallel_size=1",
        "experts": "Set num_moe_experts",
        "mamba": "no spec for 'M' (Mamba)",
        "fp8": "Use bf16",
        "other": "Build the HybridModel with hybrid_layer_pattern='*-*-*-'",
    }.items():
        assert part in said[name], said[name]
