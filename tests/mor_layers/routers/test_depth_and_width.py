"""The depth-and-width router: stated shares that hold, gates that learn, a dial that turns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    MoEConfig,
    MoRTransformer,
    RecursionBlock,
    RecursionConfig,
    Tokens,
    from_mapping,
)
from mor_layers.generation import turn_dial
from mor_layers.models import DecoderStack
from mor_layers.routers import Thresholds
from tests.mor_layers.small_models import (
    columns,
    differentiable,
    gradients,
    oracle_gradients,
    random_ids,
    random_states,
    randomized,
    small_config,
    small_model,
)
from tests.oracles import loops as reference
from tests.oracles.exit_state import exit_state

STEPS = 3
DOCUMENTS = columns([0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1])
PADDING = columns([0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]).bool()


def by_loops(
    hidden: Tensor,
    block: reference.Block,
    weight: Tensor,
    thresholds: list[float],
    where: dict[str, Tensor | None],
) -> reference.Recursion:
    """The router of SPEC's section on depth and width, over one sequence, token by token."""
    states, depths = list(hidden[:, 0]), torch.zeros(len(hidden), 1, dtype=torch.long)
    found = reference.split_documents(len(hidden), 1, **where)
    logits = {}
    for p in (p for document in found for p in document.positions):
        entering = hidden[p, 0]
        logits[p] = weight @ (entering / torch.sqrt((entering**2).mean() + 1e-5))
    mean = sum(logits.values()) / len(logits)
    # What moves all logits alike moves the thresholds too, and reaches no gate.
    logits = {p: logit - (mean - mean.detach()) for p, logit in logits.items()}
    for document in found:
        memory: reference.Memory = {}
        running = list(document.positions)
        for step in range(STEPS):
            if step:
                running = [p for p in running if logits[p][step - 1] > thresholds[step - 1]]
            if not running:
                break
            outputs = block(step, torch.stack([states[p] for p in running]), running, memory)
            for p, output in zip(running, outputs, strict=True):
                depths[p] += 1
                if step == 0:
                    states[p] = output
                    continue
                gate = torch.sigmoid(logits[p][step - 1] - thresholds[step - 1])
                states[p] = states[p] + (1 + gate - gate.detach()) * (output - states[p])
    return reference.Recursion(torch.stack(states)[:, None], depths)


@pytest.mark.parametrize(
    "where",
    [{}, {"documents": DOCUMENTS, "is_padding": PADDING}],
    ids=["plain", "documents and padding"],
)
@pytest.mark.parametrize("policy", ["recursion_wise", "exit_state"])
def test_it_equals_a_loop_over_tokens_with_its_gradients(policy, where) -> None:
    config, num_layers = small_config(), 2
    router = DepthAndWidth().build(config.hidden_size, STEPS)
    block = randomized(RecursionBlock(DecoderStack(config, num_layers), router, policy))
    router.depths.values.copy_(torch.tensor([-0.4, 0.3]))
    hidden = random_states(7, 2)
    output = block(hidden, Tokens.whole_sequence(7, 2, **where))
    weights = differentiable(block)
    inputs = hidden.detach().clone().requires_grad_()
    layers = {n.removeprefix("layers."): w for n, w in weights.items() if n.startswith("layers.")}
    scorer, bars = weights["router.scorer.weights.0"], router.depths.values.tolist()

    def run(states: Tensor, oracle: reference.Block, own: dict[str, Tensor | None]):
        return by_loops(states, oracle, scorer, bars, own)

    if policy == "exit_state":
        expected = exit_state(inputs, run, layers, num_layers, config, STEPS, **where)
    else:
        oracle = reference.decoder_block(layers, num_layers, config)
        parts = [
            run(inputs[:, j : j + 1], oracle, {n: t[:, j : j + 1] for n, t in where.items()})
            for j in range(2)
        ]
        expected = reference.Recursion(
            torch.cat([p.hidden for p in parts], 1), torch.cat([p.depths for p in parts], 1)
        )
    assert torch.equal(output.depths, expected.depths)
    assert len(output.depths.unique()) >= STEPS
    torch.testing.assert_close(output.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    seed = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (output.hidden * seed).sum().backward()
    (expected.hidden * seed).sum().backward()
    torch.testing.assert_close(hidden.grad, inputs.grad, rtol=1e-4, atol=1e-4)
    wanted = oracle_gradients(weights)
    assert wanted["router.scorer.weights.0"].any()
    for name, gradient in gradients(block).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
def test_a_threshold_finds_the_quantile_at_any_scale(scale: float) -> None:
    thresholds = Thresholds(2, "depth")
    values = scale * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) + 2 * scale
    shares = torch.tensor([0.7, 0.1])
    for _ in range(40):
        # Two microbatches, whose histograms add up.
        parts = [
            torch.stack([thresholds.histogram(i, part[i], None) for i in range(2)])
            for part in values.split(2500, dim=1)
        ]
        thresholds.follow(sum(parts), shares)
    above = (values > thresholds.values[:, None]).float().mean(dim=1)
    torch.testing.assert_close(above, shares, rtol=0, atol=2e-3)


