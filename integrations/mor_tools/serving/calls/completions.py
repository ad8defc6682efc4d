"""The completions protocol: `POST /v1/completions`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mor_layers.generation import Event
from mor_layers.generation.sampling import Logprobs
from mor_tools.serving.calls.fields import BadRequestError, Fields
from mor_tools.serving.calls.protocol import (
    IGNORED,
    MAX_LOGPROBS,
    Bounds,
    Call,
    Choice,
    take_options,
)
from mor_tools.serving.loading import ServedModel
from mor_tools.serving.tokenizers import Tokenizer

UNSUPPORTED: dict[str, tuple[Any, ...]] = {"suffix": (None, "")}
"""Fields of the protocol that are not supported, with the values that have no effect."""


def parse(body: bytes | bytearray, model: ServedModel, bounds: Bounds, client: str) -> Call:
    """Parse a body. This can take seconds for a long prompt, so do not call it in an event loop.

    Raises:
        BadRequestError: the body is invalid, or requests something that is not supported.
    """
    given = Fields(body)
    given.refuse(UNSUPPORTED)
    prompts = _prompts(given.values.pop("prompt", None))
    options = take_options(given, model, bounds, client, len(prompts))
    max_tokens = given.take_int("max_tokens", range(1, bounds.max_tokens + 1), 16)
    echo = given.take("echo", bool, False)
    logprobs = given.take_int("logprobs", range(MAX_LOGPROBS + 1), None)
    given.finish(IGNORED)
    scored = replace(
        options.request, num_logprobs=logprobs, prompt_logprobs=echo and logprobs is not None
    )
    options = replace(options, request=scored)
    texts = [tuple(model.tokenizer.encode(p)) if isinstance(p, str) else tuple(p) for p in prompts]
    requests = [request for ids in texts for request in options.requests(ids, max_tokens)]
    choices: list[Choice] = [
        _Choice(index, request.ids if echo else (), request.num_logprobs, model.tokenizer)
        for index, request in enumerate(requests)
    ]
    return Call(
        model.name,
        requests,
        choices,
        options.stream,
        options.usage,
        kind="text_completion",
        part_kind="text_completion",
        prefix="cmpl",
    )


class _Choice(Choice):
    """One choice.

    Args:
        echo: the prompt's tokens, if the response begins with them.
        num_logprobs: as of `Request`.
    """

    def __init__(
        self, index: int, echo: tuple[int, ...], num_logprobs: int | None, tokenizer: Tokenizer
    ) -> None:
        self.index, self.echo, self.num_logprobs = index, echo, num_logprobs
        self.tokenizer = tokenizer
        self._offset = 0  # length of the tokens' text so far

    def part(self, event: Event) -> dict[str, Any]:
        return self.whole([event])

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        echo = self.echo if events[0].prompt_depths else ()
        if echo:
            text = self.tokenizer.decode(echo) + text
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if self.num_logprobs is None else self._logprobs(echo, events),
            "finish_reason": events[-1].finish_reason,
            # Our extension of the protocol: the recursion steps that each token took.
            "depths": [event.depth for event in events if event.token is not None],
        }

    def _logprobs(self, echo: tuple[int, ...], events: Sequence[Event]) -> dict[str, list[Any]]:
        # Nothing precedes the first token of a prompt, so it has no probability.
        scored: list[Logprobs | None] = [None] if echo else []
        for event in events:
            scored += event.prompt_logprobs if echo else ()
            scored += [event.logprobs] if event.logprobs is not None else []
        tokens = [echo[0] if entry is None else entry.token for entry in scored]
        texts = [self.tokenizer.decode([token]) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if entry is None else entry.logprob for entry in scored],
            "top_logprobs": [
                entry and {self.tokenizer.decode([token]): logprob for token, logprob in entry.best}
                for entry in scored
            ],
            "text_offset": offsets,
        }


def _prompts(prompt: object) -> list[str | list[int]]:
    """The prompts of a body: a string, a list of strings, a list of ids, or a list of such lists."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(p, str) for p in prompt) or all(
            isinstance(p, list) and _are_ids(p) for p in prompt
        ):
            return prompt
    raise BadRequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists.",
        "prompt",
    )


def _are_ids(values: list[object]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in values)
