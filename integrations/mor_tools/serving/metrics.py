"""What an engine counts, and the text in which Prometheus reads it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from operator import add

from mor_layers.generation import DepthBatchingEngine


@dataclass(frozen=True)
class Statistics:
    """The counters of an engine and its present state, or the sums of several engines.

    `_HELP` tells what the fields mean.
    """

    ticks: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    recursion_steps: int
    preemptions: int
    requests_finished: int
    requests_running: int
    requests_waiting: int
    kv_bytes: int
    kv_bytes_in_use: int
    kv_bytes_idle: int

    @classmethod
    def of(cls, engine: DepthBatchingEngine) -> "Statistics":
        """Those of an engine."""
        counters, caches = engine.counters, engine.caches
        return cls(
            counters.ticks,
            counters.prompt_tokens,
            counters.cached_tokens,
            counters.generated_tokens,
            counters.steps,
            counters.preemptions,
            counters.finished,
            engine.num_running,
            engine.num_waiting,
            caches.num_bytes,
            caches.num_bytes_in_use,
            caches.num_bytes_idle,
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*map(add, self._values(), other._values()))

    def _values(self) -> Iterator[int]:
        return (getattr(self, field.name) for field in fields(self))


_HELP = {
    "ticks": "Runs of the shared block.",
    "prompt_tokens": "Prompt tokens computed.",
    "cached_prompt_tokens": "Prompt tokens that were in the cache and therefore not computed.",
    "generated_tokens": "Tokens generated.",
    "recursion_steps": "Recursion steps run by tokens.",
    "preemptions": "Preempted sequences.",
    "requests_finished": "Finished requests.",
    "requests_running": "Running requests.",
    "requests_waiting": "Waiting requests.",
    "kv_bytes": "Bytes of the key-value cache.",
    "kv_bytes_in_use": "Bytes of its pages in use.",
    "kv_bytes_idle": "Bytes of its pages that keep prefixes which no running request uses.",
}
_GAUGES = {
    "requests_running",
    "requests_waiting",
    "kv_bytes",
    "kv_bytes_in_use",
    "kv_bytes_idle",
}


def prometheus(statistics: Statistics, answers: Mapping[int, int]) -> str:
    """All metrics in the text format of Prometheus.

    Args:
        answers: number of responses by HTTP status.
    """
    lines = []
    for field, text in _HELP.items():
        is_gauge = field in _GAUGES
        name = f"mor_{field}" if is_gauge else f"mor_{field}_total"
        lines += _head(name, "gauge" if is_gauge else "counter", text)
        lines.append(f"{name} {getattr(statistics, field)}")
    lines += _head("mor_answers_total", "counter", "Responses by status.")
    lines += [f'mor_answers_total{{status="{s}"}} {n}' for s, n in sorted(answers.items())]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
