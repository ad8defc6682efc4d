"""The model for vLLM, through an emulation of what it uses of vLLM.

vLLM itself runs in tests/mor_vllm/real, on more models (`make test-vllm`).
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from mor_huggingface import MoRConfig
from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    RouterConfig,
    TokenChoice,
    save_model,
)
from mor_layers.generation.depth import turn_dial
from mor_layers.layers import NormModulation
from mor_layers.layers.moe import Assignment, Experts
from mor_layers.models import LatentAttentionConfig
from mor_layers.recursion import HistoryInjection, HyperConnections, StateAdapter
from mor_layers.routers import AdaptiveHalting, Deepened, Router, registered_routers
from mor_vllm import plugin as vllm_plugin
from tests.mor_layers.small_models import ROUTERS, plain_config, small_config, small_model
from tests.mor_vllm.models import EXPERTS, SERVED, is_routed, recursive, served_model
from tests.mor_vllm.vllm_emulation import Runner, emulated, place, vllm_config

LATENT = LatentAttentionConfig(8, 4, 2, 6)
SHARING = "recursive_sharing"
SKIPS_STEP_1 = ROUTERS["expert_choice_first_step_too"]


@pytest.fixture
def runner():
    with emulated() as runner:
        yield runner


def loaded(folder: Path, runner: Runner, **overrides: Any) -> Any:
    """As vLLM does it: the plugin, the configuration, the model, its weights from the files."""
    vllm_plugin.register()
    config = AutoConfig.from_pretrained(folder)
    config.update(overrides)
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
    ours = served_model(name)
    save_model(ours, tmp_path / "model")
    model = loaded(tmp_path / "model", runner)
    depths = check(ours, model, runner)
    assert (len(depths) > 1) == is_routed(name)  # else no token exits, and nothing was shown


def check(ours: MoRTransformer, model: Any, runner: Runner) -> set[int]:
    """Compare the logits of requests in flight together with ours; the steps that tokens took."""
    texts = [
        torch.randint(257, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 6, 4)
    ]
    # Prompts whole and in pieces, beside single tokens of other requests.
    whole = [ours(text[None], causal_routing=True) for text in texts]
    batches = [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)], [(2, 0, 3), (0, 6, 9), (1, 4, 5)], [(1, 5, 6)]]
    for batch in batches:
        pieces = [(request, start, texts[request][start:end]) for request, start, end in batch]
        for (request, _, end), logits in zip(batch, run(model, runner, pieces), strict=True):
            expected = whole[request].logits[0, end - 1]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    return {depth for output in whole for depth in output.depths.flatten().tolist()}


@pytest.mark.parametrize("name", ["expert choice, sharing", "expert choice", "one by one"])
def test_later_steps_share_the_cache_of_the_first(tmp_path, runner, name):
    config = SERVED[name]
    save_model(served_model(name), tmp_path / "model")
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


SETTINGS = (DecoderConfig, RecursionConfig, MoEConfig, Relaxation, HyperConnections)
REFUSED = {
    MoEConfig: {
        "capacity_factor",
        "drop_policy",
        "scores",
        "normalizes_gates",
        "gate_scale",
        "num_groups",
        "groups_per_token",
        "shared_ffn_hidden_size",
    },
    DecoderConfig: {
        "latent_attention",
        "embedding_scale",
        "sum_norms",
    },
    RecursionConfig: {"history", "norm_modulation", "anchor_every", "adapter", "exit_norm"},
}
"""Settings that are refused by name, see below. `drop_policy` needs a `capacity_factor`,
`groups_per_token` needs `num_groups`, and `anchor_every` layers that route by themselves."""
REFUSED_ROUTERS = {AdaptiveHalting}
IN_TRAINING = {
    MoEConfig: {"balance_coefficient", "z_loss_coefficient"},
    RecursionConfig: {"depth_balance"},
}
"""Settings that nothing but losses depends on."""


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting_is_served_or_refused(kind):
    """A setting that no served model has would be ignored in silence if `mor_vllm` did not know it."""
    used = [
        part for config in SERVED.values() for part in settings_in(config) if type(part) is kind
    ]
    served = {
        setting.name
        for setting in fields(kind)
        if any(getattr(part, setting.name) != default_of(setting) for part in used)
    }
    apart = REFUSED.get(kind, set()) | IN_TRAINING.get(kind, set())
    assert served | apart == {setting.name for setting in fields(kind)}
    assert not served & apart


def test_every_router_is_served():
    routers = [config.effective_recursion.router for config in SERVED.values()]
    routers += [router.router for router in routers if isinstance(router, Deepened)]
    ours = {kind for kind in registered_routers().values() if kind.__module__.startswith("mor_")}
    assert {type(router) for router in routers} == ours - REFUSED_ROUTERS


def settings_in(part: Any) -> Iterator[Any]:
    """A dataclass of settings, and those in its fields."""
    yield part
    for setting in fields(part):
        value = getattr(part, setting.name)
        if is_dataclass(value):
            yield from settings_in(value)


def default_of(setting: Field) -> Any:
    """A default that a model could have been given in silence; None if it has to be given."""
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(plain_config(4), moe=MoEConfig(2, 1, capacity_factor=1.0)),
            "moe.capacity_factor=1.0 cannot be served",
        ),
        (
            replace(plain_config(4), moe=MoEConfig(4, scores="sigmoid", shared_ffn_hidden_size=8)),
            "moe.scores='sigmoid', moe.shared_ffn_hidden_size=8 cannot be served",
        ),
        (replace(small_config(), embedding_scale=2.0), "embedding_scale=2.0 cannot be served"),
        (replace(small_config(), sum_norms=True), "sum_norms=True cannot be served"),
        (
            replace(plain_config(5), recursion=RecursionConfig(3, adapter=StateAdapter())),
            r"adapter=StateAdapter\(.*\), exit_norm=False cannot be served",
        ),
        (replace(small_config(), head_dim=258), "heads of 258 numbers cannot be served"),
        (small_config(AdaptiveHalting()), "its layers hand on a single state"),
        (
            small_config(ExpertChoice(capacity_factors=(0.5,)), 1, "middle_sequence"),
            "its layers do not route by themselves",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, history=HistoryInjection(1))),
            "its layers hand on no earlier states",
        ),
        (
            replace(small_config(), recursion=RecursionConfig(3, norm_modulation=NormModulation())),
            "its norms do not know the step",
        ),
        (
            replace(
                small_config(),
                num_unrolled_layers=4,
                recursion=(RecursionConfig(2, "cycle", block_layers=1),) * 2,
            ),
            "recursion has 2 entries, but mor_vllm supports models with one recursion only",
        ),
        (
            replace(small_config(), num_kv_heads=None, latent_attention=LATENT),
            "latent_attention=.* cannot be served",
        ),
        (
            replace(recursive(moe=EXPERTS), hidden_size=36),
            "hidden_size=36 cannot be served by vLLM: .* multiple of 8",
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
    narrow = recursive(moe=MoEConfig(2, 1, ffn_hidden_size=3))
    with pytest.raises(ValueError, match=r"moe\.ffn_hidden_size=3"):
        vllm_plugin.require_servable(narrow, tensor_parallel=2)


def test_expert_parallelism_divides_experts_and_not_their_widths(tmp_path, runner):
    three = replace(recursive(), moe=MoEConfig(3, 1, ffn_hidden_size=5))
    with pytest.raises(ValueError, match=r"must divide .*moe\.ffn_hidden_size=5"):
        vllm_plugin.require_servable(three, tensor_parallel=2)
    with pytest.raises(ValueError, match=r"must divide .*moe\.num_experts=3"):
        vllm_plugin.require_servable(three, tensor_parallel=2, expert_parallel=True)
    save_model(small_model(three), tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").num_experts == 3  # vLLM asks for it


@torch.no_grad()
def test_grouped_experts_are_those_of_the_core(runner):
    grouped = importlib.import_module("mor_vllm.experts")
    experts = Experts(5, 16, 8)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator)
    chosen = torch.rand(7, 5, generator=generator).topk(2).indices
    chosen[chosen == 3] = 4  # an expert without tokens
    gates = torch.rand(7, 2, generator=generator)
    is_taken = torch.rand(7, 2, generator=generator) > 0.3
    whole = experts(hidden, Assignment(chosen, gates, is_taken))
    parts = []
    for first, last in ((0, 2), (2, 5)):  # as under expert parallelism
        part = (experts.gate[first:last], experts.up[first:last], experts.down[first:last])
        is_here = is_taken & (chosen >= first) & (chosen < last)
        parts.append(grouped.grouped_experts(hidden, *part, chosen - first, gates, is_here))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)
    shaped = grouped.grouped_experts(  # what torch.compile sees
        *(t.to("meta") for t in (hidden, *part, chosen, gates, is_here))
    )
    assert shaped.shape == whole.shape


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


def test_a_tensor_too_few_or_too_many_is_an_error(tmp_path, runner):
    save_model(small_model(small_config()), tmp_path / "model")
    model = loaded(tmp_path / "model", runner)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the model has no tensor 'model\.other'"):
        model.load_weights([*weights.items(), ("model.other", torch.zeros(1))])
    del weights["model.prelude.layers.0.mlp.up.weight"]
    with pytest.raises(ValueError, match=r"lacks model.prelude.layers.0.mlp.up.weight"):
        model.load_weights(weights.items())


@dataclass(frozen=True)
class Unknown(RouterConfig):
    """A router of somebody's own, of which it is not known whether all tokens run step 1."""

    def build(self, hidden_size: int, num_recursions: int) -> Router:
        return ExpertChoice().build(hidden_size, num_recursions)