def test_an_update_goes_a_part_of_the_way_and_nowhere_without_values() -> None:
    thresholds = Thresholds(1, "depth", rate=0.3)
    values = torch.linspace(0, 10, 10001)
    thresholds.follow(thresholds.histogram(0, values, None)[None], torch.tensor([0.5]))
    assert thresholds.values.item() == pytest.approx(0.3 * 5, rel=0.02)
    before = thresholds.values.clone()
    nothing = thresholds.histogram(0, values, torch.zeros(10001, dtype=torch.bool))
    thresholds.follow(nothing[None], torch.tensor([0.5]))
    assert torch.equal(thresholds.values, before)


def real_text() -> Tensor:
    """Bytes of the documentation that ships with Python."""
    from pydoc_data.topics import topics

    return torch.tensor(list("".join(topics.values()).encode()[:300_000]))


def trained(steps: int, seed: int = 0) -> tuple[MoRTransformer, list[Tensor], Tensor, float]:
    """A small model after `steps` of Adam on real text, what its last steps ran, and its loss."""
    config = DecoderConfig(
        256, 32, 32, 8, 2,
        recursion=RecursionConfig(
            3, router=DepthAndWidth(mean_experts=1.5), kv_policy="exit_state",
            expert_routers="per_step",
        ),
        moe=MoEConfig(4, 3, balance_coefficient=0.02),
    )  # fmt: skip
    torch.manual_seed(seed)
    model, text = MoRTransformer(config), real_text()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator = torch.Generator().manual_seed(seed)
    ran, load = [], torch.zeros(3, 2, 4)
    for step in range(steps):
        starts = torch.randint(len(text) - 65, (16,), generator=generator)
        ids = torch.stack([text[i : i + 65] for i in starts])
        output = model(ids[:, :-1], labels=ids[:, 1:])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        decay.step()
        model.advance([output])
        if step >= steps - 20:
            (recursion,) = output.recursions
            ran.append(torch.stack([d.tokens.count for d in recursion.decisions]))
            load += recursion.expert_load
    return model, ran, load, output.lm_loss.item()


@pytest.fixture(scope="module")
def run():
    return trained(80)


def test_a_short_run_on_real_text_holds_what_was_asked_for(run) -> None:
    _, ran, load, loss = run
    counts = torch.stack(ran).sum(dim=0)
    torch.testing.assert_close(
        counts / counts[0], torch.tensor([1, 2 / 3, 1 / 3]), rtol=0, atol=0.02
    )
    per_token = load.sum(dim=-1) / counts[:, None]
    torch.testing.assert_close(per_token, torch.full((3, 2), 1.5), rtol=0, atol=0.1)
    assert loss < 3.6, "bytes at random cost 5.5 nats"
    share = load / load.sum(dim=-1, keepdim=True)
    assert (share > 0.02).all(), f"a dead cell: {share}"


