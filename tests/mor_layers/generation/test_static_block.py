"""The compiled block: exact, one graph, and compiled once."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mor_layers import MoEConfig, MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.generation.static_block import FINEST, padded_size
from mor_layers.layers import Relaxation
from mor_layers.models import LatentAttentionConfig
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt
from tests.mor_layers.small_models import ROUTERS, small_config, small_model


@pytest.mark.parametrize(
    "policy",
    [
        "recursive_sharing",
        pytest.param("recursion_wise", marks=pytest.mark.full),
        pytest.param("sharing_with_update", marks=pytest.mark.full),
    ],
)
def test_one_graph_serves_whatever_is_in_flight(policy: KVPolicy) -> None:
    torch.compiler.reset()
    model = small_model(small_config(ROUTERS["expert_choice"], 3, kv_policy=policy, block_size=2))
    compiled = CompileCounterWithBackend("eager")  # a break would raise an error: fullgraph=True
    recorder = Recorder(model, num_slots=20, chunk_size=4, compiler=compiled)
    requests = [Request(prompt(1 + i % 5, i), 2 + i % 7) for i in range(24)]
    for request in requests[:1]:
        recorder.submit(request)
    recorder.finish()
    assert compiled.frame_count == 1
    for request in requests[1:]:
        recorder.submit(request)
        recorder.step()
    for request, served in zip(requests, recorder.finish(), strict=True):
        assert_exact(model, request, served)
    assert compiled.frame_count == 1, "something in flight changed the graph"


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing"])
def test_compilers_compute_the_same(policy: KVPolicy, backend: str) -> None:
    torch.compiler.reset()
    model = small_model(small_config(ROUTERS["token_choice"], 3, kv_policy=policy, block_size=2))
    recorder = Recorder(model, num_slots=12, chunk_size=4, compiler=backend)
    check(recorder, model)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing"])
def test_latent_rows(policy: KVPolicy) -> None:
    torch.compiler.reset()
    config = small_config(ROUTERS["token_choice"], 3, kv_policy=policy, block_size=2)
    latent = LatentAttentionConfig(8, 4, 2, 6)
    model = small_model(replace(config, latent_attention=latent, num_kv_heads=None))
    check(Recorder(model, num_slots=12, chunk_size=4, compiler="eager"), model)


def check(recorder: Recorder, model: MoRTransformer) -> None:
    """Requests that come and go are served exactly."""
    requests = [Request(prompt(1 + i % 5, i), 2 + i % 7) for i in range(12)]
    for request in requests:
        recorder.submit(request)
        recorder.step()
    for request, served in zip(requests, recorder.finish(), strict=True):
        assert_exact(model, request, served)


RELAXED = small_config()
assert RELAXED.recursion is not None


@pytest.mark.parametrize(
    ("config", "cache", "reason"),
    [
        (small_config(sharing="sequence", block_size=2), {}, "this model has none"),
        (small_config(kv_policy="exit_state"), {}, "as many exited tokens as there are"),
        (small_config(), {"is_int8": True}, "8-bit cache"),
        (replace(small_config(), moe=MoEConfig(4, 2)), {}, "experts get as many tokens"),
        (
            replace(RELAXED, recursion=replace(RELAXED.recursion, relaxation=Relaxation(2))),
            {},
            "projections of single steps",
        ),
    ],
)
def test_blocks_whose_shapes_depend_on_steps_are_refused(config, cache: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DepthBatchingEngine(small_model(config), CacheSettings(1 << 20, **cache), compiler="eager")


def test_hooks_are_refused() -> None:
    model = small_model(small_config())
    layer = model.recursions[0].layers.layers[0]  # type: ignore[union-attr]
    layer.mlp.down.register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(ValueError, match="have hooks"):
        DepthBatchingEngine(model, CacheSettings(1 << 20), compiler="eager")


def test_sizes_are_few_and_close() -> None:
    sizes = [padded_size(count) for count in range(1, 1025)]
    for count, size in enumerate(sizes, start=1):
        assert count <= size < count + max(FINEST, count / 8)
    assert len(set(sizes)) < 50
