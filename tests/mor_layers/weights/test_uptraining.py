"""A recursive model begins with the layers of a dense one that each initialization names."""

from dataclasses import replace

import pytest
import torch

from mor_layers import ExpertChoice, FixedDepth, MoRTransformer, RecursionConfig, TokenChoice
from mor_layers.recursion import SHARING_SCHEMES
from mor_layers.weights import INITIALIZATIONS, recursive_weights
from tests.mor_layers.small_models import plain_config, random_ids, small_model

# Dense layers, from 0 on, that each layer of a block of two comes from: 6 shared layers, 3 steps.
BLOCKS = {
    ("stepwise", True): [[0], [5]],
    ("stepwise", False): [[0], [5]],
    ("average", True): [[0, 2, 4], [1, 3, 5]],
    ("average", False): [[0, 1, 2], [3, 4, 5]],
    ("lower", True): [[0], [1]],
    ("lower", False): [[0], [1]],
    ("upper", True): [[4], [5]],
    ("upper", False): [[4], [5]],
}


def dense_model(sharing: str, block_size: int = 2) -> MoRTransformer:
    ends = 2 if sharing.startswith("middle") else 0
    return small_model(plain_config(3 * block_size + ends))


def uptrained(dense: MoRTransformer, recursion: RecursionConfig, init: str) -> MoRTransformer:
    config, weights = recursive_weights(dense.state_dict(), dense.config, recursion, init)
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    return model


@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
@pytest.mark.parametrize("initialization", INITIALIZATIONS[:-1])
def test_each_shared_layer_comes_from_the_layers_of_its_initialization(sharing, initialization):
    dense = dense_model(sharing)
    model = uptrained(dense, RecursionConfig(3, sharing), initialization)
    ours, theirs = model.state_dict(), dense.state_dict()
    is_middle, is_cyclic = sharing.startswith("middle"), sharing.endswith("cycle")
    for place, sources in enumerate(BLOCKS[initialization, is_cyclic]):
        layer = f"0.layers.layers.{place}" if is_cyclic else f"{place}.layers.layers.0"
        for part in ("attention.query.weight", "mlp.down.weight", "mlp_norm.weights.0"):
            parts = [
                theirs[f"recursions.0.layers.layers.{is_middle + source}.{part}"]
                for source in sources
            ]
            mean = torch.stack(parts).mean(dim=0)
            torch.testing.assert_close(ours[f"recursions.{layer}.{part}"], mean)
    for name in ("embedding.weight", "norm.weights.0", "output.weight"):
        assert torch.equal(ours[name], theirs[name])
    if is_middle:
        for end, source in (("prelude", 0), ("coda", 7)):
            ours_end = ours[f"{end}.layers.0.mlp.up.weight"]
            assert torch.equal(
                ours_end, theirs[f"recursions.0.layers.layers.{source}.mlp.up.weight"]
            )


@pytest.mark.parametrize(
    ("block_size", "steps", "sources"),
    [
        (4, 2, [0, 2, 5, 7]),  # distances of 7/3: 0, 2.33, 4.67, 7
        (3, 2, [0, 2, 5]),  # of 5/2, and a half goes to the even neighbour
        (3, 3, [0, 4, 8]),
        (5, 2, [0, 2, 4, 7, 9]),  # of 9/4: 0, 2.25, 4.5, 6.75, 9
    ],
)
@pytest.mark.parametrize("sharing", ["cycle", "middle_sequence"])
def test_stepwise_layers_lie_at_even_distances_that_need_not_be_whole(
    sharing, block_size, steps, sources
):
    ends = 2 if sharing.startswith("middle") else 0
    dense = small_model(plain_config(block_size * steps + ends))
    ours = uptrained(dense, RecursionConfig(steps, sharing), "stepwise").state_dict()
    theirs = dense.state_dict()
    part = "attention.query.weight"
    for place, source in enumerate(sources):
        layer = f"0.layers.layers.{place}" if sharing == "cycle" else f"{place}.layers.layers.0"
        original = theirs[f"recursions.0.layers.layers.{ends // 2 + source}.{part}"]
        assert torch.equal(ours[f"recursions.{layer}.{part}"], original), place


