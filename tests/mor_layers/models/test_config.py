"""Settings of a model: which are allowed, and how a wrong one is answered."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoE,
    MoEConfig,
    MoRTransformer,
    RandomDepth,
    RecursionConfig,
    TokenChoice,
)
from mor_layers.recursion import SharingSchedule

DECODER = {
    "vocab_size": 16,
    "hidden_size": 16,
    "ffn_hidden_size": 8,
    "num_unrolled_layers": 8,
    "num_heads": 4,
}


def decoder(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**(DECODER | changes))


def recursion(**changes: Any) -> RecursionConfig:
    return RecursionConfig(**({"num_recursions": 3} | changes))


def routed(router: Any) -> RecursionConfig:
    return RecursionConfig(3, router=router)


NAN, INFINITY = float("nan"), float("inf")

# name: (what builds it, what the message says was given, what it says is allowed)
BY_CONSTRUCTOR: dict[str, tuple[Callable[[], object], str, str]] = {
    "no recursion at all": (
        lambda: recursion(num_recursions=0),
        "num_recursions=0",
        "at least 1",
    ),
    "a negative number of recursions": (
        lambda: SharingSchedule(8, -2, "cycle"),
        "num_recursions=-2",
        "at least 1",
    ),
    "an unknown sharing scheme": (
        lambda: recursion(sharing="spiral"),
        "sharing='spiral'",
        "cycle, sequence, middle_cycle, middle_sequence",
    ),
    "a prelude of fewer layers than none": (
        lambda: recursion(prelude_layers=-1),
        "prelude_layers=-1 must be at least 0",
        "or None",
    ),
    "a coda of fewer layers than none": (
        lambda: SharingSchedule(8, 2, "cycle", coda_layers=-2),
        "coda_layers=-2 must be at least 0",
        "or None",
    ),
    "layers that do not divide between given ends": (
        lambda: decoder(num_unrolled_layers=8, recursion=recursion(prelude_layers=2)),
        "num_unrolled_layers=8, sharing='middle_cycle', prelude_layers=2",
        "Use 6 or 9",
    ),
    "an unknown scheme of a schedule": (
        lambda: SharingSchedule(8, 2, "Cycle"),  # type: ignore[arg-type]
        "sharing='Cycle'",
        "cycle, sequence, middle_cycle, middle_sequence",
    ),
    "an unknown kv policy": (
        lambda: recursion(kv_policy="recursion-wise"),
        "kv_policy='recursion-wise'",
        "recursion_wise, recursive_sharing, sharing_with_update",
    ),
    "a router's name instead of its settings": (
        lambda: routed("expert_choice"),
        "router='expert_choice'",
        "ExpertChoice()",
    ),
    "a router's class instead of its settings": (
        lambda: routed(ExpertChoice),
        "ExpertChoice'>",
        "ExpertChoice()",
    ),
    "expert-choice over a sequence": (
        lambda: recursion(sharing="sequence", router=ExpertChoice()),
        "sharing='sequence' cannot route tokens with ExpertChoice",
        "cycle or middle_cycle, or router FixedDepth",
    ),
    "token-choice over a middle sequence": (
        lambda: recursion(sharing="middle_sequence", router=TokenChoice()),
        "sharing='middle_sequence' cannot route tokens with TokenChoice",
        "cycle or middle_cycle, or router FixedDepth",
    ),
    "random depth over a sequence": (
        lambda: recursion(sharing="sequence", router=RandomDepth()),
        "sharing='sequence' cannot route tokens with RandomDepth",
        "cycle or middle_cycle, or router FixedDepth",
    ),
    "shared keys over a sequence": (
        lambda: recursion(sharing="sequence", kv_policy="recursive_sharing"),
        "kv_policy='recursive_sharing'",
        "cycle or middle_cycle",
    ),
    "updated keys over a middle sequence": (
        lambda: recursion(sharing="middle_sequence", kv_policy="sharing_with_update"),
        "kv_policy='sharing_with_update'",
        "kv_policy='recursion_wise'",
    ),
    "dense ends without experts": (
        lambda: decoder(recursion=recursion(), dense_ends=True),
        "dense_ends=True needs moe",
        "Leave it out",
    ),
    "dense ends where all layers are shared": (
        lambda: decoder(
            num_unrolled_layers=9,
            recursion=recursion(sharing="cycle"),
            moe=MoEConfig(4),
            dense_ends=True,
        ),
        "dense_ends=True needs",
        "middle_cycle or middle_sequence",
    ),
    "layers that do not divide": (
        lambda: decoder(num_unrolled_layers=10, recursion=recursion()),
        "cannot split 8 shared layers into 3",
        "Use 8 or 11.",
    ),
    "too few layers for the ends": (
        lambda: decoder(num_unrolled_layers=1, recursion=recursion()),
        "num_unrolled_layers=1",
        "Use 5.",
    ),
    "more recursions than layers": (
        lambda: decoder(num_unrolled_layers=2, recursion=recursion(sharing="cycle")),
        "cannot split 2 shared layers into 3",
        "Use 3.",
    ),
    "no words": (lambda: decoder(vocab_size=0), "vocab_size=0", "at least 1"),
    "no width": (lambda: decoder(hidden_size=0), "hidden_size=0", "at least 1"),
    "no MLP": (lambda: decoder(ffn_hidden_size=-1), "ffn_hidden_size=-1", "at least 1"),
    "no heads": (lambda: decoder(num_heads=0), "num_heads=0", "at least 1"),
    "no layers": (
        lambda: decoder(num_unrolled_layers=0),
        "num_unrolled_layers=0",
        "at least 1",
    ),
    "heads that do not divide the width": (
        lambda: decoder(num_heads=3),
        "hidden_size=16",
        "even multiple of num_heads=3",
    ),
    "heads of an odd size": (
        lambda: decoder(num_heads=16),
        "hidden_size=16",
        "even multiple of num_heads=16",
    ),
    "given heads of an odd size": (
        lambda: decoder(head_dim=5),
        "head_dim=5",
        "even and at least 2",
    ),
    "key-value heads that do not divide the heads": (
        lambda: decoder(num_kv_heads=3),
        "num_kv_heads=3",
        "divide num_heads=4",
    ),
    "no key-value heads": (
        lambda: decoder(num_kv_heads=0),
        "num_kv_heads=0",
        "divide num_heads=4",
    ),
    "a norm without epsilon": (
        lambda: decoder(rms_norm_epsilon=0.0),
        "rms_norm_epsilon=0.0",
        "above 0",
    ),
    "a negative rotation": (lambda: decoder(rope_base=-1.0), "rope_base=-1.0", "above 0"),
    "too few capacities": (
        lambda: routed(ExpertChoice(capacity_factors=(1.0, 0.5))),
        "capacity_factors=(1.0, 0.5) has 2 entries for 3",
        "Use 3 non-increasing numbers in (0, 1]",
    ),
    "no capacities": (
        lambda: routed(ExpertChoice(capacity_factors=())),
        "capacity_factors=() has 0 entries for 3",
        "Use 3 non-increasing numbers in (0, 1]",
    ),
    "increasing capacities": (
        lambda: ExpertChoice(capacity_factors=(0.5, 0.8)),
        "capacity_factors=(0.5, 0.8) increase",
        "non-increasing numbers in (0, 1]",
    ),
    "a capacity of nothing": (
        lambda: ExpertChoice(capacity_factors=(1.0, 0.0)),
        "capacity_factors=(1.0, 0.0)",
        "(0, 1]",
    ),
    "a capacity above everything": (
        lambda: ExpertChoice(capacity_factors=(1.5, 1.0)),
        "capacity_factors=(1.5, 1.0)",
        "(0, 1]",
    ),
    "a capacity that is no number": (
        lambda: ExpertChoice(capacity_factors=(1.0, NAN)),
        "capacity_factors=(1.0, nan)",
        "(0, 1]",
    ),
    "increasing random capacities": (
        lambda: RandomDepth((0.5, 0.8)),
        "capacity_factors=(0.5, 0.8) increase",
        "non-increasing",
    ),
    "too many random capacities": (
        lambda: routed(RandomDepth((1.0, 0.5, 0.5, 0.1))),
        "has 4 entries for 3",
        "Use 3",
    ),
    "an unknown expert-choice scorer": (
        lambda: ExpertChoice(architecture="wide_mlp"),  # type: ignore[arg-type]
        "ExpertChoice.architecture='wide_mlp'",
        "linear, mlp",
    ),
    "an unknown expert-choice activation": (
        lambda: ExpertChoice(activation="softmax"),  # type: ignore[arg-type]
        "ExpertChoice.activation='softmax'",
        "sigmoid, tanh, none",
    ),
    "an unknown predictor": (
        lambda: ExpertChoice(predictor="oracle"),  # type: ignore[arg-type]
        "ExpertChoice.predictor='oracle'",
        "aux_loss, aux_router",
    ),
    "an unknown expert-choice combination": (
        lambda: ExpertChoice(combine="replace"),  # type: ignore[arg-type]
        "ExpertChoice.combine='replace'",
        "weighted, additive",
    ),
    "no alpha": (lambda: ExpertChoice(alpha=0.0), "ExpertChoice.alpha=0.0", "above 0"),
    "an endless alpha": (lambda: ExpertChoice(alpha=INFINITY), "alpha=inf", "finite"),
    "absolute zero": (
        lambda: ExpertChoice(temperature=0.0),
        "ExpertChoice.temperature=0.0",
        "above 0",
    ),
    "a temperature that is no number": (
        lambda: TokenChoice(temperature=NAN),
        "TokenChoice.temperature=nan",
        "above 0",
    ),
    "a negative warm-up": (
        lambda: ExpertChoice(warmup_steps=-1),
        "ExpertChoice.warmup_steps=-1",
        "0 or more",
    ),
    "a multiple of nothing": (
        lambda: ExpertChoice(capacity_multiple=0),
        "ExpertChoice.capacity_multiple=0",
        "between 1 (no rounding)",
    ),
    "a certain threshold": (
        lambda: ExpertChoice(threshold=1.0),
        "ExpertChoice.threshold=1.0",
        "(0, 1)",
    ),
    "an impossible threshold": (
        lambda: ExpertChoice(threshold=0.0),
        "ExpertChoice.threshold=0.0",
        "(0, 1)",
    ),
    "a negative predictor loss": (
        lambda: ExpertChoice(predictor_coefficient=-0.1),
        "predictor_coefficient=-0.1",
        "0 or more",
    ),
    "a negative expert-choice z-loss": (
        lambda: ExpertChoice(z_loss_coefficient=-1e-3),
        "z_loss_coefficient=-0.001",
        "0 or more",
    ),
    "a negative token-choice z-loss": (
        lambda: TokenChoice(z_loss_coefficient=-1e-3),
        "z_loss_coefficient=-0.001",
        "0 or more",
    ),
    "an unknown token-choice scorer": (
        lambda: TokenChoice(architecture="deep"),  # type: ignore[arg-type]
        "TokenChoice.architecture='deep'",
        "linear, mlp",
    ),
    "an unknown token-choice activation": (
        lambda: TokenChoice(activation="tanh"),  # type: ignore[arg-type]
        "TokenChoice.activation='tanh'",
        "softmax, sigmoid",
    ),
    "an unknown balancing": (
        lambda: TokenChoice(balancing="bias"),  # type: ignore[arg-type]
        "TokenChoice.balancing='bias'",
        "loss, loss_free, none",
    ),
    "an alpha that softmax ignores": (
        lambda: TokenChoice(alpha=0.5),
        "TokenChoice.alpha=0.5",
        "activation='sigmoid'",
    ),
    "a coefficient of no balancing": (
        lambda: TokenChoice(balancing="none", balancing_coefficient=0.1),
        "balancing_coefficient=0.1",
        "'loss' or 'loss_free'",
    ),
    "a negative balancing": (
        lambda: TokenChoice(balancing_coefficient=-0.1),
        "balancing_coefficient=-0.1",
        "0 or more",
    ),
}


@pytest.mark.parametrize("name", BY_CONSTRUCTOR)
def test_a_wrong_setting_is_named_with_what_is_allowed(name):
    build, given, allowed = BY_CONSTRUCTOR[name]
    with pytest.raises(ValueError, match=r"\.$") as error:
        build()
    assert given in str(error.value)
    assert allowed in str(error.value)


def test_defaults_are_the_papers_choice():
    config = recursion()
    assert config == RecursionConfig(3, "middle_cycle", FixedDepth(), "recursion_wise", True)
    assert ExpertChoice().capacity_factors_for(4) == (1.0, 0.75, 0.5, 0.25)


def test_settings_are_hashable_and_compare_by_value():
    assert len({decoder(recursion=recursion()), decoder(recursion=recursion())}) == 1


@pytest.mark.parametrize(
    "kind", [RecursionConfig, DecoderConfig, ExpertChoice, TokenChoice, RandomDepth]
)
def test_every_setting_is_documented_below_its_field(kind):
    lines = [line.strip() for line in inspect.getsource(kind).splitlines()]
    for field in dataclasses.fields(kind):
        (index,) = [i for i, line in enumerate(lines) if line.startswith(f"{field.name}: ")]
        assert lines[index + 1].startswith('"""'), field.name


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_what_is_accepted_can_be_built_and_run(sharing):
    for policy in ("recursion_wise", "recursive_sharing", "sharing_with_update"):
        for router in (FixedDepth(), RandomDepth(), ExpertChoice(), TokenChoice()):
            options = {"sharing": sharing, "kv_policy": policy, "router": router}
            try:
                config = decoder(
                    num_unrolled_layers=6 if "middle" not in sharing else 8,
                    recursion=recursion(**options),
                )
            except ValueError:
                continue
            model = MoRTransformer(config)
            assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_only_layers_between_dense_ends_have_experts():
    long = recursion(sharing="cycle", prelude_layers=0, coda_layers=2)
    for own, num_ends in ((recursion(), 2), (None, 2), (long, 2)):
        model = MoRTransformer(decoder(recursion=own, moe=MoEConfig(4), dense_ends=True))
        ends = [*model.prelude.layers, *model.coda.layers]
        assert [isinstance(layer.mlp, MoE) for layer in ends] == [False] * num_ends
        inner = [layer for block in model.recursions for layer in block.layers.layers]
        assert all(isinstance(layer.mlp, MoE) for layer in inner)
