"""Distillation against loops over tokens, forward and backward, and what its settings refuse."""

import math
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from torch import Tensor

from mor_layers import ExpertChoice, MoRTransformer, RecursionConfig, TokenChoice
from mor_layers.training import Batch, Distillation, Distiller, Healing, heal
from mor_layers.training.distillation import hidden_distance, logits_divergence, recorded_states
from mor_layers.weights import recursive_weights
from tests.mor_layers.small_models import plain_config, random_ids, small_config, small_model


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def divergence_of_a_token(
    student: Tensor, teacher: Tensor, temperature: float, top_k: int | None
) -> Tensor:
    """`T² Σ_v p (log p - log q)`, one number of the vocabulary after the other."""
    kept = sorted(range(len(teacher)), key=lambda v: -teacher[v].item())[: top_k or len(teacher)]
    of_teacher = sum(math.exp(teacher[v].item() / temperature) for v in kept)
    of_student = sum((q / temperature).exp() for q in student)
    total = torch.zeros((), dtype=student.dtype)
    for v in kept:
        p = math.exp(teacher[v].item() / temperature) / of_teacher
        total = total + p * (math.log(p) - ((student[v] / temperature).exp() / of_student).log())
    return temperature**2 * total


def distance_of_a_token(student: Tensor, teacher: Tensor, measure: str) -> Tensor:
    if measure == "mse":
        squares = [(s - t) ** 2 for s, t in zip(student, teacher, strict=True)]
        return torch.stack(squares).sum() / len(student)
    product = sum(s * t for s, t in zip(student, teacher, strict=True))
    lengths = [sum(x * x for x in vector) ** 0.5 for vector in (student, teacher)]
    return 1 - product / (lengths[0] * lengths[1])


