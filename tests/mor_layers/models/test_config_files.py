"""Settings in files and mappings: what they may say, and how a wrong one is answered."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RandomDepth,
    RecursionConfig,
    TokenChoice,
    from_mapping,
    load_config,
    to_mapping,
)
from tests.mor_layers.models.test_config import DECODER, decoder, recursion

A_ROUTER = "fixed_depth, "

# name: (a recursion's YAML, what the message says was given, what it says is allowed)
BY_YAML: dict[str, tuple[str, str, str]] = {
    "an unknown setting": (
        "{num_recursions: 2, depth: 3}",
        "'depth'",
        "loop_loss, loop_norm, norm_modulation, num_recursions, own_per_step",
    ),
    "a setting that is a number": ("{num_recursions: 2, 3: 4, x: 1}", "3, 'x'", "num_recursions"),
    "a missing setting": ("{sharing: cycle}", "RecursionConfig", "'num_recursions'"),
    "a list": ("[1, 2]", "[1, 2]", "a mapping"),
    "text for a number": ("{num_recursions: three}", "num_recursions='three'", "int"),
    "a fraction for a count": ("{num_recursions: 2.5}", "num_recursions=2.5", "int"),
    "a truth for a count": ("{num_recursions: true}", "num_recursions=True", "int"),
    "nothing for a count": ("{num_recursions: null}", "num_recursions=None", "int"),
    "a number for a truth": ("{num_recursions: 2, share_norms: 1}", "share_norms=1", "bool"),
    "an unknown scheme": (
        "{num_recursions: 2, sharing: middle}",
        "sharing='middle'",
        "cycle, sequence, middle_cycle, middle_sequence",
    ),
    "an unknown policy": (
        "{num_recursions: 2, kv_policy: none}",
        "kv_policy='none'",
        "recursion_wise, recursive_sharing, sharing_with_update",
    ),
    "a router without type": (
        "{num_recursions: 2, router: {alpha: 1.0}}",
        "{'alpha': 1.0}",
        A_ROUTER,
    ),
    "a router that is a name": (
        "{num_recursions: 2, router: expert_choice}",
        "'expert_choice'",
        "a mapping with `type`",
    ),
    "a type that is no name": (
        "{num_recursions: 2, router: {type: 3}}",
        "{'type': 3}",
        A_ROUTER,
    ),
    "a router nobody registered": (
        "{num_recursions: 2, router: {type: expert_choise}}",
        "router.type='expert_choise'",
        A_ROUTER,
    ),
    "a router's module that is not there": (
        "{num_recursions: 2, router: {type: 'not_there:Router'}}",
        "router.type='not_there:Router'",
        "package.module:ClassName",
    ),
    "a router's class that is not there": (
        "{num_recursions: 2, router: {type: 'mor_layers:NotThere'}}",
        "router.type='mor_layers:NotThere'",
        "package.module:ClassName",
    ),
    "a router without module": (
        "{num_recursions: 2, router: {type: ':Router'}}",
        "router.type=':Router'",
        "package.module:ClassName",
    ),
    "a class that is no router": (
        "{num_recursions: 2, router: {type: 'mor_layers:DecoderConfig'}}",
        "router.type='mor_layers:DecoderConfig'",
        "subclass of RouterConfig",
    ),
    "a router that builds nothing": (
        "{num_recursions: 2, router: {type: 'mor_layers:RouterConfig'}}",
        "router.type='mor_layers:RouterConfig'",
        "subclass of RouterConfig that has `build`",
    ),
    "another router's setting": (
        "{num_recursions: 2, router: {type: expert_choice, balancing: loss}}",
        "router: unknown setting 'balancing'",
        "activation, alpha",
    ),
    "a setting of a router that has none": (
        "{num_recursions: 2, router: {type: fixed_depth, alpha: 1.0}}",
        "router: unknown setting 'alpha'",
        "none",
    ),
    "text for a router's number": (
        "{num_recursions: 2, router: {type: expert_choice, alpha: big}}",
        "router.alpha='big'",
        "float",
    ),
    "a number for a list": (
        "{num_recursions: 2, router: {type: expert_choice, capacity_factors: 0.5}}",
        "router.capacity_factors=0.5",
        "a list",
    ),
    "text for a list": (
        "{num_recursions: 2, router: {type: expert_choice, capacity_factors: '1.0,0.5'}}",
        "router.capacity_factors='1.0,0.5'",
        "a list",
    ),
    "text in a list": (
        "{num_recursions: 2, router: {type: expert_choice, capacity_factors: [1.0, half]}}",
        "router.capacity_factors[1]='half'",
        "float",
    ),
    "capacities of another depth": (
        "{num_recursions: 2, router: {type: random_depth, capacity_factors: [1.0]}}",
        "capacity_factors=(1.0,) has 1 entries for 2",
        "Use 2",
    ),
    "an unknown choice of a router": (
        "{num_recursions: 2, router: {type: token_choice, balancing: Loss}}",
        "router.balancing='Loss'",
        "loss, loss_free, none",
    ),
    "a router a sequence cannot have": (
        "{num_recursions: 2, sharing: sequence, router: {type: token_choice}}",
        "sharing='sequence' cannot route tokens with TokenChoice",
        "cycle or middle_cycle",
    ),
}


@pytest.mark.parametrize("name", BY_YAML)
def test_a_wrong_file_is_answered_with_what_is_allowed(name, tmp_path: Path):
    text, given, allowed = BY_YAML[name]
    path = tmp_path / "recursion.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"\.$") as error:
        load_config(RecursionConfig, path)
    assert given in str(error.value)
    assert allowed in str(error.value)


def test_a_wrong_setting_deep_in_a_file_is_named_with_its_place():
    wrong = DECODER | {
        "recursion": {"num_recursions": 3, "router": {"type": "fixed_depth", "x": 1}}
    }
    with pytest.raises(ValueError, match=r"recursion\.router: unknown setting 'x'"):
        from_mapping(DecoderConfig, wrong)
    with pytest.raises(ValueError, match=r"recursion\.num_recursions='3': expected int"):
        from_mapping(DecoderConfig, DECODER | {"recursion": {"num_recursions": "3"}})


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_config(RecursionConfig, tmp_path / "none.yaml")


def test_a_file_gives_what_the_constructors_give(tmp_path: Path):
    path = tmp_path / "model.yaml"
    path.write_text(
        """
