"""What routers declare of themselves is what they do."""

from dataclasses import dataclass

import pytest
import torch

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    RandomDepth,
    RandomLoops,
    RecursionConfig,
    Router,
    RouterConfig,
    RoutingDecision,
    TokenChoice,
    Tokens,
)
from mor_layers.costs import RouterShape
from mor_layers.routers import (
    AdaptiveHalting,
    DampedLoops,
    Deepened,
    ExitGate,
    ScorerMatrix,
    registered_routers,
)
from mor_layers.routers.declarations import measured_scorers, observed_notes
from tests.mor_layers.small_models import HIDDEN_SIZE, random_states, randomized

STEPS, LENGTH = 3, 23
ROUTERS: dict[str, RouterConfig] = {
    "fixed_depth": FixedDepth(),
    "damped_loops": DampedLoops(),
    "random_loops": RandomLoops(),
    "random_depth": RandomDepth((0.9, 0.6, 0.2)),
    "expert_choice": ExpertChoice(),
    "expert_choice_warmup": ExpertChoice(warmup_steps=5),
    "expert_choice_tiles": ExpertChoice(capacity_multiple=4),
    "expert_choice_mlp": ExpertChoice("mlp", predictor="aux_router", gate_bias=0.5),
    "token_choice": TokenChoice(),
    "token_choice_mlp": TokenChoice("mlp", gate_bias=-1.0, activation="sigmoid"),
    "depth_and_width": DepthAndWidth(architecture="mlp"),
    "adaptive_halting": AdaptiveHalting(bias=0.0),
    "exit_gate": ExitGate(0.6),
    "exit_gate_without_exits": ExitGate(),
    "deepened": Deepened(TokenChoice(), 1),
    "deepened_experts": Deepened(ExpertChoice(), 1),
}


def decisions(router: Router, causal: bool = False) -> list[RoutingDecision]:
    """About random states, as if the block changed nothing."""
    hidden = random_states(LENGTH, 2).detach()
    found, previous = [], RoutingDecision.everything(Tokens.whole_sequence(LENGTH, 2))
    for step in range(router.num_recursions):
        decision = router.decide(router.logits(hidden, step), step, previous, causal)
        if decision.rows is not None:
            hidden = hidden.gather(0, decision.rows[..., None].expand(-1, -1, hidden.shape[-1]))
        found.append(decision)
        previous = decision
    return found


def depths(router: Router, causal: bool = False) -> torch.Tensor:
    """Steps that each token takes, `[s b]`."""
    reached = torch.zeros(LENGTH, 2)
    for decision in decisions(router, causal):
        tokens = decision.tokens
        valid = torch.ones_like(tokens.positions, dtype=torch.float)
        if tokens.is_padding is not None:
            valid = tokens.is_padding.logical_not().float()
        reached.scatter_add_(0, tokens.positions, valid)
    return reached


def test_every_registered_router_is_tested():
    # A name without a module was registered by a test or an example.
    ours = {k for k in registered_routers().values() if k.__module__.startswith("mor_layers.")}
    assert {type(config) for config in ROUTERS.values()} == ours


@pytest.mark.parametrize("name", ROUTERS)
def test_notes_are_those_of_a_trial(name):
    config = ROUTERS[name]
    assert config.notes_for(STEPS) == observed_notes(config, STEPS)


@pytest.mark.parametrize("name", ROUTERS)
def test_declared_scorers_are_those_that_are_measured(name):
    config = ROUTERS[name]
    with torch.device("meta"):
        router = config.build(HIDDEN_SIZE, STEPS)
    declared = config.scorer_shapes(HIDDEN_SIZE, STEPS)
    measured = measured_scorers(router, HIDDEN_SIZE)
    for ours, theirs in zip(declared, measured, strict=True):
        for products in (1, 2):  # those of the forward pass, and of the backward pass
            assert _products(ours, products) == _products(theirs, products)


def _products(scorer: tuple[ScorerMatrix, ...], power: int) -> int:
    return sum(m.weights * m.backward_products ** (power - 1) for m in scorer)


def test_no_gradient_is_counted_where_nothing_reads_the_gates():
    router = TokenChoice(combine="additive", balancing="none")
    (first, *_) = router.scorer_shapes(HIDDEN_SIZE, STEPS)
    assert first == (ScorerMatrix(HIDDEN_SIZE * STEPS, 0),)


@pytest.mark.parametrize("name", [n for n, c in ROUTERS.items() if c.has_fixed_capacities])
def test_fixed_capacities_are_kept_exactly(name):
    config = ROUTERS[name]
    factors = config.capacity_factors_for(STEPS)
    assert factors is not None
    router = randomized(config.build(HIDDEN_SIZE, STEPS))
    widths = [decision.tokens.shape[0] for decision in decisions(router)]
    assert tuple(widths) == config.capacities_for(STEPS, LENGTH)
    for width, factor in zip(widths, factors, strict=True):
        asked = max(1, int(factor * LENGTH))
        assert asked <= width < asked + config.rounds_capacities_to
        assert width % config.rounds_capacities_to == 0 or width == LENGTH


@pytest.mark.parametrize("name", ROUTERS)
def test_causal_routers_decide_alike_and_others_do_not(name):
    config = ROUTERS[name]
    router = randomized(config.build(HIDDEN_SIZE, STEPS)).eval()
    is_equal = torch.equal(depths(router), depths(router, causal=True))
    assert is_equal or not config.is_causal
    if name in ("expert_choice", "random_depth"):
        assert not is_equal


@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_exit_only_where_that_is_declared(name):
    config = ROUTERS[name]
    router = randomized(config.build(HIDDEN_SIZE, STEPS)).eval()
    if name == "expert_choice_warmup":
        router.training_steps.fill_(5)  # until then, all tokens run all steps
    exits = bool((depths(router, causal=True) < STEPS).any())
    assert exits == config.lets_tokens_exit


class TwoLayers(Router):
    """Two matrices that all steps share, and a third that is built and never used."""

    def __init__(self, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.inner = torch.nn.Linear(hidden_size, 5)
        self.outer = torch.nn.Linear(5, 1, bias=False)
        self.unused = torch.nn.Linear(2, 2)

    def logits(self, hidden, step):
        return self.outer(self.inner(hidden.detach()))

    def decide(self, logits, step, previous, causal=False):
        return previous.keep_all()


@dataclass(frozen=True)
class Undeclared(RouterConfig):
    def build(self, hidden_size: int, num_recursions: int) -> Router:
        return TwoLayers(hidden_size, num_recursions)


@torch.inference_mode()
def test_a_router_that_declares_nothing_is_counted():
    shape = RouterShape.from_recursion(RecursionConfig(2, router=Undeclared()), 8)
    step = (ScorerMatrix(5, 2), ScorerMatrix(40, 1))  # hidden states get no gradient
    assert shape == RouterShape((step, step), None, 8 * 5 + 5 + 5 + 6)


class Looking(TwoLayers):
    def logits(self, hidden, step):
        return super().logits(hidden * hidden.mean().item(), step)


@dataclass(frozen=True)
class UndeclaredLooking(RouterConfig):
    def build(self, hidden_size: int, num_recursions: int) -> Router:
        return Looking(hidden_size, num_recursions)


def test_a_router_that_cannot_be_measured_says_what_to_declare():
    with pytest.raises(ValueError, match=r"cost of Looking cannot be measured.*`scorer_shapes`"):
        UndeclaredLooking().scorer_shapes(8, 2)
