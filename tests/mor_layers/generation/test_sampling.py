"""Picking tokens, and the text they make."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor_layers.generation.sampling import (
    Sampling,
    adjusted,
    draws,
    has_distribution,
    logprobs_of,
    sample,
)
from mor_layers.generation.text_stream import TextStream


def likely_tokens(logits: torch.Tensor, settings: Sampling) -> dict[int, float]:
    """Probability of each token that may be drawn, token by token."""
    scaled = (logits.double() / settings.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    likely = math.exp(scaled[order[0]]) * settings.min_p
    order = [i for i in order if math.exp(scaled[i]) >= likely]
    order = order[: settings.top_k or len(order)]
    weights = {i: torch.tensor(scaled[i]).exp().item() for i in order}
    total, kept, below = sum(weights.values()), {}, 0.0
    for i in order:
        if below < settings.top_p:
            kept[i] = weights[i]
        below += weights[i] / total
    return {i: w / sum(kept.values()) for i, w in kept.items()}


@pytest.mark.parametrize("candidates", [4, 512])
@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.3, top_k=3),
        Sampling(1.0, top_p=0.6),
        Sampling(2.0, top_k=9, top_p=0.9),
        Sampling(1.0, top_p=1e-9),
        Sampling(0.7, min_p=0.2),
        Sampling(1.5, min_p=0.1, top_k=7, top_p=0.8),
        Sampling(1.0, min_p=1.0),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(settings, candidates, monkeypatch) -> None:
    monkeypatch.setattr(draws, "NUM_CANDIDATES", candidates)
    torch.manual_seed(0)
    logits = torch.randn(13)
    expected, count = likely_tokens(logits, settings), 4000
    drawn = sample(logits.expand(count, -1), [settings] * count, range(count))
    shares = torch.bincount(drawn, minlength=13) / count
    for token in range(13):
        assert shares[token] == pytest.approx(expected.get(token, 0.0), abs=0.03)
        assert bool(shares[token]) <= (token in expected)


def test_a_draw_depends_on_its_own_request_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 600)
    settings = [
        Sampling(1.0, seed=3),
        Sampling(),
        Sampling(0.9, top_p=0.999, seed=4),
        Sampling(1.1, top_k=5, seed=5),
        Sampling(1.0, seed=6),
    ]
    numbers = [0, 4, 7, 1, 9]
    together = sample(logits, settings, numbers)
    alone = [sample(logits[i : i + 1], settings[i : i + 1], numbers[i : i + 1]) for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[1] == logits[1].argmax()


def split_mix(seed: int, number: int) -> float:
    """The generator as its authors write it, in integers without a sign."""
    mask = (1 << 64) - 1

    def mixed(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    return (mixed((mixed(seed & mask) + (number + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) / (
        1 << 53
    )


def test_seeds_and_places_give_different_numbers() -> None:
    seeds = [*range(-30, 30), 1 << 63, 3**400]
    pairs = [(seed, number) for seed in seeds for number in (*range(30), 10**9)]
    signed = torch.tensor([(Sampling(seed=seed).signed_seed, number) for seed, number in pairs])
    bits = draws.random_bits(*signed.unbind(dim=1))
    assert bits.tolist() == [draws.random_bits(*pair) for pair in signed.tolist()]
    numbers = draws.uniform(bits).tolist()
    assert numbers == [split_mix(*pair) for pair in pairs]
    assert len(set(numbers)) == len(pairs) and all(0 <= n < 1 for n in numbers)


def drawn(logits: list[float], settings: Sampling, count: int = 200) -> set[int]:
    """Every token that comes up."""
    rows = torch.tensor(logits).expand(count, -1)
    return set(sample(rows, [settings] * count, range(count)).tolist())


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-30])
@pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_a_temperature_close_to_0_takes_the_likeliest(temperature: float, limits) -> None:
    settings = Sampling(temperature, **limits)
    assert drawn([1.0, -2.0, 1.5, 0.0], settings) == {2}
    assert drawn([-1e-30, -1.0, -3e38, -5.0], settings) == {0}
    assert drawn([3.0, -2.0, 3.0, 0.0], settings) == {0, 2}  # equally likely


@pytest.mark.parametrize("limits", [{}, {"top_k": 10**30}, {"top_p": 1.0 - 1e-16}], ids=str)
def test_a_huge_temperature_takes_all_tokens_alike(limits) -> None:
    assert drawn([3e38, -3e38, 0.0, 1.0], Sampling(1e308, **limits)) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [14, 1 << 63, 10**400], ids=["14", "2^63", "10^400"])
def test_more_candidates_than_there_are_tokens_limit_nothing(top_k: int) -> None:
    torch.manual_seed(0)
    logits, count = torch.rand(13).expand(300, -1), range(300)
    limited = sample(logits, [Sampling(1.0, top_k=top_k)] * 300, count)
    assert torch.equal(limited, sample(logits, [Sampling(1.0, top_k=13)] * 300, count))
    assert len(limited.unique()) == 13


@pytest.mark.parametrize("top_p", [5e-324, 1e-50, 1e-9])
def test_a_tiny_top_p_takes_the_likeliest(top_p: float) -> None:
    assert drawn([1.0, -2.0, 1.5, 0.0], Sampling(100.0, top_p=top_p)) == {2}


def test_tokens_that_are_ruled_out_never_come() -> None:
    ruled_out = [-torch.inf, 2.0, -torch.inf, 2.0, -torch.inf]
    for limits in ({}, {"top_k": 4}, {"top_p": 1.0 - 1e-9}):
        assert drawn(ruled_out, Sampling(5.0, **limits)) == {1, 3}


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    st.builds(
        Sampling,
        temperature=st.floats(0.0, allow_infinity=False),
        top_k=st.integers(0, 1 << 70),
        top_p=st.floats(0.0, 1.0, exclude_min=True),
        seed=st.integers(),
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_admissible_numbers_leave_the_vocabulary(logits, settings, dtype) -> None:
    rows = torch.tensor(logits).clamp(-6e4, 6e4).to(dtype)[None]
    assert 0 <= sample(rows, [settings], [0]).item() < len(logits)


def test_logits_that_are_no_distribution_are_told_apart() -> None:
    nan, inf = torch.nan, torch.inf
    rows = [[0.0, 1.0], [-inf, 1.0], [nan, 1.0], [1.0, inf], [-inf, -inf], [inf, nan]]
    assert has_distribution(torch.tensor(rows)).tolist() == [True, True] + [False] * 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 10**400},
        {"temperature": float("inf")},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"temperature": float("nan")},
    ],
)
def test_wrong_settings_are_named(arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Sampling(**arguments)


def as_bytes(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=20))
def test_text_comes_out_whole_and_in_whole_characters(text: str) -> None:
    stream = TextStream(as_bytes)
    pieces = [stream.push(i)[0] for i in text.encode()]
    assert "".join(pieces) + stream.rest() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "".join(pieces) == text


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    stream, out, is_stopped = TextStream(as_bytes, stop), "", False
    for i in text.encode():
        piece, is_stopped = stream.push(i)
        out += piece
        assert not any(s in out for s in stop)
        if is_stopped:
            break
    out += stream.rest()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert out == text and not is_stopped
        return
    seen = text[: min(ends)]  # the first moment at which one is complete
    assert is_stopped and out == seen[: min(seen.find(s) for s in stop if s in seen)]


def test_bias_and_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0]] * 5)
    settings = [
        Sampling(),
        Sampling(logit_bias=((0, -100.0), (4, 1.5))),
        Sampling(repetition_penalty=2.0),
        Sampling(presence_penalty=0.5, frequency_penalty=0.25),
        Sampling(logit_bias=((1, 2.0),), repetition_penalty=2.0, frequency_penalty=1.0),
    ]
    text = [0, 1, 1, 3, 3]  # of which the last three are generated
    changed = adjusted(logits, settings, [text] * 5, [2] * 5)
    assert changed.tolist() == [
        [2.0, -1.0, 0.5, 3.0, 0.0],
        [-98.0, -1.0, 0.5, 3.0, 1.5],
        [1.0, -2.0, 0.5, 1.5, 0.0],  # halved if positive, doubled if negative; 2 and 4 are new
        [2.0, -1.75, 0.5, 2.0, 0.0],  # 1 came once, and 3 twice; 0 is of the prompt
        [1.0, -0.5, 0.5, -0.5, 0.0],  # 1: (-1 + 2) / 2 - 1, and 3: 3 / 2 - 2
    ]
    assert logits[1].tolist() == [2.0, -1.0, 0.5, 3.0, 0.0]
    assert adjusted(logits, settings[:1] * 5, [text] * 5, [2] * 5) is logits
    (first,) = adjusted(logits[:1], [Sampling(presence_penalty=2.0)], [[3]], [1]).tolist()
    assert first == [2.0, -1.0, 0.5, 3.0, 0.0]  # nothing is generated yet


def test_logprobs_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [8.0, 8.0, 8.0]]).log()
    first, second = logprobs_of(logits, [0, 2], [2, 0])
    assert first.token == 0 and first.logprob == pytest.approx(math.log(1 / 7))
    assert [token for token, _ in first.best] == [2, 1]
    assert [p for _, p in first.best] == pytest.approx([math.log(4 / 7), math.log(2 / 7)])
    assert second.logprob == pytest.approx(math.log(1 / 3)) and second.best == ()
    assert logprobs_of(logits[:0], [], []) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"min_p": 1.1}, "min_p=1.1 must be in"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "1 is no penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be in -2..2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        Sampling(**arguments)