width: 16
model:
  vocab_size: 16
  hidden_size: ${width}
  ffn_hidden_size: 8
  num_unrolled_layers: 8
  num_heads: 4
  num_kv_heads: null
  rope_base: 500000
  recursion:
    num_recursions: 3
    sharing: middle_cycle
    kv_policy: sharing_with_update
    share_norms: false
    router: {type: expert_choice, capacity_factors: [1, 0.5, 0.25], predictor: aux_router}
"""
    )

    @dataclasses.dataclass(frozen=True)
    class File:
        width: int
        model: DecoderConfig

    expected = decoder(
        rope_base=500000.0,
        recursion=recursion(
            kv_policy="sharing_with_update",
            share_norms=False,
            router=ExpertChoice(capacity_factors=(1.0, 0.5, 0.25), predictor="aux_router"),
        ),
    )
    assert load_config(File, path) == File(16, expected)
    assert isinstance(load_config(File, path).model.rope_base, float)


@pytest.mark.parametrize("router", [ExpertChoice(), TokenChoice(), RandomDepth(), FixedDepth()])
def test_settings_survive_the_way_through_a_mapping(router):
    config = recursion(router=router)
    name = {
        "ExpertChoice": "expert_choice", "TokenChoice": "token_choice",
        "RandomDepth": "random_depth", "FixedDepth": "fixed_depth",
    }[type(router).__name__]  # fmt: skip
    mapping = dataclasses.asdict(config)
    mapping["router"]["type"] = name
    assert from_mapping(RecursionConfig, mapping) == config


@pytest.mark.parametrize("router", [ExpertChoice(capacity_factors=(1.0, 0.5, 0.2)), TokenChoice()])
def test_settings_go_to_mappings_and_back(router, tmp_path):
    config = decoder(
        recursion=recursion(router=router, expert_routers="per_step"),
        moe=MoEConfig(4, capacity_factor=1.5),
        dense_ends=True,
    )
    path = tmp_path / "config.yaml"
    OmegaConf.save(to_mapping(config), path)
    assert load_config(DecoderConfig, path) == config
