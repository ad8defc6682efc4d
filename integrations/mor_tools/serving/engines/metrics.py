"""What an engine counts, and the text in which Prometheus reads it."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from operator import add
from typing import Any

from mor_layers.generation import DepthBatchingEngine


def _counter(text: str) -> Any:
    return field(default=0, metadata={"kind": "counter", "help": text})


def _gauge(text: str) -> Any:
    return field(default=0, metadata={"kind": "gauge", "help": text})


@dataclass(frozen=True)
class Statistics:
    """What an engine has counted, and its present state; or the sums of several engines."""

    ticks: int = _counter("Runs of the shared block.")
    prompt_tokens: int = _counter("Prompt tokens computed.")
    cached_prompt_tokens: int = _counter(
        "Prompt tokens that were in the cache and therefore not computed."
    )
    generated_tokens: int = _counter("Tokens generated.")
    recursion_steps: int = _counter("Recursion steps run by tokens.")
    preemptions: int = _counter("Preempted sequences.")
    requests_finished: int = _counter("Finished requests.")
    requests_running: int = _gauge("Running requests.")
    requests_waiting: int = _gauge("Waiting requests.")
    kv_bytes: int = _gauge("Bytes of the key-value cache.")
    kv_bytes_in_use: int = _gauge("Bytes of its pages in use.")
    kv_bytes_idle: int = _gauge(
        "Bytes of its pages that keep prefixes which no running request uses."
    )

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
        return Statistics(*map(add, astuple(self), astuple(other)))


def prometheus(statistics: Statistics, answers: Mapping[int, int]) -> str:
    """All metrics in the text format of Prometheus.

    Args:
        answers: number of responses by HTTP status.
    """
    lines = []
    for each in fields(statistics):
        kind = each.metadata["kind"]
        name = f"mor_{each.name}_total" if kind == "counter" else f"mor_{each.name}"
        lines += _head(name, kind, each.metadata["help"])
        lines.append(f"{name} {getattr(statistics, each.name)}")
    lines += _head("mor_answers_total", "counter", "Responses by status.")
    lines += [f'mor_answers_total{{status="{s}"}} {n}' for s, n in sorted(answers.items())]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