@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
@pytest.mark.parametrize("initialization", INITIALIZATIONS[:-1])
def test_a_dense_model_whose_layers_repeat_is_reproduced(sharing, initialization):
    """Where layers that will be shared are equal already, nothing is lost (one layer a block)."""
    recursion = RecursionConfig(3, sharing)
    dense = dense_model(sharing, block_size=1)
    layers = dense.recursions[0].layers.layers
    first = int(sharing.startswith("middle"))
    for layer in layers[first + 1 : first + 3]:
        layer.load_state_dict(layers[first].state_dict())
    ids = random_ids(2, 7)
    logits = uptrained(dense, recursion, initialization)(ids).logits
    torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
@pytest.mark.parametrize("initialization", INITIALIZATIONS[:-1])
def test_shared_layers_lie_between_a_prelude_and_a_coda_of_any_length(sharing, initialization):
    dense = small_model(plain_config(2 + 6 + 3))
    recursion = RecursionConfig(3, sharing, prelude_layers=2, coda_layers=3)
    ours = uptrained(dense, recursion, initialization).state_dict()
    theirs, part = dense.state_dict(), "attention.query.weight"

    def original(depth: int) -> torch.Tensor:
        return theirs[f"recursions.0.layers.layers.{depth}.{part}"]

    for layer in range(2):
        assert torch.equal(ours[f"prelude.layers.{layer}.{part}"], original(layer))
    for layer in range(3):
        assert torch.equal(ours[f"coda.layers.{layer}.{part}"], original(8 + layer))
    is_cyclic = sharing.endswith("cycle")
    for place, sources in enumerate(BLOCKS[initialization, is_cyclic]):
        layer = f"0.layers.layers.{place}" if is_cyclic else f"{place}.layers.layers.0"
        mean = torch.stack([original(2 + source) for source in sources]).mean(dim=0)
        torch.testing.assert_close(ours[f"recursions.{layer}.{part}"], mean)


def test_one_recursion_is_the_dense_model():
    dense = dense_model("middle_cycle")
    model = uptrained(dense, RecursionConfig(1), "average")
    ids = random_ids(2, 7)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
def test_norms_of_single_steps_are_those_of_their_depths(sharing):
    dense = dense_model(sharing)
    model = uptrained(dense, RecursionConfig(3, sharing, share_norms=False), "average")
    is_cyclic, first = sharing.endswith("cycle"), int(sharing.startswith("middle"))
    for place in range(2):
        for step in range(3):
            layer = f"0.layers.layers.{place}" if is_cyclic else f"{place}.layers.layers.0"
            depth = first + (2 * step + place if is_cyclic else 3 * place + step)
            norm = model.state_dict()[f"recursions.{layer}.mlp_norm.weights.{step}"]
            assert torch.equal(
                norm, dense.state_dict()[f"recursions.0.layers.layers.{depth}.mlp_norm.weights.0"]
            )


@pytest.mark.parametrize("router", [FixedDepth(), ExpertChoice(), TokenChoice()])
def test_random_layers_and_routers_follow_the_seed_alone(router):
    dense = dense_model("middle_cycle")
    arguments = (dense.state_dict(), dense.config, RecursionConfig(3, router=router), "random")
    (config, first), (_, second) = (recursive_weights(*arguments, seed=1) for _ in range(2))
    _, other = recursive_weights(*arguments, seed=2)
    assert set(first) == set(MoRTransformer(config).state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "recursions.0.layers.layers.1.mlp.up.weight"
    assert not torch.equal(first[name], other[name])
    assert 0.01 < first[name].std() < 0.03
    assert torch.equal(first["coda.layers.0.mlp.up.weight"], other["coda.layers.0.mlp.up.weight"])


def test_tied_weights_come_once_and_their_dtype_stays():
    config = replace(plain_config(8), tie_embeddings=True)
    dense = small_model(config).bfloat16()
    _, weights = recursive_weights(dense.state_dict(), config, RecursionConfig(3), "average")
    assert "output.weight" not in weights
    assert {weights[name].dtype for name in weights} == {torch.bfloat16}


def test_what_cannot_be_shared_is_refused():
    dense = dense_model("cycle")
    with pytest.raises(ValueError, match="cannot split 4 shared layers"):
        recursive_weights(dense.state_dict(), dense.config, RecursionConfig(3), "lower")
    with pytest.raises(ValueError, match="'middle' is unknown"):
        recursive_weights({}, dense.config, RecursionConfig(3, "cycle"), "middle")
    config = replace(dense.config, num_unrolled_layers=9, recursion=RecursionConfig(3, "cycle"))
    with pytest.raises(ValueError, match="has a recursion"):
        recursive_weights({}, config, RecursionConfig(3, "cycle"), "lower")
