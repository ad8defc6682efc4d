"""The compiled block: exact, one graph, and compiled once."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mor_layers import DecoderConfig, MoEConfig, MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.generation.static_block import FINEST, padded_size
from mor_layers.layers import Relaxation
from mor_layers.models import LatentAttentionConfig
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
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


BASE = small_config(ROUTERS["token_choice"], 3, block_size=2)
assert BASE.recursion is not None
EXPERTS = MoEConfig(4, 2, scores="sigmoid", num_groups=2, shared_ffn_hidden_size=6)
OWN = replace(BASE.recursion, own_per_step=("attention",))
RELAXED = replace(BASE.recursion, relaxation=Relaxation(2))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(replace(BASE, moe=EXPERTS, recursion=OWN), id="experts, own attention"),
        pytest.param(
            small_config(ROUTERS["expert_choice"], kv_policy="exit_state"), id="exit state"
        ),
        pytest.param(
            small_config(ROUTERS["expert_choice_first_step_too"], 3, kv_policy="exit_state"),
            id="exit state of tokens that run no step",
            marks=pytest.mark.full,
        ),
        pytest.param(replace(BASE, recursion=RELAXED), id="deltas", marks=pytest.mark.full),
    ],
)
def test_what_depends_on_steps_and_choices_is_one_graph_too(config: DecoderConfig) -> None:
    torch.compiler.reset()
    compiled = CompileCounterWithBackend("eager")
    model = small_model(config)
    check(Recorder(model, num_slots=12, chunk_size=4, compiler=compiled), model)
    assert compiled.frame_count == 1


def test_an_8_bit_cache_is_rounded_once() -> None:
    torch.compiler.reset()
    model = small_model(small_config(ROUTERS["token_choice"], 3, kv_policy="recursive_sharing"))
    requests = [Request(prompt(1 + i % 3, i), 2 + i % 5) for i in range(8)]
    options = {"num_slots": 8, "is_int8": True}
    plain, compiled = (serve(model, requests, compiler=c, **options) for c in (None, "eager"))
    for wanted, got in zip(plain, compiled, strict=True):
        assert (got.tokens, got.depths) == (wanted.tokens, wanted.depths)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits))


def test_layers_that_are_not_routed_are_refused() -> None:
    model = small_model(small_config(sharing="sequence", block_size=2))
    with pytest.raises(ValueError, match="this model has none"):
        DepthBatchingEngine(model, CacheSettings(1 << 20), compiler="eager")


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
