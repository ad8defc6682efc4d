"""Texts that grow, are cut, copied and reordered, against one pass over the whole text."""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from mor_layers import DepthAndWidth, MoEConfig, MoRTransformer
from mor_layers.generation import IncrementalDecoder
from tests.mor_layers.generation.test_engine import ALL_ROUTERS, POLICIES, model_for
from tests.mor_layers.small_models import plain_config, random_ids, small_config, small_model


def check(model: MoRTransformer) -> None:
    """Chunks, a draft that is rejected, single tokens, and reordered copies."""
    ids, order = random_ids(3, 41), torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        expected = model.eval()(ids, causal_routing=True).logits
    decoder = IncrementalDecoder(model, 3)
    states = [decoder.extend(ids[:, a:b]) for a, b in ((0, 20), (20, 21), (21, 25))]
    decoder.extend(random_ids(3, 7, seed=5))
    decoder.cut(25)
    other = deepcopy(decoder)
    states += [decoder.extend(ids[:, i : i + 1]) for i in range(25, 41)]
    other.select(order)
    copied = [other.extend(ids[order, a:b]) for a, b in ((25, 30), (30, 41))]
    for got, wanted in ((states, expected), (copied, expected[order, 25:])):
        torch.testing.assert_close(
            model.output(torch.cat(got, dim=1)), wanted, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("router", ["expert_choice_first_step_too", "token_choice"])
def test_continuing_equals_one_pass(router, policy) -> None:
    check(model_for(router, policy, "middle_cycle"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("router", "policy", "sharing"),
    list(itertools.product(ALL_ROUTERS, POLICIES, ("cycle", "middle_cycle"))),
)
def test_continuing_equals_one_pass_everywhere(router, policy, sharing) -> None:
    check(model_for(router, policy, sharing, block_size=2))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(plain_config(3), id="plain"),
        pytest.param(small_config(ALL_ROUTERS["expert_choice"], ends=(2, 3)), id="ends"),
        pytest.param(small_config(sharing="middle_sequence", share_norms=False), id="sequence"),
        pytest.param(small_config(ALL_ROUTERS["token_choice"], share_norms=False), id="norms"),
        pytest.param(replace(small_config(DepthAndWidth()), moe=MoEConfig(4, 2)), id="experts"),
    ],
)
def test_other_kinds_of_models(config) -> None:
    check(small_model(config))


def test_padding_anywhere_is_as_if_it_were_not_there() -> None:
    model = model_for("random_depth", "exit_state", "cycle").eval()
    ids = random_ids(1, 9)
    holes = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    spread = torch.zeros(2, 7, dtype=torch.long)
    spread[0, holes[0]], spread[1, 0] = ids[0, :4], ids[0, 0]
    decoder = IncrementalDecoder(model, 2)
    first = decoder.extend(spread, holes)
    assert not first[~holes].any()
    rest = decoder.extend(ids[:, 4:].expand(2, -1), torch.tensor([[True] * 5, [False] * 5]))
    plain = IncrementalDecoder(model, 1).extend(ids)[0]
    torch.testing.assert_close(torch.cat([first[0, holes[0]], rest[0]]), plain)
    torch.testing.assert_close(first[1, 0], plain[0])


def test_memory_holds_what_the_policy_keeps() -> None:
    kept = {}
    for policy in POLICIES[:2]:
        decoder = IncrementalDecoder(model_for("fixed_depth", policy, "cycle"), 2)
        decoder.extend(random_ids(2, 64))
        kept[policy] = decoder.caches.num_bytes_in_use
    assert kept["recursion_wise"] == 3 * kept["recursive_sharing"]


def test_what_does_not_fit_is_refused() -> None:
    decoder = IncrementalDecoder(model_for("fixed_depth", "recursion_wise"), 2)
    with pytest.raises(ValueError, match="b=2, the texts held"):
        decoder.extend(random_ids(3, 4))
    with pytest.raises(ValueError, match="cannot keep 5 columns of 0"):
        decoder.cut(5)


def test_an_observer_sees_what_is_routed_while_texts_grow() -> None:
    model = model_for("token_choice", "exit_state", "middle_cycle")
    decoder, seen = IncrementalDecoder(model, 2), []
    with model.recursions[0].observed(seen.append):
        decoder.extend(random_ids(2, 20))
        decoder.extend(random_ids(2, 1, seed=1))
    assert all(routed.causal and not routed.decision.losses for routed in seen)
    for step in range(3):
        ran = sum(int(routed.decision.tokens.count) for routed in seen if routed.step == step)
        assert ran == (decoder.depths > step).sum()