@pytest.mark.parametrize("top_k", [None, 1, 3, 9])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(3, 2, 7), (1, 1, 1), (0, 2, 5)])
def test_divergence_is_the_loop_over_the_vocabulary(shape, temperature, top_k):
    student, teacher = values(*shape), values(*shape, seed=1)
    fast = logits_divergence(student, teacher, temperature, top_k)
    assert fast.shape == shape[:-1]
    pairs = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    slow = [divergence_of_a_token(s, t, temperature, top_k) for s, t in pairs]
    if not slow:
        return
    slow = torch.stack(slow).view(shape[:-1])
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    weight = values(*shape[:-1], seed=2).detach()
    grads = [torch.autograd.grad((d * weight).sum(), student)[0] for d in (fast, slow)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_a_student_that_equals_its_teacher_is_at_no_distance():
    logits = values(4, 6)
    for temperature in (1.0, 3.0):
        assert logits_divergence(logits, logits, temperature).abs().max() < 1e-6
    for measure in ("cosine", "mse"):
        assert hidden_distance(logits, logits, measure).abs().max() < 1e-6


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_distance_of_states_is_the_loop_over_their_numbers(measure):
    student, teacher = values(3, 2, 5), values(3, 2, 5, seed=1)
    fast = hidden_distance(student, teacher, measure)
    pairs = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    slow = torch.stack([distance_of_a_token(s, t, measure) for s, t in pairs]).view(3, 2)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(d.sum(), student)[0] for d in (fast, slow)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def states_by_hand(model: MoRTransformer, ids: Tensor) -> list[Tensor]:
    """`[s b h]` behind each layer of a plain decoder."""
    from mor_layers import StepContext, Tokens
    from mor_layers.models.layers import Rotary

    context = StepContext(0, Tokens.whole_sequence(*ids.T.shape))
    config = model.config
    rotary = Rotary.at(context.tokens.positions, config.head_size, config.rope_base, torch.float32)
    hidden, states = model.embedding(ids.T), []
    for layer in model.recursions[0].layers.layers:
        hidden = layer(hidden, context, rotary)
        states.append(hidden)
    return states


SETTINGS = Distillation(
    language_model_coefficient=0.5,
    logits_coefficient=2.0,
    temperature=2.0,
    top_k=5,
    hidden_coefficient=3.0,
    hidden_depths=((1, 1), (4, 4), (5, 2)),
)


@pytest.mark.parametrize("measure", ["cosine", "mse"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [12, 8])
def test_the_loss_and_its_gradients_are_those_of_loops_over_tokens(width, masked, measure):
    settings = replace(SETTINGS, hidden_measure=measure)
    teacher = small_model(replace(plain_config(5), hidden_size=width), seed=1)
    student = small_model(plain_config(5))
    distiller = Distiller(teacher, student.config, settings)
    ids, labels = random_ids(2, 6), random_ids(2, 6, seed=1)
    is_padding = None
    if masked:
        is_padding = torch.zeros(2, 6, dtype=torch.bool)
        is_padding[0, 4:] = True
        labels[1, 2] = -1
    found = distiller(student, ids, labels, is_padding=is_padding)

    counted = [
        (b, s)
        for b in range(2)
        for s in range(6)
        if labels[b, s] >= 0 and not (masked and is_padding[b, s])
    ]
    assert len(counted) == (9 if masked else 12)
    # Padding follows all real tokens, so that these are the same with it and without.
    logits, targets = student(ids).logits, teacher(ids).logits
    ours, theirs = states_by_hand(student, ids), states_by_hand(teacher, ids)
    lm = sum(-logits[p].log_softmax(-1)[labels[p]] for p in counted) / len(counted)
    kl = sum(divergence_of_a_token(logits[p], targets[p], 2.0, 5) for p in counted) / len(counted)
    apart = 0.0
    for (own, other), projection in zip(settings.hidden_depths, distiller.projections, strict=True):
        for b, s in counted:
            pair = projection(ours[own - 1][s, b]), theirs[other - 1][s, b]
            apart = apart + distance_of_a_token(*pair, measure) / (3 * len(counted))
    expected = 0.5 * lm + 2.0 * kl + 3.0 * apart
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
    parameters = [*student.parameters(), *distiller.projections.parameters()]
    grads = [
        torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found.loss, expected)
    ]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("ends", [None, (2, 3)])
@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_states_of_a_recursion_are_those_of_the_unrolled_model(sharing, ends):
    """One recursion's states at each depth are a plain model's of the same layers, repeated."""
    student = small_model(small_config(sharing=sharing, block_size=2, ends=ends))
    from mor_layers.weights import unrolled_layers

    plain = small_model(plain_config(student.config.num_unrolled_layers))
    weights = dict(student.state_dict())
    with torch.no_grad():
        for name in ("embedding.weight", "norm.weights.0", "output.weight"):
            plain.state_dict()[name].copy_(weights[name])
        for depth, (layer, _) in enumerate(unrolled_layers(student.config)):
            target = plain.recursions[0].layers.layers[depth]
            target.load_state_dict(student.get_submodule(layer).state_dict())
    ids = random_ids(2, 5)
    depths = range(1, student.config.num_unrolled_layers + 1)
    with recorded_states(student, depths) as found:
        student(ids)
    student(ids)  # no longer recorded
    assert sorted(found) == list(depths)
    for depth, expected in zip(depths, states_by_hand(plain, ids), strict=True):
        torch.testing.assert_close(found[depth].hidden, expected, rtol=1e-5, atol=1e-5)


def test_routed_tokens_are_matched_where_they_stand():
    """At a deeper step few tokens run, and only theirs are compared with the teacher's."""
    student = small_model(small_config(ExpertChoice(alpha=0.7)))
    teacher = small_model(plain_config(5), seed=1)
    settings = Distillation(
        logits_coefficient=0, hidden_coefficient=1.0, hidden_depths=((4, 4),), hidden_measure="mse"
    )
    ids, labels = random_ids(2, 6), random_ids(2, 6, seed=1)
    labels[:, 1] = -1
    with recorded_states(student, [4]) as found:
        student(ids)
    state = found[4]
    assert state.hidden.shape[0] == 2  # a third of 6
    theirs = states_by_hand(teacher, ids)[3]
    expected, number = 0.0, 0
    for row, column in ((r, c) for r in range(2) for c in range(2)):
        place = int(state.tokens.positions[row, column])
        if labels[column, place] >= 0:
            pair = state.hidden[row, column], theirs[place, column]
            expected, number = expected + distance_of_a_token(*pair, "mse"), number + 1
    found_loss = Distiller(teacher, student.config, settings)(student, ids, labels).parts["hidden"]
    torch.testing.assert_close(found_loss, expected / max(1, number))


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_rows_that_a_ragged_selection_pads_do_not_count(measure):
    """With token-choice each sequence has another number of tokens at a deeper step."""
    student = small_model(small_config(TokenChoice()), seed=3)
    teacher = small_model(plain_config(5), seed=1)
    settings = Distillation(
        logits_coefficient=0,
        hidden_coefficient=1.0,
        hidden_depths=((4, 3),),
        hidden_measure=measure,
    )
    ids, labels = random_ids(3, 8), random_ids(3, 8, seed=1)
    labels[0, :3] = -1
    with recorded_states(student, [4]) as found:
        depths = student(ids).depths
    theirs = states_by_hand(teacher, ids)[2]
    apart = []
    for row in range(3):
        # Those that run step 3, the fourth layer, in order; whoever is left of the rows is padding.
        places = [place for place in range(8) if depths[row, place] >= 3]
        for place, own in zip(places, found[4].hidden[:, row], strict=False):
            if labels[row, place] >= 0:
                apart.append(distance_of_a_token(own, theirs[place, row], measure))
    numbers = (depths >= 3).sum(dim=1)
    assert numbers.min() < numbers.max()
    distilled = Distiller(teacher, student.config, settings)(student, ids, labels)
    expected = torch.stack(apart).mean()
    torch.testing.assert_close(distilled.parts["hidden"], expected, rtol=1e-5, atol=1e-6)
    parameters = [*student.prelude.parameters(), *student.recursions.parameters()]
    grads = [
        torch.autograd.grad(value, parameters, allow_unused=True)
        for value in (distilled.parts["hidden"], expected)
    ]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_recomputation_changes_neither_loss_nor_gradients():
    teacher, ids = small_model(plain_config(5), seed=1), random_ids(2, 6)
    grads = []
    for recompute in (False, True):
        student = small_model(small_config(), recompute=recompute)
        Distiller(teacher, student.config, SETTINGS)(student, ids, ids).loss.backward()
        grads.append([p.grad for p in student.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"logits_coefficient": -1.0}, "must be at least 0"),
        ({"logits_coefficient": 0.0}, "leave nothing to learn"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"hidden_coefficient": 1.0}, "go together"),
        ({"hidden_depths": ((1, 1),)}, "go together"),
        ({"hidden_measure": "l1"}, "Use one of cosine, mse"),
        (
            {
                "logits_coefficient": 0.0,
                "hidden_coefficient": 1.0,
                "hidden_depths": ((1, 1),),
                "top_k": 3,
            },
            "have no effect",
        ),
    ],
)
def test_settings_that_cannot_be_are_answered(settings, answer):
    with pytest.raises(ValueError, match=answer):
        Distillation(**settings)