def test_its_gates_carry_gradient(run) -> None:
    model = run[0]
    model.zero_grad()
    ids = random_ids(2, 30)
    model(ids, labels=ids).lm_loss.backward()
    gradient = model.recursions[0].router.scorer.weights[0].grad
    assert (gradient.abs().sum(dim=-1) > 0).all(), "a step's gate learns nothing"


def test_the_dial_turns_compute_and_leaves_training_alone(run) -> None:
    model, ids = run[0], real_text()[1000:1256].view(4, 64)
    before = {n: b.clone() for n, b in model.named_buffers()}

    def spent() -> tuple[float, float]:
        with torch.no_grad():
            output = model(ids)
        (recursion,) = output.recursions
        ran = sum(float(d.tokens.count) for d in recursion.decisions)
        return float(output.depths.float().mean()), float(recursion.expert_load.sum()) / (2 * ran)

    usual = spent()
    model.eval()
    try:
        settled = spent()
        turn_dial(model, depth=0.5, width=0.2)
        less = spent()
        turn_dial(model, depth=-0.5, width=-0.2)
        more = spent()
        model.train()
        assert spent() == usual
    finally:
        model.train()
        turn_dial(model)
    assert settled == usual
    assert less[0] < settled[0] < more[0]
    assert less[1] < settled[1] < more[1]
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())


def test_no_token_sees_its_future(run) -> None:
    model, ids = run[0], real_text()[:128].view(2, 64)
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before.depths[:, :40], after.depths[:, :40])
    torch.testing.assert_close(before.logits[:, :40], after.logits[:, :40], rtol=1e-4, atol=1e-5)


def test_evaluation_observes_nothing() -> None:
    model = small_model(small_config(DepthAndWidth()))
    assert model(random_ids(1, 5)).recursions[0].observations
    assert not model.eval()(random_ids(1, 5)).recursions[0].observations


def test_only_tokens_that_could_go_on_are_counted() -> None:
    config = small_config(DepthAndWidth())
    model = small_model(config)
    model.recursions[0].router.depths.values.copy_(torch.tensor([0.2, 0.0]))
    output = model(random_ids(2, 7), is_padding=PADDING.T).recursions[0]
    histograms = output.observations["depth_histograms"]
    ran = [float(d.tokens.count) for d in output.decisions]
    assert histograms.sum(dim=1).tolist() == [11, ran[1]]
    assert ran[0] == 11


def test_thresholds_keep_their_precision() -> None:
    model = small_model(small_config(DepthAndWidth())).to(torch.bfloat16)
    assert model.recursions[0].router.depths.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"continue_shares": (0.5,)}, "Use 2"),
        ({"continue_shares": (0.5, 1.0)}, r"outside \(0, 1\)"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"architecture": "deep"}, "linear, mlp"),
        ({"mean_experts": 0.5}, "mean_experts=0.5"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RecursionConfig(3, router=DepthAndWidth(**settings))


def test_a_single_step_leaves_nothing_to_plan() -> None:
    with pytest.raises(ValueError, match="num_recursions=1"):
        RecursionConfig(1, router=DepthAndWidth())


def test_a_dial_without_thresholds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth=0\.5"):
        turn_dial(small_model(small_config()), depth=0.5)
    with pytest.raises(ValueError, match=r"width=0\.5"):
        turn_dial(small_model(small_config(DepthAndWidth())), width=0.5)


def test_it_has_a_name_in_yaml() -> None:
    router = {"type": "depth_and_width", "continue_shares": [0.5, 0.25], "mean_experts": 2}
    config = from_mapping(RecursionConfig, {"num_recursions": 3, "router": router})
    assert config.router == DepthAndWidth((0.5, 0.25), 2.0)
    assert config.router.capacity_factors_for(3) == (1.0, 0.5, 0.125)
    assert config.mean_experts == (2.0, 2.0, 2.0)


def test_fixed_width_layers_work_with_it() -> None:
    config = replace(small_config(DepthAndWidth()), moe=MoEConfig(4))
    output = small_model(config)(random_ids(2, 9)).recursions[0]
    ran = torch.stack([d.tokens.count for d in output.decisions])
    assert torch.equal(output.expert_load.sum(dim=(1, 2)), 2 * ran)
