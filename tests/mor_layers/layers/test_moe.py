"""The mixture of experts, against a loop over tokens; and inside a recursion."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoE,
    MoEConfig,
    RecursionConfig,
    TokenChoice,
    from_mapping,
)
from tests.mor_layers.small_models import (
    VOCAB_SIZE,
    column,
    columns,
    gradients,
    random_ids,
    random_states,
    randomized,
    small_config,
    small_model,
)

HIDDEN, EXPERTS, STEPS = 12, 5, 3
PADDING = columns([0, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]).bool()
LAYERS: dict[str, tuple[MoEConfig, dict]] = {
    "top 2": (MoEConfig(EXPERTS), {}),
    "top 1": (MoEConfig(EXPERTS, 1), {}),
    "all experts": (MoEConfig(EXPERTS, EXPERTS), {}),
    "one expert": (MoEConfig(1, 1), {}),
    "a router a step": (MoEConfig(EXPERTS), {"routers": "per_step"}),
    "bias": (MoEConfig(EXPERTS, bias_update_rate=0.1), {}),
    "capacity": (MoEConfig(EXPERTS, capacity_factor=0.6), {}),
    "capacity by position": (
        MoEConfig(EXPERTS, 3, capacity_factor=0.5, drop_policy="position"),
        {"routers": "per_step"},
    ),
    "width": (MoEConfig(EXPERTS, 3), {"mean_experts": (1.5, 1.5, 2.0)}),
    "width and capacity": (
        MoEConfig(EXPERTS, 3, capacity_factor=0.7, bias_update_rate=0.1),
        {"mean_experts": (2.0, 2.0, 2.0)},
    ),
    "shared expert": (MoEConfig(EXPERTS, shared_ffn_hidden_size=7), {}),
    "gates as they are": (MoEConfig(EXPERTS, normalizes_gates=False, gate_scale=2.5), {}),
    "groups by softmax": (MoEConfig(6, 3, num_groups=3, groups_per_token=2), {}),
    "groups by sigmoid": (
        MoEConfig(
            6, 2, bias_update_rate=0.1, scores="sigmoid", gate_scale=1.5, num_groups=3,
            groups_per_token=1, shared_ffn_hidden_size=3,
        ),
        {},
    ),
}  # fmt: skip


def layer_of(name: str) -> MoE:
    config, options = LAYERS[name]
    layer = randomized(MoE(HIDDEN, 10, config, STEPS, **options))
    generator = torch.Generator().manual_seed(5)
    if config.bias_update_rate:
        bias = 0.3 * torch.randn(STEPS, config.num_experts, generator=generator)
        layer.router.bias.copy_(bias)
    if layer.router.widths is not None:
        layer.router.widths.values.fill_(0.2)
    return layer


def by_loops(
    layer: MoE, hidden: Tensor, step: int, is_padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, load, balance loss and z-loss, token by token."""
    config, router = layer.router.config, layer.router
    weight = router.weights[step if len(router.weights) > 1 else 0]
    places = [
        (i, j)
        for i in range(hidden.shape[0])
        for j in range(hidden.shape[1])
        if is_padding is None or not is_padding[i, j]
    ]
    wanted: list[tuple[int, tuple[int, int], Tensor, Tensor]] = []
    mean, z = torch.zeros(config.num_experts), torch.zeros(())
    for place in places:
        exponentials = [torch.exp(row @ hidden[place]) for row in weight]
        p = [e / sum(exponentials) for e in exponentials]
        shares = p
        if config.scores == "sigmoid":
            p = [e / (1 + e) for e in exponentials]
            shares = [score / sum(p) for score in p]
        mean = mean + torch.stack(shares) / len(places)
        z = z + torch.log(sum(exponentials)) ** 2 / len(places)
        bias = router.bias[step].tolist() if config.bias_update_rate else [0.0] * len(p)
        ranks = [float(score.detach()) + bias[e] for e, score in enumerate(p)]
        size = len(p) // config.num_groups
        best = [sorted(ranks[g * size :][:size])[::-1] for g in range(config.num_groups)]
        best = [sum(group[: 1 if config.scores == "softmax" else 2]) for group in best]
        open_groups = sorted(range(len(best)), key=lambda g: -best[g])[: config.groups_per_token]
        ranked = sorted(
            (e for e in range(len(p)) if e // size in open_groups), key=lambda e: -ranks[e]
        )
        taken = ranked[: config.experts_per_token]
        if router.widths is not None:
            bar = router.widths.values[step]
            taken = taken[:1] + [e for e in taken[1:] if p[e] > bar]
        is_divided = config.experts_per_token > 1 and config.normalizes_gates
        total = (sum(p[e] for e in taken) if is_divided else 1.0) / config.gate_scale
        wanted += [(e, place, p[e] / total, p[e]) for e in taken]
    output = [[torch.zeros(HIDDEN) for _ in row] for row in hidden]
    load, share = torch.zeros(config.num_experts), torch.zeros(config.num_experts)
    for e in range(config.num_experts):
        queue = [entry for entry in wanted if entry[0] == e]
        share[e] = len(queue) / max(1, len(wanted))
        if config.capacity_factor is not None:
            if config.drop_policy != "position":
                queue = sorted(queue, key=lambda entry: -float(entry[3].detach()))
            even = len(places) * config.experts_per_token / config.num_experts
            queue = queue[: math.ceil(even * config.capacity_factor)]
        load[e] = len(queue)
        gate, up, down = layer.experts.gate[e], layer.experts.up[e], layer.experts.down[e]
        for _, (i, j), weight_of_e, _ in queue:
            x = hidden[i, j]
            value = gate @ x
            output[i][j] = output[i][j] + weight_of_e * (
                down @ (value * torch.sigmoid(value) * (up @ x))
            )
    if layer.shared is not None:
        gate, up, down = layer.shared.gate[0], layer.shared.up[0], layer.shared.down[0]
        for i, row in enumerate(hidden):
            for j, x in enumerate(row):
                value = gate @ x
                own = down @ (value * torch.sigmoid(value) * (up @ x))
                output[i][j] = output[i][j] + own
    balance = config.num_experts * (share * mean).sum()
    return torch.stack([torch.stack(row) for row in output]), load, balance, z


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_it_equals_a_loop_over_tokens_with_its_gradients(name: str, padding: Tensor | None) -> None:
    layer, step, results = layer_of(name), 1, []
    for run in ("fast", "slow"):
        layer.zero_grad()
        hidden = random_states(7, 2, HIDDEN)
        if run == "fast":
            output, use = layer(hidden, step, padding)
            load, losses = use.load, use.losses
            assert float(use.load.sum() + use.dropped.sum()) > 0
        else:
            output, load, balance, z = by_loops(layer, hidden, step, padding)
            losses = {"expert_balance_loss": 0.01 / 3 * balance, "expert_z_loss": 0.001 / 3 * z}
        seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        ((output * seed).sum() + 100 * sum(losses.values())).backward()
        results.append((output, load, losses, hidden.grad, gradients(layer)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_what_padding_holds_changes_nothing() -> None:
    layer = layer_of("width and capacity")
    hidden = random_states(7, 2, HIDDEN).detach()
    other = torch.where(PADDING[..., None], 50.0, hidden)
    (a, use_a), (b, use_b) = layer(hidden, 0, PADDING), layer(other, 0, PADDING)
    assert torch.equal(a, b)
    assert (a[PADDING] == 0).all()
    assert torch.equal(use_a.load, use_b.load)
    assert torch.equal(use_a.histogram, use_b.histogram)
    assert use_a.losses == use_b.losses


def test_a_step_without_tokens_is_finite_and_reaches_every_parameter() -> None:
    layer = layer_of("capacity")
    output, use = layer(random_states(3, 2, HIDDEN), 2, torch.ones(3, 2, dtype=torch.bool))
    assert not use.load.any()
    assert not output.any()
    (output.sum() + sum(use.losses.values())).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_one_token_is_enough() -> None:
    output, use = layer_of("top 2")(random_states(1, 1, HIDDEN))
    assert output.shape == (1, 1, HIDDEN)
    assert float(use.load.sum()) == 2


def test_experts_run_once_on_their_tokens_and_on_no_others(monkeypatch) -> None:
    layer, rows = layer_of("top 2"), []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        "mor_layers.layers.moe.experts.F.linear", lambda x, w: rows.append(len(x)) or plain(x, w)
    )
    _, use = layer(random_states(7, 2, HIDDEN), 0, PADDING)
    logits, *products = rows
    assert logits == 14
    assert products == [int(n) for n in use.load for _ in range(3)]
    assert sum(products) == 3 * 2 * int((~PADDING).sum())


def test_the_bias_of_each_cell_follows_its_own_load() -> None:
    router = MoE(HIDDEN, 10, MoEConfig(4, bias_update_rate=0.5), STEPS).router
    router.advance(1, torch.tensor([5.0, 1.0, 2.0, 0.0]), None)
    router.advance(2, torch.zeros(4), None)
    assert router.bias.tolist() == [[0] * 4, [-0.5, 0.5, 0.0, 0.5], [0] * 4]
    assert router.to(torch.bfloat16).bias.dtype == torch.float32


def config_of(router=None, moe: MoEConfig | None = None, **options) -> DecoderConfig:
    config = replace(small_config(router, block_size=2), moe=moe or MoEConfig(4))
    return replace(config, recursion=replace(config.recursion, **options))


@pytest.mark.parametrize("expert_routers", ["shared", "per_step"])
@pytest.mark.parametrize("router", [FixedDepth(), ExpertChoice(), TokenChoice()])
def test_a_model_counts_every_cell_and_learns_from_every_loss(router, expert_routers) -> None:
    model = small_model(config_of(router, expert_routers=expert_routers))
    ids = random_ids(3, 9)
    is_padding = torch.zeros(3, 9, dtype=torch.bool)
    is_padding[0, 5:] = True
    output = model(ids, labels=ids, is_padding=is_padding)
    (recursion,) = output.recursions
    ran = torch.stack([d.tokens.count for d in recursion.decisions])
    assert recursion.expert_load.shape == (3, 2, 4)
    assert torch.equal(recursion.expert_load.sum(dim=-1), 2 * ran[:, None].expand(3, 2))
    assert not recursion.expert_drops.any()
    parts = [use for step in recursion.expert_use for use in step.values()]
    ends = [*output.prelude_experts.values(), *output.coda_experts.values()]
    assert len(ends) == 2
    wanted = sum(0.01 * u.metrics["expert_balance_loss"] / 3 for u in parts)
    wanted = wanted + sum(0.01 * u.metrics["expert_balance_loss"] for u in ends)
    balance = output.losses["expert_balance_loss"].item()
    assert balance == pytest.approx(wanted.item(), rel=1e-6)
    assert output.loss > output.lm_loss
    output.loss.backward()
    routers = [n for n, _ in model.named_parameters() if ".mlp.router." in n]
    assert len(routers) == (3 if expert_routers == "per_step" else 1) * 2 + 2
    for name in routers:
        assert dict(model.named_parameters())[name].grad.any(), name


def test_recomputation_changes_nothing() -> None:
    outcomes = []
    for recompute in (False, True):
        model = small_model(config_of(ExpertChoice(), kv_policy="exit_state"), recompute=recompute)
        ids = random_ids(2, 9)
        output = model(ids, labels=ids)
        output.loss.backward()
        outcomes.append(
            gradients(model) | {"loss": output.loss, "load": output.recursions[0].expert_load}
        )
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-6, atol=1e-7)


def test_an_optimizer_step_moves_the_bias_of_every_layer() -> None:
    model = small_model(config_of(ExpertChoice(), MoEConfig(4, bias_update_rate=0.01)))
    outputs = [model(random_ids(2, 9, seed)) for seed in range(2)]
    model.advance(outputs)
    load = sum(output.recursions[0].expert_load for output in outputs)
    for index, layer in enumerate(model.recursions[0].layers.layers):
        own = load[:, index]
        wanted = 0.01 * (own.mean(dim=-1, keepdim=True) - own).sign()
        assert torch.equal(layer.mlp.router.bias, wanted)
    assert model.prelude.layers[0].mlp.router.bias.any()


def test_one_recursion_equals_the_plain_stack() -> None:
    recursive = replace(
        small_config(FixedDepth(), 1, "cycle", block_size=2), moe=MoEConfig(4, capacity_factor=0.5)
    )
    models = [small_model(c) for c in (recursive, replace(recursive, recursion=None))]
    ids = random_ids(2, 9)
    first, second = (model(ids, labels=ids) for model in models)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"experts_per_token": 5}, "num_experts=4"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"drop_policy": "position"}, "without capacity_factor"),
        ({"drop_policy": "last", "capacity_factor": 1.0}, "probability, position"),
        ({"z_loss_coefficient": -1.0}, "z_loss_coefficient=-1.0"),
        ({"ffn_hidden_size": 0}, "ffn_hidden_size=0"),
        ({"scores": "tanh"}, "softmax, sigmoid"),
        ({"gate_scale": 0.0}, "gate_scale=0.0"),
        ({"shared_ffn_hidden_size": -1}, "shared_ffn_hidden_size=-1"),
        ({"num_groups": 3}, "divide num_experts=4"),
        ({"num_groups": 4, "experts_per_token": 2}, "must hold experts_per_token=2"),
        (
            {"num_groups": 2, "groups_per_token": 3},
            r"groups_per_token=3 must lie in 1\.\.num_groups=2",
        ),
        ({"num_groups": 4, "experts_per_token": 1, "scores": "sigmoid"}, "at least two experts"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoEConfig(4, **settings)


@pytest.mark.parametrize(
    ("options", "moe", "named"),
    [
        ({"expert_routers": "per_step"}, None, "expert_routers='per_step'"),
        ({"router": DepthAndWidth(mean_experts=1.5)}, None, "mean_experts=1.5"),
        ({"router": DepthAndWidth(mean_experts=3.0)}, MoEConfig(4), "mean_experts=3.0"),
        ({"router": DepthAndWidth(mean_experts=1.0)}, MoEConfig(4, 1), "2 or more"),
    ],
)
def test_settings_over_experts_need_experts(options: dict, moe, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(small_config(), recursion=RecursionConfig(3, **options), moe=moe)


def test_settings_are_read_from_a_mapping() -> None:
    config = from_mapping(
        DecoderConfig,
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 12,
            "ffn_hidden_size": 10,
            "num_unrolled_layers": 5,
            "num_heads": 2,
            "recursion": {"num_recursions": 3, "expert_routers": "per_step"},
            "moe": {"num_experts": 4, "drop_policy": "position", "capacity_factor": 1},
        },
    )
    assert config.moe == MoEConfig(4, drop_policy="position", capacity_factor=1.0)


def test_nothing_is_counted_without_experts() -> None:
    output = small_model(small_config())(column(1, 2, 3).T)
    with pytest.raises(ValueError, match=r"DecoderConfig\.moe"):
        _ = output.recursions[0].expert_load
