"""How many operations a tick takes, which is what it costs in a model of tiny layers."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, Sampling
from tests.mor_layers.generation.served import prompt
from tests.mor_layers.generation.test_engine import model_for

MOST = 530
"""Operations of a tick of the engine below, with those of its three layers: 510 when this test was
written, and a few more. Only raise it for something that is worth its time."""


class Counter(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_tick(num_requests: int) -> int:
    """The least of several ticks in which all requests generate, by expert choice in three steps."""
    model = model_for("expert_choice", "recursive_sharing", "middle_cycle")
    engine = DepthBatchingEngine(model, CacheSettings(1 << 20, num_slots=12, max_length=64))
    for number in range(num_requests):
        engine.submit(Request(prompt(2, number), 40, Sampling(1.0, seed=number)))
    for _ in range(9):
        engine.step()
    counts = []
    for _ in range(6):
        with Counter() as counter:
            engine.step()
        counts.append(counter.count)
    return min(counts)


def test_a_tick_takes_few_operations_however_many_requests_there_are() -> None:
    few, many = operations_of_a_tick(3), operations_of_a_tick(12)
    assert many <= MOST
    assert many - few < 100, "more tokens are more steps with tokens, and nothing else"
