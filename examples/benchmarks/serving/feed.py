"""The same stream of requests for any engine, and what an engine makes of it.

Pure Python: the process of another engine, in an environment of its own, runs this file too. Requests
arrive as fast as the engine finishes them, so a fixed number of them is always in flight. The first ones
arrive half written, as in a server that has run for long: their ages are drawn evenly.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Engine(Protocol):
    """What `Feed` needs of an engine."""

    @property
    def num_running(self) -> int:
        """Requests that hold a place."""
        ...

    def submit(self, number: int, ids: Sequence[int], new_tokens: int) -> None:
        """Take a request, to which exactly so many tokens are generated."""

    def step(self) -> list[int]:
        """Run one tick. Returns the numbers of requests, once for each token that they got."""
        ...


@dataclass(frozen=True)
class Requests:
    """What is asked of each engine."""

    shortest_prompt: int
    longest_prompt: int
    """Lengths between these are equally likely."""
    new_tokens: int
    """Tokens generated for each."""
    vocabulary: int
    in_flight: int
    """Requests at a time."""
    waiting: int = 0
    """Requests that wait for a place, where the engine fills places itself."""

    @property
    def prompt(self) -> float:
        """Mean length of the prompts."""
        return (self.shortest_prompt + self.longest_prompt) / 2

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its continuation, at most."""
        return self.longest_prompt + self.new_tokens


@dataclass(frozen=True)
class Turn:
    """What an engine did while it had the processor."""

    tokens: int
    """Generated tokens."""
    seconds: float
    """Processor time, or that of the wall where a GPU works."""
    passed: float
    """Time of the wall."""
    ticks: int
    in_flight: float
    """Requests, in the mean over ticks."""
    waits: tuple[float, ...]
    """Seconds from arrival to the first token, of requests that got theirs in this turn. Time in which
    the engine had to pause for others does not count."""

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


class Feed:
    """Keeps an engine busy.

    Args:
        clock: returns seconds, of the processor or of the wall.
        seed: other seeds, other requests.
    """

    def __init__(
        self, engine: Engine, requests: Requests, clock: Callable[[], float], seed: int = 0
    ) -> None:
        self.engine, self.requests, self.clock = engine, requests, clock
        self._random, self._submitted, self._elapsed = random.Random(seed), 0, 0.0
        self._missing: dict[int, int] = {}  # tokens that each open request still gets
        self._arrived: dict[int, float] = {}  # those that have none yet

    @property
    def open(self) -> list[int]:
        """Numbers of the requests that still get tokens."""
        return list(self._missing)

    def run(self, tokens: int) -> Turn:
        """Generate at least so many tokens."""
        began, passed = self.clock(), time.perf_counter()
        before, waits, in_flight, done = self._elapsed, list[float](), list[int](), 0
        while done < tokens:
            numbers = self.tick()
            self._elapsed = before + self.clock() - began
            arrived = (self._arrived.pop(number, None) for number in numbers)
            waits += [self._elapsed - moment for moment in arrived if moment is not None]
            done += len(numbers)
            in_flight.append(self.engine.num_running)
        seconds = self._elapsed - before
        passed = time.perf_counter() - passed
        mean = statistics.mean(in_flight)
        return Turn(done, seconds, passed, len(in_flight), mean, tuple(waits))

    def tick(self) -> list[int]:
        """One step of the engine, with all places taken. Returns what the step does."""
        self._fill()
        numbers = self.engine.step()
        for number in numbers:
            self._missing[number] -= 1
            if not self._missing[number]:
                del self._missing[number]
        return numbers

    def _fill(self) -> None:
        wanted = self.requests
        while len(self._missing) < wanted.in_flight + wanted.waiting:
            number, new = self._submitted, wanted.new_tokens
            size = self._random.randint(wanted.shortest_prompt, wanted.longest_prompt)
            if number < wanted.in_flight:
                age = self._random.randrange(new)
                size, new = size + age, new - age
            else:  # one that arrives half written had its first token long ago
                self._arrived[number] = self._elapsed
            ids = [self._random.randrange(wanted.vocabulary) for _ in range(size)]
            self.engine.submit(number, ids, new)
            self._missing[number] = new
            self._submitted += 1
