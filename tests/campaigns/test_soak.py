"""A soak in small: all kinds of calls, and that a server that does wrong is noticed."""

from collections.abc import Iterator

import pytest

from mor_layers.generation import Event
from tests.campaigns.soak import KINDS, Soak, server
from tests.mor_tools.serving.running import Running


@pytest.fixture
def small() -> Iterator[Running]:
    own = server()
    yield own
    own.stop()


def soaked(own: Running, count: int, num_bodies: int = 40) -> Soak:
    soak = Soak(own, count, num_bodies=num_bodies)
    soak.run()
    assert sum(soak.endings.values()) == count
    return soak


def test_all_kinds_of_calls_end_well(small: Running) -> None:
    soak = soaked(small, 80, num_bodies=10)
    assert not soak.failures
    assert {kind for kind, _ in soak.endings} == set(KINDS)
    assert {ending for _, ending in soak.endings} >= {"answered", "left", "400", "504"}


@pytest.mark.full
def test_a_wrong_text_and_a_page_that_is_left_over_are_noticed(small: Running, monkeypatch) -> None:
    step, caches = small.engine.step, small.engine.caches

    def wrong() -> list[Event]:
        events = step()
        for event in events:
            if event.number % 7 == 3 and event.text:
                object.__setattr__(event, "text", "?")
        return events

    monkeypatch.setattr(small.engine, "step", wrong)
    monkeypatch.setattr(type(caches), "num_bytes_in_use", property(lambda _: 4096))
    monkeypatch.setattr(small, "wait_until_idle", lambda: None)
    soak = soaked(small, 30, num_bodies=5)
    assert any("instead of" in failure for failure in soak.failures)
    assert "4096 bytes of the cache are left" in soak.failures


@pytest.mark.full
def test_a_soak_of_two_thousand_calls(small: Running) -> None:
    assert not soaked(small, 2000).failures
    assert small.engine.counters.preemptions > 0
