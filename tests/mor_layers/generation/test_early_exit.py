"""Criteria for early exit against loops over one token's states."""

import pytest
import torch

from mor_layers import ExpertChoice
from mor_layers.generation import Request, with_early_exit
from mor_layers.routers import Acceleration, Confidence, Criterion, Divergence, ExitProbability
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import HIDDEN_SIZE, random_ids, small_config, small_model

GATE = torch.linspace(-1, 1, HIDDEN_SIZE)
CRITERIA: dict[str, tuple[Criterion, Criterion, Criterion]] = {  # never, some, at once
    "confidence": (Confidence(1.0), Confidence(0.25), Confidence(1e-6)),
    "divergence": (Divergence(1e-9), Divergence(0.4), Divergence(1e9)),
    "acceleration": (Acceleration(1e-9), Acceleration(1.0), Acceleration(1e9)),
    "exit_probability": (
        ExitProbability(1 - 1e-7, GATE * 0.1),
        ExitProbability(0.7, GATE),
        ExitProbability(1e-7, GATE),
    ),
}


def expected_depth(criterion: Criterion, states: list[torch.Tensor], read_out) -> int:
    """Steps of a token whose states after 0, 1, 2, ... steps are given."""
    last = len(states) - 1
    for step in range(1, last):
        probabilities = [read_out(state).softmax(-1) for state in states[: step + 1]]
        if isinstance(criterion, Confidence):
            stop = probabilities[-1].max() >= criterion.threshold
        elif isinstance(criterion, Divergence):
            now, before = probabilities[-1], probabilities[-2]
            stop = (now * (now / before).log()).sum() < criterion.threshold
        elif isinstance(criterion, Acceleration):
            if step < 2:
                continue
            move, earlier = states[step] - states[step - 1], states[step - 1] - states[step - 2]
            stop = (move - earlier).norm() / move.norm() < criterion.threshold
        else:
            assert isinstance(criterion, ExitProbability)
            left = 1.0
            for state in states[1 : step + 1]:
                left *= 1 - torch.sigmoid(state @ criterion.gate)
            stop = 1 - left > criterion.threshold
        if stop:
            return step
    return last


@pytest.mark.parametrize("name", CRITERIA)
def test_a_first_token_exits_where_the_criterion_says(name: str) -> None:
    """The first token attends to itself alone, so its states can be computed alone."""
    steps = 5
    depths = set()
    for criterion in CRITERIA[name]:
        for seed in range(8):
            model = small_model(small_config(num_recursions=steps), seed)
            ids = random_ids(1, 1, seed)
            states = []
            run = model.recursions[0].layers.forward
            model.recursions[0].layers.forward = lambda x, c, run=run, s=states: (
                s.append(x[0, 0]) or run(x, c)
            )
            with torch.no_grad():
                plain = model(ids)
                states.append(plain.recursions[0].hidden[0, 0])
                expected = expected_depth(criterion, states, lambda x, m=model: m.output(m.norm(x)))
                with_early_exit(model, criterion)
                assert model(ids, causal_routing=True).depths.item() == expected
            depths.add(expected)
    assert len(depths) > 2


@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing", "exit_state"])
@pytest.mark.parametrize("name", CRITERIA)
def test_generation_equals_the_full_forward_pass(name: str, policy: str) -> None:
    seen = set()
    for criterion in CRITERIA[name]:
        model = small_model(small_config(num_recursions=4, kv_policy=policy))
        with_early_exit(model, criterion)
        requests = [Request(prompt(length, length), 5) for length in (7, 1, 3)]
        for request, served in zip(requests, serve(model, requests, chunk_size=4), strict=True):
            assert_exact(model, request, served)
            seen |= set(served.depths)
    assert {4, 2 if name == "acceleration" else 1} <= seen


def test_what_cannot_exit_early_is_an_error() -> None:
    with pytest.raises(ValueError, match="ExpertChoiceRouter already decides the depth"):
        with_early_exit(small_model(small_config(ExpertChoice())), Confidence(0.5))
    sequence = small_config(sharing="sequence", block_size=2)
    with pytest.raises(ValueError, match="'cycle' or 'middle_cycle'"):
        with_early_exit(small_model(sequence), Confidence(0.5))
    for make in (
        lambda: Confidence(0.0),
        lambda: Divergence(-1.0),
        lambda: Acceleration(0.0),
        lambda: ExitProbability(1.0, GATE),
    ):
        with pytest.raises(ValueError, match=r"threshold=.* must"):
            make()