def test_a_teacher_that_does_not_fit_is_answered():
    teacher = small_model(plain_config(3))
    with pytest.raises(ValueError, match="They must share a tokenizer"):
        Distiller(teacher, replace(small_config(), vocab_size=18), Distillation())
    with pytest.raises(ValueError, match="the depths of the teacher are 1 to 3"):
        Distiller(teacher, small_config(), SETTINGS)


def healed(distillation: Distillation | None, steps: int = 8) -> list[float]:
    """Loss of each step of a student made from a dense teacher, on one batch."""
    teacher = small_model(plain_config(8))
    recursion = RecursionConfig(3)
    config, weights = recursive_weights(teacher.state_dict(), teacher.config, recursion, "average")
    student = MoRTransformer(config)
    student.load_state_dict(dict(weights))
    distiller = None if distillation is None else Distiller(teacher, config, distillation)
    ids = random_ids(4, 9)
    batches = repeat(Batch(ids[:, :-1], ids[:, 1:]))
    run = heal(student, batches, Healing(steps, 3e-3, warmup_steps=2, decay_steps=2), distiller)
    rows = list(run)
    assert [row.number for row in rows] == list(range(1, steps + 1))
    assert set(rows[0].parts) == (set() if distillation is None else {"logits"})
    return [row.loss if distillation is None else row.parts["logits"] for row in rows]


@pytest.mark.parametrize("distillation", [None, Distillation(language_model_coefficient=0.0)])
def test_healing_comes_closer_to_the_text_or_to_the_teacher(distillation):
    losses = healed(distillation)
    assert losses[-1] < 0.9 * losses[0]


def test_healing_follows_its_schedule_and_ends_with_its_batches():
    settings = Healing(6, 1.0, warmup_steps=1, decay_steps=2)
    rates = [settings.learning_rate_at(step) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 2 / 3, 1 / 3])
    model, ids = small_model(plain_config(2)), random_ids(1, 5)
    with pytest.raises(ValueError, match="end after 2 of steps=6"):
        list(heal(model, iter([Batch(ids, ids)] * 2), Healing(6)))
    with pytest.raises(ValueError, match="do not fit into steps=1"):
        Healing(1, warmup_steps=2)
    with torch.no_grad():
        model.output.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        list(heal(model, iter([Batch(ids, ids)]), Healing(1)))
