"""Products of a serving model, from packed and from the model's own weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mor_layers import MoEConfig, MoRTransformer
from mor_layers.generation import Request, products
from mor_layers.generation.products import PackedProducts
from mor_layers.generation.tick.graph import products as graph_products
from mor_layers.layers import Relaxation
from mor_layers.models import DecoderConfig
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
from tests.mor_layers.small_models import ROUTERS, plain_config, small_config, small_model

BASE = small_config(ROUTERS["expert_choice"], 3, "middle_cycle", block_size=2)
REQUESTS = [Request(prompt(length, length), 4) for length in (3, 8, 1)]


def recursive(kv_policy="recursion_wise", **changes) -> DecoderConfig:
    assert BASE.recursion is not None
    return replace(BASE, recursion=replace(BASE.recursion, kv_policy=kv_policy, **changes))


LAYERS = {
    "plain": plain_config(3),
    "biases": replace(BASE, qkv_bias=True),
    "norms of queries and keys": replace(BASE, qk_norm=True),
    "tied embeddings": replace(BASE, tie_embeddings=True),
    "experts": replace(BASE, moe=MoEConfig(4, 2)),
    "attention of each step": replace(recursive(own_per_step=("attention",)), qkv_bias=True),
    "MLP of each step": recursive(own_per_step=("mlp",)),
    "lora": replace(recursive(relaxation=Relaxation(2)), qkv_bias=True),
    "dora of some": recursive(relaxation=Relaxation(2, "dora", ("query", "value", "gate"))),
    "lora, shared keys": recursive("recursive_sharing", relaxation=Relaxation(2, "lora", ("up",))),
    "exit state": recursive("exit_state"),
}


@pytest.mark.parametrize("packs_weights", [True, False])
@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_products_of_every_kind_of_layer(config: DecoderConfig, packs_weights: bool) -> None:
    model = small_model(config)
    names = list(model.state_dict())
    recorder = Recorder(model, chunk_size=5, packs_weights=packs_weights)
    for request in REQUESTS:
        recorder.submit(request)
    for request, served in zip(REQUESTS, recorder.finish(), strict=True):
        assert_exact(model, request, served)
    used = recorder.engine.runner.cached.products
    assert isinstance(used, PackedProducts) == packs_weights
    assert list(model.state_dict()) == names


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compiler", [None, "eager"])
def test_projections_of_the_same_rows_are_one_product(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, widths = small_model(plain_config(2)), []

    def counted(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = multiply(hidden, weight, bias)
        widths.append(output.shape[-1])
        return output

    multiply = products.multiply
    for module in (products, graph_products):
        monkeypatch.setattr(module, "multiply", counted)
    serve(model, [Request(prompt(1), 1)], compiler=compiler)
    size, half, width = model.config.hidden_size, 6, model.config.ffn_hidden_size
    layer = [size + 2 * half, size, 2 * width, size]  # q and k and v, output, gate and up, down
    assert widths == [*layer, *layer, model.config.vocab_size]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_are_packed_once_and_again_when_they_change(
    assign: bool, compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = small_model(BASE), small_model(BASE, seed=1)
    packed, pack = [], products.Packed
    monkeypatch.setattr(products, "Packed", lambda *given: packed.append(given) or pack(*given))
    recorder, counts = Recorder(model, compiler=compiler), []
    for weights in (None, None, other.state_dict(), None):
        if weights is not None:
            model.load_state_dict(weights, assign=assign)
        recorder.submit(REQUESTS[0])
        served = recorder.finish()[-1]
        assert_exact(model, REQUESTS[0], served)
        counts.append(len(packed))
    num_layers = model.config.schedule.num_unshared + model.config.schedule.block_size
    each = 4 * num_layers + 1  # q and k and v, output, gate and up, down; logits
    assert counts == [each, each, 2 * each, 2 * each]
    assert served.tokens == serve(other, [REQUESTS[0]])[0].tokens


class Doubled(nn.Linear):
    """A projection that is more than its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced(model: MoRTransformer) -> None:
    """Give each gate's place to another class, as libraries for adapters do."""
    for block in model.recursions:
        for layer in block.layers.layers:
            gate = layer.mlp.gate
            layer.mlp.gate = Doubled(gate.in_features, gate.out_features, bias=False)
            layer.mlp.gate.weight = gate.weight


@pytest.mark.parametrize("packs_weights", [True, False])
def test_other_projections_run_as_they_are(packs_weights: bool) -> None:
    model = small_model(BASE)
    before = serve(model, REQUESTS)
    replaced(model)
    after = serve(model, REQUESTS, packs_weights=packs_weights)
    for request, served in zip(REQUESTS, after, strict=True):
        assert_exact(model, request, served)
    assert not torch.equal(before[0].logits[0], after[0].logits[0])


@pytest.mark.parametrize("packs_weights", [True, False])
def test_hooks_of_projections_run(packs_weights: bool) -> None:
    model = small_model(BASE)
    for block in model.recursions:
        for layer in block.layers.layers:
            layer.mlp.down.register_forward_hook(lambda module, arguments, output: 2 * output)
    for request, served in zip(
        REQUESTS, serve(model, REQUESTS, packs_weights=packs_weights), strict=True
    ):
        assert_exact(model, request, served)
