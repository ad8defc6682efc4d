"""What an engine tells about its requests, and about itself."""

from dataclasses import dataclass

from mor_layers.generation.sampling import Logprobs
from mor_layers.generation.scheduling import FinishReason


@dataclass(frozen=True)
class Event:
    """An event of one request."""

    number: int
    """The number of the request, as returned by `submit`."""
    token: int | None = None
    """The generated token, or None if the event has none, for example after a cancellation."""
    depth: int | None = None
    """Number of steps that the preceding token took. The logits of `token` were computed from it."""
    prompt_depths: tuple[int, ...] = ()
    """Number of steps that each prompt token took. Only set in the event of the first token."""
    cached_tokens: int = 0
    """Number of prompt tokens that were not computed, because their keys and values were in the cache
    for another request, or for this one before it was preempted. Only set in the event of the first
    token."""
    logprobs: Logprobs | None = None
    """Of `token`, if the request asks for it."""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """Of each prompt token but the first, if the request asks for them. Only set in the event of the
    first token."""
    text: str = ""
    """Text that became final. Text that may turn out to begin a stop string is held back."""
    finish_reason: FinishReason | None = None
    """Why the request ended. Only set in its last event."""
    error: str = ""
    """The error message, if `finish_reason` is "error"."""


@dataclass
class Counters:
    """Statistics of an engine since it was built."""

    ticks: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed. Tokens recomputed after a preemption count again."""
    cached_tokens: int = 0
    """Tokens that were not computed, because requests shared a prefix."""
    generated_tokens: int = 0
    steps: int = 0
    """Recursion steps that all computed tokens took in total."""
    preemptions: int = 0
    finished: int = 0
