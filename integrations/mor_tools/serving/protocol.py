"""The OpenAI completions protocol: parses JSON bodies to requests, and formats responses."""

import json
import time
import uuid
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, NoReturn

from mor_layers.generation import Event, Request, Sampling
from mor_tools.serving.loading import Tokenizer

IGNORED = {"user", "metadata"}
"""Fields that are accepted and ignored, because they do not affect the response."""
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0, 0.0),
    "suffix": (None, ""),
}
"""Fields of the protocol that are not supported, with the values that have no effect."""
MAX_CHOICES = 16
"""Largest number of prompts times choices in one call."""
UINT64 = 1 << 64
SEEDS = range(-(UINT64 // 2), UINT64)
"""All signed and unsigned 64-bit integers."""


class BadRequestError(Exception):
    """The body is invalid, or requests something that is not supported."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class Call:
    """A call of `POST /v1/completions`."""

    model: str
    requests: list[Request]
    """One request for each choice of each prompt."""
    stream: bool
    include_usage: bool
    number: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A response with these choices, or a part of a stream."""
        return {
            "id": self.number,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass
class Usage:
    """The number of tokens of a call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def choice(index: int, text: str, reason: str | None, depths: list[int]) -> dict[str, Any]:
    """One choice of a response.

    Args:
        depths: number of recursion steps that each generated token took. This is our extension of
            the protocol.
    """
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": reason,
        "depths": depths,
    }


def failure(event: Event) -> tuple[int, str] | None:
    """Status and message if a request ended without success, otherwise None."""
    if event.finish_reason == "timeout":
        return 504, "the request exceeded its time limit"
    if event.finish_reason == "memory":
        return 507, "the text does not fit into the key-value cache; request fewer tokens"
    if event.finish_reason == "cancelled":
        return 499, "the request was cancelled"
    if event.finish_reason == "error":
        return 500, event.error
    return None


def parse(
    body: bytes | bytearray,
    served: str,
    tokenizer: Tokenizer,
    max_tokens: int,
    timeout: float | None,
    client: str = "",
) -> Call:
    """Parse a body. This can take seconds for a long prompt, so do not call it in an event loop.

    Args:
        served: name of the model that is served.
        max_tokens: largest number of tokens per choice.
        timeout: seconds after which a request ends, unless the body sets a shorter time.
        client: the sender.

    Raises:
        BadRequestError: the body is invalid, or requests something that is not supported.
    """
    value = _json(body)
    if not isinstance(value, dict):
        raise BadRequestError("the body must be a JSON object.")
    given = _Fields(value)
    model = given.take("model", str, served)
    if model != served:
        raise BadRequestError(f"model={shortened(model)} is not served. Use {served!r}.", "model")
    for name, allowed in WITHOUT_EFFECT.items():
        value = given.values.pop(name, None)
        if value not in allowed:
            raise BadRequestError(
                f"{name}={shortened(value)} is not supported. Leave it out.", name
            )
    prompts = _prompts(given.values.pop("prompt", None))
    count = given.take("n", int, 1)
    if count < 1 or count * len(prompts) > MAX_CHOICES:
        raise BadRequestError(
            f"n={shortened(count)} for {len(prompts)} prompt(s): request 1 to {MAX_CHOICES} choices "
            "in total.",
            "n",
        )
    wanted = given.take("max_tokens", int, 16)
    if not 1 <= wanted <= max_tokens:
        raise BadRequestError(
            f"max_tokens={shortened(wanted)} must be in 1..{max_tokens}.", "max_tokens"
        )
    stop = given.values.pop("stop", None)
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) for s in stop):
        raise BadRequestError("stop must be a string or a list of up to 4 strings.", "stop")
    own_timeout = given.take("timeout", float, timeout)
    if timeout is not None and own_timeout is not None:
        own_timeout = min(timeout, own_timeout)
    stream = given.take("stream", bool, False)
    include_usage = _includes_usage(given.take("stream_options", dict, {}), stream)
    seed = given.take("seed", int, None)
    seed = uuid.uuid4().int % UINT64 if seed is None else seed
    if seed not in SEEDS:
        raise BadRequestError(f"seed={shortened(seed)} has more than 64 bits.", "seed")
    settings = {
        "temperature": given.take("temperature", float, 1.0),
        "top_p": given.take("top_p", float, 1.0),
        "top_k": given.take("top_k", int, 0),
    }
    unknown = sorted(set(given.values) - IGNORED)
    if unknown:
        names = ", ".join(map(shortened, unknown[:4]))
        raise BadRequestError(f"unknown parameter {names}.", unknown[0][:80])
    try:
        requests = [
            Request(
                ids,
                wanted,
                Sampling(seed=seed + index, **settings),
                stop=tuple(stop),
                timeout=own_timeout,
                client=client,
            )
            for ids in (_ids(prompt, tokenizer) for prompt in prompts)
            for index in range(count)
        ]
    except ValueError as error:
        raise BadRequestError(str(error)) from error
    return Call(served, requests, stream, include_usage)


def _json(body: bytes | bytearray) -> object:
    """The JSON value of a body.

    Raises:
        BadRequestError: the body is not valid JSON, or has text that cannot be encoded.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_number)
        # JSON can contain half of a surrogate pair as an escape sequence, which neither tokenizers
        # nor responses can encode.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply.") from error
    except UnicodeError as error:
        raise BadRequestError(f"the body is not valid Unicode: {error.reason}.") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}.") from error
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


class _Fields:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def take(self, name: str, kind: type, default: Any) -> Any:
        value = self.values.pop(name, None)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError as error:
                raise BadRequestError(f"{name}={shortened(value)} is too large.", name) from error
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRequestError(f"{name}={shortened(value)}: expected {kind.__name__}.", name)
        return value


def _includes_usage(options: dict[str, object], stream: bool) -> bool:
    if options and not stream:
        raise BadRequestError("stream_options requires stream=true.", "stream_options")
    include_usage = options.get("include_usage", False)
    if set(options) - {"include_usage"} or not isinstance(include_usage, bool):
        raise BadRequestError(
            "stream_options may only contain include_usage, true or false.", "stream_options"
        )
    return include_usage


def _ids(prompt: str | list[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)


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
