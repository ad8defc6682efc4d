"""Who runs next, with numbers worked out by hand."""

import pytest

from mor_layers.generation import Request, scheduling
from mor_layers.generation.scheduling import Progress, Scheduler

PAGE = 4
"""Tokens a page holds, in these tests."""


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pages(length: int) -> tuple[int, int]:
    """Two kinds of pages: one row a token, and one for every second token."""
    return -(-length // PAGE), -(-(length // 2) // PAGE)


def scheduler(slots: int = 4, budgets: tuple[int, int] = (10, 10), **given) -> Scheduler:
    settings = {"chunk_size": 8, "tokens_per_tick": 100, "clock": Time()} | given
    return Scheduler(slots, budgets, pages, **settings)


def submit(scheduler: Scheduler, prompt: int, new: int = 1, client: str = "", **given) -> Progress:
    return scheduler.submit(Request((7,) * prompt, new, client=client, **given))


def running(scheduler: Scheduler) -> list[int]:
    return sorted(progress.number for progress in scheduler.running.values())


def waiting(scheduler: Scheduler) -> list[int]:
    return sorted(progress.number for progress in scheduler.waiting)


def finish_spans(scheduler: Scheduler, generates: bool = True) -> None:
    """What the engine does when all spans in flight have gone through the model."""
    for progress in scheduler.running.values():
        if progress.in_flight:
            progress.in_flight = 0
            if generates and not progress.num_left:
                progress.tokens.append(1)


def test_a_shared_prefix_is_neither_run_nor_promised_again() -> None:
    own = scheduler(budgets=(10, 10))
    first, second, third = (submit(own, prompt=16, new=5) for _ in range(3))  # 5 + 3 pages each
    assert own.admit((10, 10)) == [first, second]
    own.share(second, [2] * 12)
    assert own.admit((10, 10)) == []  # 5 + 2 + 5
    own.share(first, [1] * 8)
    assert own.admit((10, 10), borrowed=(1, 0)) == []  # 1 + 3 + 2 + 5
    assert own.admit((10, 10)) == [third]
    spans = own.plan(held={third.slot})
    assert [(span.slot, span.start, len(span.ids)) for span in spans] == [
        (first.slot, 8, 8),
        (second.slot, 12, 4),
    ]
    assert second.depths == [2] * 12 and second.num_shared == 12
    for progress in (first, second, third):
        own.leave(progress)
    assert own._promised == [0, 0]


def test_slots_are_given_in_order_of_submission() -> None:
    own = scheduler(slots=2)
    for _ in range(4):
        submit(own, prompt=1)
    own.admit((10, 10))
    assert running(own) == [0, 1] and waiting(own) == [2, 3]
    own.leave(own.running[next(iter(own.running))])
    own.admit((10, 10))
    assert running(own) == [1, 2] and waiting(own) == [3]


def test_admission_counts_the_pages_that_whole_texts_are_expected_to_take() -> None:
    own = scheduler(budgets=(10, 10))
    # 13 + 4 - 1 = 16 tokens whose keys are kept: 4 pages of the first kind. Three take 12 of 10.
    for _ in range(3):
        submit(own, prompt=13, new=4)
    own.admit((10, 10))
    assert running(own) == [0, 1]
    submit(own, prompt=1)  # 1 page would fit, but nobody overtakes
    own.admit((10, 10))
    assert running(own) == [0, 1] and waiting(own) == [2, 3]
    own.leave(next(p for p in own.running.values() if p.number == 0))
    own.admit((10, 10))
    assert running(own) == [1, 2, 3]  # 4 + 4 + 1 of 10


def test_the_scarcer_kind_of_page_decides() -> None:
    own = scheduler(budgets=(10, 3))
    # 16 tokens: 4 pages of the first kind, 2 of the second. Two would take 8 of 10 and 4 of 3.
    for _ in range(2):
        submit(own, prompt=13, new=4)
    own.admit((10, 3))
    assert running(own) == [0]


def test_admission_needs_free_pages_for_what_is_known() -> None:
    own = scheduler(budgets=(10, 10))
    submit(own, prompt=1, new=4)  # expected to take 1 page ...
    own.admit((10, 10))
    submit(own, prompt=12, new=1)  # 3 pages for the prompt, and 1 + 3 of 10 are expected
    own.admit((2, 10))  # ... but it has taken 8
    assert running(own) == [0]
    own.admit((3, 10))
    assert running(own) == [0, 1]


def test_free_pages_are_counted_once_for_all_who_are_admitted_together() -> None:
    own = scheduler(budgets=(10, 10))
    for _ in range(3):
        submit(own, prompt=8)  # 2 pages each
    own.admit((5, 10))
    assert running(own) == [0, 1]


def test_where_nothing_runs_the_first_is_admitted_whatever_it_takes() -> None:
    own = scheduler()
    submit(own, prompt=12)
    own.admit((0, 0))
    assert running(own) == [0]


def test_what_exceeds_the_whole_cache_is_refused_with_the_numbers() -> None:
    own = scheduler(budgets=(3, 10))
    submit(own, prompt=9, new=4)  # 12 tokens, 3 pages
    with pytest.raises(ValueError, match=r"13 tokens is expected to need \(4, 2\).*\(3, 10\)"):
        submit(own, prompt=9, new=5)


def test_generated_tokens_go_before_prompts_and_prompts_in_chunks() -> None:
    own = scheduler(chunk_size=4, tokens_per_tick=6)
    submit(own, prompt=10)
    submit(own, prompt=1, new=3)
    own.admit((10, 10))
    slot_of = {progress.number: slot for slot, progress in own.running.items()}
    # One token is known of request 1, like one that was generated: it goes first.
    plans = []
    for _ in range(3):
        spans = own.plan()
        plans.append([(span.slot, span.start, len(span.ids), span.is_last) for span in spans])
        finish_spans(own)
    long, short = slot_of[0], slot_of[1]
    assert plans == [
        [(short, 0, 1, True), (long, 0, 4, False)],
        [(short, 1, 1, True), (long, 4, 4, False)],
        [(short, 2, 1, True), (long, 8, 2, True)],
    ]


def test_a_tick_takes_no_more_tokens_than_it_may() -> None:
    own = scheduler(chunk_size=4, tokens_per_tick=6)
    for _ in range(3):
        submit(own, prompt=4)
    own.admit((10, 10))
    assert [len(span.ids) for span in own.plan()] == [4, 2]
    # The others are in flight, so the third begins although the second is not through.
    assert [len(span.ids) for span in own.plan()] == [4]
    assert own.plan() == []


def test_the_youngest_gives_way_and_waits_before_those_who_came_later() -> None:
    own = scheduler(slots=3)
    for _ in range(5):
        submit(own, prompt=4)
    own.admit((10, 10))
    own.plan()
    finish_spans(own)
    last = own.last()
    assert last is not None and last.number == 2
    own.preempt(last)
    assert running(own) == [0, 1] and waiting(own) == [2, 3, 4]
    own.admit((10, 10))
    assert running(own) == [0, 1, 2] and waiting(own) == [3, 4]
    # It begins again, with the token that it had generated: 4 + 1 tokens.
    (span,) = [span for span in own.plan() if span.slot == last.slot]
    assert (span.start, span.ids) == (0, [7, 7, 7, 7, 1])


def test_what_gave_way_no_longer_counts_against_the_budget() -> None:
    own = scheduler(slots=3, budgets=(10, 10))
    for _ in range(2):
        submit(own, prompt=13, new=4)  # 4 pages each
    own.admit((10, 10))
    last = own.last()
    assert last is not None
    own.preempt(last)
    own.leave(last)  # given up while it waits
    submit(own, prompt=20, new=5)  # 24 tokens, 6 pages: 4 + 6 of 10
    own.admit((10, 10))
    assert running(own) == [0, 2] and waiting(own) == []


def test_the_only_one_does_not_give_way() -> None:
    own = scheduler()
    submit(own, prompt=1)
    own.admit((10, 10))
    assert own.last() is None


def test_requests_are_overdue_from_their_deadline_on_wherever_they_are() -> None:
    clock = Time()
    own = scheduler(slots=1, clock=clock)
    submit(own, prompt=1, timeout=2.0)
    submit(own, prompt=1, timeout=1.0)
    own.admit((10, 10))
    clock.now = 0.5
    assert own.overdue() == []
    clock.now = 1.0
    assert [p.number for p in own.overdue()] == [1]
    clock.now = 2.0
    assert sorted(p.number for p in own.overdue()) == [0, 1]


def test_the_client_that_runs_least_comes_next() -> None:
    own = scheduler(slots=3)
    for _ in range(4):
        submit(own, prompt=1, client="many")
    submit(own, prompt=1, client="one")
    own.admit((10, 10))
    # After the first of "many", "one" runs least; then "many" again.
    assert running(own) == [0, 1, 4]


def test_who_runs_more_than_its_share_gives_way_in_time() -> None:
    clock = Time()
    own = scheduler(slots=4, clock=clock)
    for _ in range(6):
        submit(own, prompt=1, client="many")
    own.admit((10, 10))
    clock.now = 5.0
    for _ in range(3):
        submit(own, prompt=1, client="one")
    own.admit((10, 10))
    clock.now = 5.9
    assert own.unfair() is None  # a place may come free by itself
    clock.now = 6.0
    gave_way = []
    while (progress := own.unfair()) is not None:
        gave_way.append(progress.number)
        own.preempt(progress)
        own.admit((10, 10))
    # 4 to 0 becomes 3 to 1 and 2 to 2, where it ends: a third would be 1 to 3.
    assert gave_way == [3, 2] and running(own) == [0, 1, 6, 7]
    assert waiting(own) == [2, 3, 4, 5, 8]


def test_a_difference_of_one_is_fair() -> None:
    clock = Time()
    own = scheduler(slots=3, clock=clock)
    for client in ("first", "first", "second", "second"):
        submit(own, prompt=1, client=client)
    own.admit((10, 10))
    assert running(own) == [0, 1, 2]
    clock.now = 100.0
    assert own.unfair() is None


def test_pages_are_taken_from_the_client_that_runs_most() -> None:
    own = scheduler(slots=4)
    for client in ("one", "many", "many", "other"):
        submit(own, prompt=1, client=client)
    own.admit((10, 10))
    assert running(own) == [0, 1, 2, 3]
    last = own.last()
    assert last is not None and last.number == 2


def generate(scheduler: Scheduler, tokens: int) -> None:
    """Every running request generates so many tokens."""
    for _ in range(tokens):
        scheduler.plan()
        finish_spans(scheduler)


def test_long_requests_of_one_client_take_turns_with_a_short_one(monkeypatch) -> None:
    monkeypatch.setattr(scheduling, "TURN", 6)
    clock = Time()
    own = scheduler(slots=2, budgets=(100, 100), clock=clock)
    for prompt in (2, 7, 1):
        submit(own, prompt=prompt, new=30, client="one")
    short = submit(own, prompt=1, new=1, client="one")
    own.admit((100, 100))
    generate(own, 5)
    clock.now = 1.0
    assert running(own) == [0, 1] and own.unfair() is None  # 5 tokens are no turn
    generate(own, 1)
    first = own.unfair()
    assert first is not None and first.number == 0  # the turn of 1 has 7 tokens, like its prompt
    own.preempt(first)
    own.admit((100, 100))
    assert running(own) == [1, 2] and own.unfair() is None
    generate(own, 1)
    second = own.unfair()
    assert second is not None and second.number == 1
    own.preempt(second)
    own.admit((100, 100))
    assert running(own) == [2, 3] and short.slot is not None
    # Those that gave way have waited for no time yet, and come in the order in which they did.
    generate(own, 8)
    assert own.unfair() is None
    clock.now = 2.0
    third = own.unfair()
    assert third is not None and third.number == 2
    own.preempt(third)
    own.admit((100, 100))
    assert running(own) == [0, 3] and first.num_known == 8


def test_turns_pass_between_clients_with_one_request_each(monkeypatch) -> None:
    monkeypatch.setattr(scheduling, "TURN", 6)
    clock = Time()
    own = scheduler(slots=2, budgets=(100, 100), clock=clock)
    for client in ("a", "b", "c"):
        submit(own, prompt=1, new=30, client=client)
    own.admit((100, 100))
    generate(own, 6)
    clock.now = 1.0
    gave_way = own.unfair()
    assert gave_way is not None and gave_way.number == 0
    own.preempt(gave_way)
    own.admit((100, 100))
    assert running(own) == [1, 2]


def test_requests_without_a_client_are_served_in_order(monkeypatch) -> None:
    monkeypatch.setattr(scheduling, "TURN", 6)
    clock = Time()
    own = scheduler(slots=2, budgets=(100, 100), clock=clock)
    for _ in range(3):
        submit(own, prompt=1, new=30)
    own.admit((100, 100))
    generate(own, 20)
    clock.now = 100.0
    assert own.unfair() is None
    last = own.last()
    assert last is not None
    own.preempt(last)
    own.admit((100, 100))
    assert running(own) == [0, 1]


def test_a_client_orders_its_own_requests_by_priority() -> None:
    own = scheduler(slots=2)
    for client, priority in (("a", 1), ("a", 0), ("b", 5), ("a", -1)):
        submit(own, prompt=1, client=client, priority=priority)
    own.admit((10, 10))
    # The best of "a", then "b", which runs nothing yet, whatever its priority.
    assert running(own) == [2, 3]


def test_only_prompts_that_are_scored_need_all_logits() -> None:
    own = scheduler(slots=2)
    scored = submit(own, prompt=10, new=4, num_logprobs=0, prompt_logprobs=True)
    submit(own, prompt=3, new=4, num_logprobs=0)
    own.admit((10, 10))
    assert [span.needs_all_logits for span in own.plan()] == [True, False]
    finish_spans(own)
    assert [span.needs_all_logits for span in own.plan()] == [False, True]
    finish_spans(own)
    assert scored.num_generated == 1
    own.preempt(scored)  # its prompt is computed again, but has been scored
    own.admit((10, 10))
    assert not any(span.needs_all_logits for span in own.plan())