def test_rows_of_unknown_routers_can_be_hidden():
    def hides(router: RouterConfig) -> bool:
        return vllm_plugin.hides_rows(recursive(router, kv_policy=SHARING))

    assert hides(Unknown())
    assert hides(
        replace(SERVED["deepened expert choice, sharing"].recursion.router, router=Unknown())
    )
    assert not hides(TokenChoice())


@pytest.mark.parametrize("name", ["expert choice, sharing", "deepened expert choice, sharing"])
def test_a_router_that_was_calibrated_to_skip_step_1_is_refused(tmp_path, runner, name):
    model = served_model(name)
    router = model.recursions[0].router
    steps = router.num_recursions - 1
    router.tune((1.0, *[0.2] * steps), lambda step: torch.randn(50, 1))
    save_model(model, tmp_path / "all")
    loaded(tmp_path / "all", runner)
    router.tune((0.9, *[0.2] * steps), lambda step: torch.randn(50, 1))
    save_model(model, tmp_path / "some")
    runner.layers.clear()
    with pytest.raises(ValueError, match=r"calibrated to bar=.*step 1 leaves tokens out"):
        loaded(tmp_path / "some", runner)


@torch.no_grad()
def test_the_dial_shifts_thresholds_as_ours_does(tmp_path, runner):
    ours = served_model("depth and width, sharing")
    save_model(ours, tmp_path / "model")
    dial = {"depth": -0.4, "width": 0.2}
    before = set(map(repr, decisions(ours)))
    turn_dial(ours, **dial)
    assert set(map(repr, decisions(ours))) != before  # else nothing was shown
    model = loaded(tmp_path / "model", runner, dial=dial)
    check(ours, model, runner)


