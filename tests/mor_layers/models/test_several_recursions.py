"""Models with several recursions, which must equal the chain of their parts and the unrolled stack."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    Relaxation,
    TokenChoice,
    from_mapping,
    load_config,
    load_model,
    save_model,
    to_mapping,
)
from mor_layers.costs import ModelShape, account, count_parameters
from mor_layers.generation import (
    Speculation,
    SpeculativeDecoder,
    deepened,
    with_early_exit,
)
from mor_layers.layers import NormModulation
from mor_layers.recursion import HistoryInjection, HyperConnections, LoopLoss
from mor_layers.routers import Confidence
from mor_layers.weights.folder import weight_names
from mor_layers.weights.unrolling import unrolled_weights
from tests.mor_layers.small_models import (
    VOCAB_SIZE,
    gradients,
    plain_config,
    random_ids,
    small_model,
)

CLOSE = {"rtol": 1e-5, "atol": 2e-5}

FIXED = RecursionConfig(2, "middle_cycle", block_layers=2)
ROUTED = RecursionConfig(3, "cycle", ExpertChoice(alpha=0.7), "recursive_sharing", block_layers=1)
CHOSEN = RecursionConfig(
    2, "cycle", TokenChoice(z_loss_coefficient=0.1), "exit_state", prelude_layers=1, block_layers=1
)
IN_SEQUENCE = RecursionConfig(2, "middle_sequence", block_layers=2, share_norms=False)
DEPTHS = RecursionConfig(
    1,
    "middle_sequence",
    ExpertChoice(capacity_factors=(0.5,)),
    anchor_every=2,
    depth_balance=0.5,
    block_layers=3,
)
LOOPED = RecursionConfig(3, loop_loss=LoopLoss(scale_penalty=0.1), loop_norm=True, block_layers=1)

MODELS: dict[str, tuple[RecursionConfig, ...]] = {
    "fixed depth, then expert choice": (FIXED, ROUTED),
    "two routers, two policies": (ROUTED, CHOSEN),
    "layers repeated one by one between two others": (ROUTED, IN_SEQUENCE, FIXED),
    "layers that route by themselves": (DEPTHS, CHOSEN),
    "what steps differ by": (
        replace(FIXED, relaxation=Relaxation(2), step_embeddings=True),
        replace(FIXED, own_per_step=("attention",), norm_modulation=NormModulation()),
        replace(FIXED, hyper_connections=HyperConnections()),
        replace(ROUTED, history=HistoryInjection(1), residual_scale=0.7),
    ),
    "a loss after every loop of the last": (ROUTED, LOOPED),
}


def several(*recursions: RecursionConfig, **changes: Any) -> DecoderConfig:
    layers = sum(recursion.num_unrolled_layers or 0 for recursion in recursions)
    return replace(plain_config(layers), recursion=recursions, **changes)


def next_tokens(ids: Tensor) -> Tensor:
    return ids.roll(-1, dims=1)


class Given(nn.Module):
    """Stands for an embedding whose output is known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, ids: Tensor) -> Tensor:
        return self.states


def chain_of(model: MoRTransformer) -> list[MoRTransformer]:
    """Decoders with one recursion each, which share the parameters of the model's layers."""
    own, parts, block = model.state_dict(keep_vars=True), model.config.parts, 0
    chain = []
    for index, part in enumerate(parts):
        one, schedule = MoRTransformer(part), part.schedule
        earlier = parts[index - 1].schedule.coda if index else 0
        places = {  # where each of the part's stacks is, and the number of its first layer there
            "prelude.layers": (f"between.{index - 1}.layers", earlier),
            "coda.layers": (f"between.{index}.layers", 0),
            "recursions": ("recursions", block),
        }
        if index == 0:
            places["prelude.layers"] = "prelude.layers", 0
        if index == len(parts) - 1:
            places["coda.layers"] = "coda.layers", 0
        state = {}
        for name in one.state_dict():
            source = name
            for stack, (place, first) in places.items():
                if name.startswith(f"{stack}."):
                    number, rest = name.removeprefix(f"{stack}.").split(".", 1)
                    source = f"{place}.{int(number) + first}.{rest}"
            state[name] = own[source]
        one.load_state_dict(state, assign=True)
        block += schedule.num_blocks
        chain.append(one.train(model.training))
    return chain


