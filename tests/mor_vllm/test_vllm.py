"""The model for vLLM, through an emulation of what it uses of vLLM.

vLLM itself runs in tests/mor_vllm/real, on more models (`make test-vllm`).
"""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    TokenChoice,
    save_model,
)
from mor_layers.layers import NormModulation
from mor_layers.recursion import HistoryInjection, HyperConnections
from mor_vllm import plugin as vllm_plugin
from tests.mor_layers.small_models import ROUTERS, plain_config, small_config, small_model
from tests.mor_vllm.vllm_emulation import Runner, emulated, place, vllm_config

SHARING = "recursive_sharing"
EVERYTHING = {
    "step_embeddings": True,
    "input_injection": True,
    "sandwich_norms": True,
    "loop_norm": True,
}
EXPERTS = MoEConfig(3, 2, bias_update_rate=0.01)
SKIPS_STEP_1 = ROUTERS["expert_choice_first_step_too"]


def helped(config: DecoderConfig) -> DecoderConfig:
    return replace(config, recursion=replace(config.recursion, **EVERYTHING))


SERVED: dict[str, DecoderConfig] = {
    "fixed depth": small_config(block_size=2, share_norms=False),
    "fixed depth, sharing, helps": helped(small_config(kv_policy=SHARING, share_norms=False)),
    "one by one": small_config(sharing="middle_sequence", block_size=2),
    "no recursion": plain_config(3),
    "long ends, fixed depth": small_config(block_size=2, ends=(2, 3)),
    "long ends, token choice": small_config(TokenChoice(), kv_policy=SHARING, ends=(2, 3)),
    "expert choice": small_config(ROUTERS["expert_choice"], block_size=2),
    "expert choice, sharing, skips step 1": small_config(SKIPS_STEP_1, kv_policy=SHARING),
    "expert choice, update, skips step 1": small_config(
        SKIPS_STEP_1, kv_policy="sharing_with_update"
    ),
    "expert choice, exit state, experts": replace(
        small_config(ExpertChoice(), kv_policy="exit_state", block_size=2), moe=EXPERTS
    ),
    "token choice, sharing, helps": helped(small_config(TokenChoice(), kv_policy=SHARING)),
    "random depth, cycle, tied": replace(
        small_config(ROUTERS["random_depth"], sharing="cycle"), tie_embeddings=True
    ),
    "Qwen's": replace(
        small_config(TokenChoice(), kv_policy=SHARING),
        head_dim=4,
        num_kv_heads=2,
        qkv_bias=True,
        qk_norm=True,
        rope_base=500.0,
    ),
}


@pytest.fixture
def runner():
    with emulated() as runner:
        yield runner


def loaded(folder: Path, runner: Runner) -> Any:
    """As vLLM does it: the plugin, the configuration, the model, its weights from the files."""
    vllm_plugin.register()
    config = AutoConfig.from_pretrained(folder)
    (architecture,) = config.architectures
    module, _, name = runner.architectures[architecture].partition(":")
    kind = getattr(importlib.import_module(module), name)
    before = torch.get_default_dtype()
    model = kind(vllm_config=vllm_config(config))
    assert torch.get_default_dtype() == before
    names = model.load_weights(load_file(folder / "model.safetensors").items())
    assert names >= {name for name, _ in model.named_parameters()}
    return model.eval()


def run(model: Any, runner: Runner, batch: list[tuple[int, int, torch.Tensor]]) -> list[Any]:
    """Logits of the last token of each request, from its number, first position and tokens."""
    runner.slots = [(n, start + i) for n, start, ids in batch for i in range(len(ids))]
    positions = torch.tensor([position for _, position in runner.slots])
    states = model(input_ids=torch.cat([ids for *_, ids in batch]), positions=positions)
    ends = torch.tensor([len(ids) for *_, ids in batch]).cumsum(0) - 1
    return list(model.compute_logits(states[ends]))


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_requests_that_come_and_go_get_the_logits_of_the_model(tmp_path, runner, name):
    ours: MoRTransformer = small_model(SERVED[name]).eval()
    save_model(ours, tmp_path / "model")
    model = loaded(tmp_path / "model", runner)
    texts = [torch.randint(17, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 6, 4)]
    # Prompts whole and in pieces, beside single tokens of other requests.
    batches = [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)], [(2, 0, 3), (0, 6, 9), (1, 4, 5)], [(1, 5, 6)]]
    depths = set()
    for batch in batches:
        pieces = [(request, start, texts[request][start:end]) for request, start, end in batch]
        for (request, _, end), logits in zip(batch, run(model, runner, pieces), strict=True):
            whole = ours(texts[request][None, :end], causal_routing=True)
            depths |= set(whole.depths.flatten().tolist())
            torch.testing.assert_close(logits, whole.logits[0, -1], rtol=1e-5, atol=1e-5)
    if isinstance(getattr(SERVED[name].recursion, "router", FixedDepth()), FixedDepth):
        assert len(depths) == 1
    else:
        assert len(depths) > 1  # else no token exits, and nothing was shown