def decisions(model: MoRTransformer) -> list[list[int]]:
    """The steps of each token, and the tokens of each expert."""
    output = model(torch.arange(40)[None], causal_routing=True)
    (recursion,) = output.recursions
    return [output.depths[0].tolist(), recursion.expert_load.flatten().tolist()]


@pytest.mark.parametrize(
    ("name", "dial", "message"),
    [
        ("token choice, update", {"depth": 0.1}, "depth=0.1: the model has no thresholds over"),
        ("token choice, update", {"deep": 0.1}, r"dial=\{'deep': 0.1\} must be a mapping"),
        ("token choice, update", 0.1, "dial=0.1 must be a mapping"),
        ("token choice, update", {"width": "1"}, "dial=.* must be a mapping"),
    ],
)
def test_a_dial_without_effect_is_an_error(tmp_path, runner, name, dial, message):
    save_model(served_model(name), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "model", runner, dial=dial)


def test_compiled_graphs_are_kept_by_what_routers_read_on_the_host(tmp_path, runner):
    """A graph has calibrated thresholds as constants: another calibration must not find it."""
    model = served_model("expert choice")
    keys = []
    for threshold in (0.1, 0.1, 0.2):
        model.recursions[0].router.bars.fill_(threshold)
        save_model(model, tmp_path / "model")
        keys.append(loaded(tmp_path / "model", runner).vllm_config.additional_config["mor_routers"])
        runner.layers.clear()
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("version", ["0.9.2", "0.33.0rc1", "1.0"])
def test_folders_of_ours_are_refused_by_a_vllm_that_was_not_run(
    tmp_path, runner, monkeypatch, version
):
    save_model(served_model("fixed depth"), tmp_path / "model")
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    try:
        vllm_plugin.register()
        assert not runner.architectures
        with pytest.raises(
            ValueError, match=rf"vLLM {version} cannot serve .* pip install 'vllm>="
        ):
            AutoConfig.from_pretrained(tmp_path / "model")
    finally:
        AutoConfig.register(MoRConfig.model_type, MoRConfig, exist_ok=True)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+cpu", "dev"])
def test_versions_that_were_run_and_working_trees_are_used(version):
    assert vllm_plugin.refused_version(version) is None