def read_by_chain(
    model: MoRTransformer, ids: Tensor, labels: Tensor | None, causal: bool
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Logits, losses, and depths of each recursion block, of the parts one after another."""
    chain = chain_of(model)
    hidden, losses, depths = model.embedding(ids.T), {}, []
    for index, one in enumerate(chain):
        one.embedding = Given(hidden)  # pyright: ignore
        if index < len(chain) - 1:
            one.norm = one.output = nn.Identity()  # pyright: ignore
            output = one(ids, causal_routing=causal)
            hidden = output.logits.transpose(0, 1)
        else:
            output = one(ids, labels, causal_routing=causal)
            losses |= output.loop_losses
            if output.lm_loss is not None:
                losses["lm"] = output.lm_loss
        for run in output.recursions:
            depths.append(run.depths)
            for name, loss in run.losses.items():
                name = f"recursion_{index + 1}/{name}"
                losses[name] = losses.get(name, 0.0) + loss
    return output.logits, losses, depths


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_the_chain_of_its_parts(name, causal):
    model, ids = small_model(several(*MODELS[name])).train(), random_ids(2, 9)
    output = model(ids, next_tokens(ids), causal_routing=causal)
    logits, losses, depths = read_by_chain(model, ids, next_tokens(ids), causal)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=0)
    assert output.lm_loss is not None
    assert {**output.losses, "lm": output.lm_loss}.keys() == losses.keys()
    torch.testing.assert_close({**output.losses, "lm": output.lm_loss}, losses, **CLOSE)
    assert all(torch.equal(a.depths, b) for a, b in zip(output.recursions, depths, strict=True))
    output.loss.backward()
    found = gradients(model)
    model.zero_grad()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found, gradients(model), **CLOSE)
    assert all(bool(gradient.any()) for n, gradient in found.items() if ".mlp." in n)


@pytest.mark.parametrize("tie", [False, True])
def test_fixed_depth_equals_the_plain_stack_of_unrolled_layers(tie):
    deltas = replace(FIXED, relaxation=Relaxation(2, kind="dora"), prelude_layers=0)
    config = several(FIXED, IN_SEQUENCE, deltas, tie_embeddings=tie, qk_norm=True)
    model, ids = small_model(config), random_ids(2, 7)
    plain, weights = unrolled_weights(model.state_dict(), config)
    assert plain.recursion is None and plain.num_unrolled_layers == 6 + 6 + 5
    unrolled = MoRTransformer(plain)
    state = dict(weights)
    unrolled.load_state_dict(state | ({"output.weight": state["embedding.weight"]} if tie else {}))
    torch.testing.assert_close(model(ids).logits, unrolled(ids).logits, **CLOSE)


def test_layers_are_where_the_settings_say():
    model = MoRTransformer(several(FIXED, ROUTED, IN_SEQUENCE))
    assert (len(model.prelude.layers), len(model.coda.layers)) == (1, 1)
    assert [len(stack.layers) for stack in model.between] == [1, 1]  # type: ignore[arg-type]
    assert [[len(b.layers.layers) for b in own] for own in model.blocks] == [[2], [1], [1, 1]]  # type: ignore[arg-type]
    assert [b.kv_policy for own in model.blocks for b in own][1] == "recursive_sharing"


def test_a_single_recursion_keeps_its_names_and_its_losses():
    config = several(ROUTED)
    assert config == replace(plain_config(3), recursion=ROUTED) and config.parts == (config,)
    model, ids = small_model(config), random_ids(2, 9)
    assert not any(name.startswith("between") for name in model.state_dict())
    output = model(ids, next_tokens(ids))
    assert output.owners == () and "recursion" not in " ".join(output.losses)


def test_no_token_sees_what_comes_later():
    model, ids = small_model(several(ROUTED, CHOSEN)).eval(), random_ids(2, 9)
    logits = model(ids, causal_routing=True).logits
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCAB_SIZE
    again = model(changed, causal_routing=True).logits
    torch.testing.assert_close(again[:, :5], logits[:, :5], **CLOSE)
    assert not torch.allclose(again[:, 5:], logits[:, 5:])


def test_generating_equals_reading_what_was_generated():
    model, ids = small_model(several(CHOSEN, ROUTED)).eval(), random_ids(2, 4)
    generated = torch.stack(list(model.generate(ids, 5)), dim=1)
    logits = model(torch.cat([ids, generated], dim=1), causal_routing=True).logits
    assert torch.equal(logits[:, 3:-1].argmax(dim=-1), generated)


def test_a_saved_model_comes_back(tmp_path):
    config = several(FIXED, ROUTED, IN_SEQUENCE, tie_embeddings=True)
    model, ids = small_model(config).eval(), random_ids(2, 6)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model").eval()
    assert loaded.config == config
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_experts_between_recursions_are_trained_and_counted():
    moe = MoEConfig(4, bias_update_rate=0.1, balance_coefficient=0.0)
    model, ids = small_model(several(FIXED, ROUTED, moe=moe)), random_ids(2, 8)
    output = model(ids, next_tokens(ids))
    assert [sorted(uses) for uses in output.between_experts] == [[0]]
    routers = {name: m for name, m in model.named_modules() if name.endswith("mlp.router")}
    before = {name: router.bias.clone() for name, router in routers.items()}
    model.advance([output])
    for name in ("prelude.layers.0", "between.0.layers.0", "recursions.1.layers.layers.0"):
        router = routers[f"{name}.mlp.router"]
        assert not torch.equal(router.bias, before[f"{name}.mlp.router"])


def test_dense_ends_are_all_layers_outside_of_recursions():
    config = several(FIXED, ROUTED, moe=MoEConfig(4), dense_ends=True)
    names = weight_names(config)
    assert {name.split(".")[0] for name in names if "experts" in name} == {"recursions"}
    assert any(name.startswith("between.0.layers.0.mlp.gate") for name in names)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    config = several(*MODELS[name])
    counted = count_parameters(ModelShape.from_decoder(config)).total
    assert counted == sum(p.numel() for p in MoRTransformer(config).parameters())


def test_losses_after_every_loop_run_the_layers_after_the_last_recursion_only():
    config, length = several(FIXED, LOOPED), 8
    whole, once = (
        account(config, length),
        account(several(FIXED, replace(LOOPED, loop_loss=None)), 8),
    )
    coda = [step for step in whole.steps if step.stack == "coda"]
    assert len(coda) == 1
    further = 2 * 3 * (coda[0].forward.total + whole.forward.output)
    assert whole.training.total - once.training.total == further


MIDDLE_HALF_TWICE = """
vocab_size: 17
hidden_size: 12
ffn_hidden_size: 10
num_heads: 2
num_unrolled_layers: 12
recursion: {num_recursions: 2, prelude_layers: 2, coda_layers: 2}
"""


def test_middle_half_twice_is_one_line(tmp_path):
    (tmp_path / "model.yaml").write_text(MIDDLE_HALF_TWICE)
    schedule = load_config(DecoderConfig, tmp_path / "model.yaml").schedule
    assert schedule.unrolled == (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)


def test_a_list_in_yaml_is_several_recursions(tmp_path):
    listed = MIDDLE_HALF_TWICE.replace(
        "{num_recursions: 2, prelude_layers: 2, coda_layers: 2}",
        "[{num_recursions: 2, block_layers: 3}, {num_recursions: 2, sharing: cycle, "
        "router: {type: expert_choice}}]",
    )
    (tmp_path / "model.yaml").write_text(listed)
    config = load_config(DecoderConfig, tmp_path / "model.yaml")
    assert [part.num_unrolled_layers for part in config.parts] == [8, 4]
    assert config.recursions[1].router == ExpertChoice()
    assert config.parts[1].schedule.block_size == 2
    assert from_mapping(DecoderConfig, to_mapping(config)) == config


OPEN = RecursionConfig(2, "cycle")

REFUSING: dict[str, Callable[[MoRTransformer], object]] = {
    "deepening": lambda model: deepened(model, 1),
    "early exit": lambda model: with_early_exit(model, Confidence(0.5)),
    "speculation": lambda model: SpeculativeDecoder(model, Speculation(1)),
}


@pytest.mark.parametrize("subject", REFUSING)
def test_what_knows_one_recursion_only_refuses_several_by_name(subject):
    with pytest.raises(ValueError, match=f"recursion has 2 entries, but {subject} .*supports"):
        REFUSING[subject](small_model(several(FIXED, ROUTED)))


MISTAKES: dict[str, tuple[Any, str]] = {
    "none of several": (lambda: replace(plain_config(8), recursion=()), "recursion is empty"),
    "a list in Python": (
        lambda: replace(plain_config(8), recursion=[FIXED, OPEN]),  # type: ignore[arg-type]
        "a tuple of RecursionConfig",
    ),
    "two that leave their blocks open": (
        lambda: replace(plain_config(8), recursion=(OPEN, FIXED, OPEN)),
        r"recursion\[0\], recursion\[2\] do not say how many layers",
    ),
    "layers that do not add up": (
        lambda: replace(plain_config(8), recursion=(FIXED, ROUTED)),
        "num_unrolled_layers=8 is not the sum of the recursions, 6 \\+ 3. Use num_unrolled_layers=9",
    ),
    "fewer layers than blocks need": (
        lambda: replace(plain_config(5), recursion=(FIXED, OPEN)),
        "less than the 6 layers",
    ),
    "a rest that does not divide": (
        lambda: replace(plain_config(9), recursion=(FIXED, OPEN)),
        r"recursion\[1\]: cannot split 3 shared layers into 2 equal recursions",
    ),
    "a block of another length": (
        lambda: replace(plain_config(8), recursion=FIXED),
        "num_unrolled_layers=8 is not what block_layers=2 makes .* Use num_unrolled_layers=6",
    ),
    "a block of no layers": (lambda: RecursionConfig(2, block_layers=0), "must be at least 1"),
    "losses of loops before another recursion": (
        lambda: several(LOOPED, FIXED),
        r"recursion\[0\].loop_loss=.* Only the last recursion",
    ),
    "experts that are missing": (
        lambda: several(FIXED, replace(FIXED, expert_routers="per_step")),
        r"recursion\[1\]: expert_routers='per_step' needs layers with experts",
    ),
    "dense layers around recursions that have none": (
        lambda: several(ROUTED, ROUTED, moe=MoEConfig(4), dense_ends=True),
        "dense_ends=True needs moe, and layers outside the recursion",
    ),
    "the one recursion of several": (
        lambda: several(FIXED, ROUTED).effective_recursion,
        "recursion has 2 entries",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_what_is_allowed(name):
    mistake, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        mistake()
