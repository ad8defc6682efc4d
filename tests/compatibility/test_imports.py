"""Imports that the pages of version 0.1 showed still work, and say where the name lives now."""

import importlib
import warnings

import pytest

import mor_layers
from mor_layers import moved

DOCUMENTED = [
    "mor_huggingface.llama.open_llama",
    "mor_layers.accounting.account",
    "mor_layers.accounting.flop_ratio",
    "mor_layers.attention.StepContext",
    "mor_layers.caches.CacheSettings",
    "mor_layers.config.DecoderConfig",
    "mor_layers.config.from_mapping",
    "mor_layers.depth_batching.Event",
    "mor_layers.early_exit.with_early_exit",
    "mor_layers.healing.Batch",
    "mor_layers.lockstep.LockstepEngine",
    "mor_layers.model_folder.load_model",
    "mor_layers.moe.MoE",
    "mor_layers.recursion.RecursionBlock",
    "mor_layers.relaxation.Relaxation",
    "mor_layers.routers.base.Router",
    "mor_layers.routers.expert_choice.ExpertChoice",
    "mor_layers.routing.RoutingDecision",
    "mor_layers.routing.Tokens",
    "mor_layers.thresholds.turn_dial",
    "mor_layers.transformer.MoRTransformer",
    "mor_layers.unrolling.unrolled_weights",
    "mor_layers.uptraining.recursive_weights",
    "mor_megatron.apex.installed_apex",
    "mor_megatron.checkpointing.load",
    "mor_megatron.cpu.enable",
    "mor_megatron.generation.tensor_parallel_decoder",
    "mor_megatron.hybrid.recursion_hybrid_spec",
    "mor_megatron.hybrid_pattern.HybridPattern",
    "mor_megatron.layer.RecursionLayer",
    "mor_megatron.megatron_lm.recursion_spec",
    "mor_megatron.packing.packed",
    "mor_megatron.pipeline.connect_stages",
    "mor_megatron.specs.recursion_block_spec",
    "mor_megatron.training.update_routers",
]


@pytest.mark.parametrize("path", DOCUMENTED)
def test_a_documented_import_still_works(path):
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("name", moved.NAMES)
def test_a_name_of_the_old_face_is_found_and_says_where_it_is(name):
    with pytest.warns(DeprecationWarning, match=rf"mor_layers\.{name} is mor_layers\.\w+\.{name}"):
        assert getattr(mor_layers, name) is not None


def test_every_old_module_leads_to_modules_that_exist():
    for old, places in moved.MODULES.items():
        assert importlib.import_module(f"mor_layers.{old}").__name__ == f"mor_layers.{old}"
        for place in places:
            importlib.import_module(f"mor_layers.{place}")


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = mor_layers.Nothing
    with pytest.raises(ImportError):
        importlib.import_module("mor_layers.nothing")


def test_the_face_is_small_and_whole():
    assert len(mor_layers.__all__) == 28
    assert all(hasattr(mor_layers, name) for name in mor_layers.__all__)


def test_every_name_of_the_megatron_face_is_found_when_it_is_used():
    mor_megatron = importlib.import_module("mor_megatron")
    assert set(mor_megatron._PLACES) == set(mor_megatron.__all__)
    assert all(getattr(mor_megatron, name) is not None for name in mor_megatron.__all__)
    assert mor_megatron.training.update_routers is mor_megatron.update_routers
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mor_megatron.nothing