@pytest.mark.parametrize("name", SERVED)
def test_later_steps_share_the_cache_of_the_first(tmp_path, runner, name):
    config = SERVED[name]
    save_model(small_model(config), tmp_path / "model")
    loaded(tmp_path / "model", runner)
    assert sorted(map(place, runner.layers)) == list(range(config.num_unrolled_layers))
    recursion, schedule = config.effective_recursion, config.schedule
    targets = {
        place(own): place(layer.kv_sharing_target_layer_name)
        for own, layer in runner.layers.items()
        if layer.kv_sharing_target_layer_name is not None
    }
    if recursion.kv_policy != SHARING:
        assert not targets
        return
    size, first = schedule.block_size, schedule.prelude
    later = range(first + size, first + size * recursion.num_recursions)
    assert targets == {depth: first + (depth - first) % size for depth in later}
    assert len(runner.caches) == first + size + schedule.coda


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(plain_config(4), moe=MoEConfig(2, 1, capacity_factor=1.0)),
            "moe.capacity_factor=1.0 cannot be served",
        ),
        (replace(small_config(), head_dim=258), "heads of 258 numbers cannot be served"),
        (
            replace(small_config(), recursion=RecursionConfig(3, relaxation=Relaxation(2))),
            "`mor convert --to llama` merges deltas",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, residual_scale=1.0)),
            "residual_scale=1.0 cannot be served",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, own_per_step=("mlp",))),
            "unrolls a model where nothing routes",
        ),
        (
            replace(
                small_config(), recursion=RecursionConfig(3, hyper_connections=HyperConnections(2))
            ),
            "its layers hand on a single stream",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, history=HistoryInjection(1))),
            "its layers hand on no earlier states",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, norm_modulation=NormModulation())),
            "its norms do not know the step",
        ),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(tmp_path, runner, config, message):
    save_model(MoRTransformer(config), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "model", runner)


def test_heads_and_experts_must_divide_by_the_ranks():
    with pytest.raises(ValueError, match="must divide num_heads=2, num_kv_heads=1"):
        vllm_plugin.require_servable(small_config(), tensor_parallel=2)
    narrow = replace(small_config(), num_kv_heads=2, moe=MoEConfig(2, 1, ffn_hidden_size=3))
    with pytest.raises(ValueError, match=r"moe\.ffn_hidden_size=3"):
        vllm_plugin.require_servable(narrow, tensor_parallel=2)


def test_experts_are_not_compiled(tmp_path, runner):
    save_model(small_model(replace(plain_config(2), moe=MoEConfig(2, 1))), tmp_path / "model")
    loaded(tmp_path / "model", runner)
    config = vllm_config(AutoConfig.from_pretrained(tmp_path / "model"), enforce_eager=False)
    runner.layers.clear()
    with pytest.raises(ValueError, match="Serve this model with --enforce-eager"):
        importlib.import_module("mor_vllm.model").MoRForCausalLM(vllm_config=config)


@pytest.mark.parametrize(
    ("router", "policy", "size"),
    [
        (FixedDepth(), "recursion_wise", 64),
        (ExpertChoice(), "recursion_wise", 80),
        (ExpertChoice(), SHARING, 64),
        (SKIPS_STEP_1, SHARING, 80),
        (SKIPS_STEP_1, "exit_state", 64),
    ],
)
def test_heads_grow_only_where_rows_must_be_hidden(router, policy, size):
    config = replace(small_config(router, kv_policy=policy), head_dim=64)
    hides = vllm_plugin.hides_rows(config)
    assert vllm_plugin.cached_head_size(config.head_size + hides) == size


def test_a_router_that_was_calibrated_to_skip_step_1_is_refused(tmp_path, runner):
    model = small_model(small_config(ExpertChoice(), kv_policy=SHARING))
    router = model.recursions[0].router
    router.tune((1.0, 0.5, 0.2), lambda step: torch.randn(50, 1))
    save_model(model, tmp_path / "all")
    loaded(tmp_path / "all", runner)
    router.tune((0.9, 0.5, 0.2), lambda step: torch.randn(50, 1))
    save_model(model, tmp_path / "some")
    runner.layers.clear()
    with pytest.raises(ValueError, match=r"calibrated to bar=.*step 1 leaves tokens out"):
        loaded(tmp_path / "some", runner)


def test_a_tensor_too_few_or_too_many_is_an_error(tmp_path, runner):
    save_model(small_model(small_config()), tmp_path / "model")
    model = loaded(tmp_path / "model", runner)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the model has no tensor 'model\.other'"):
        model.load_weights([*weights.items(), ("model.other", torch.zeros(1))])
    del weights["model.prelude.layers.0.mlp.up.weight"]
    with pytest.raises(ValueError, match=r"lacks model.prelude.layers.0.mlp.up.weight"):
        model.load_weights(weights.items())
