"""What the completions and the chat protocol of OpenAI have in common."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mor_layers.generation import Event, Request, Sampling
from mor_tools.serving.calls.fields import BadRequestError, Fields
from mor_tools.serving.calls.grammars import GrammarConstraint, GrammarError
from mor_tools.serving.loading import ServedModel

IGNORED = {"metadata", "prompt_cache_key", "request_id", "safety_identifier", "user"}
"""Fields that are accepted and ignored, because they do not affect the response."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None, False),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "detokenize": (None, True),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "prompt_logprobs": (None,),
    "return_token_ids": (None, False),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, False),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Fields of these protocols, and of vLLM's extensions to them, that are not supported, with the values
that have no effect and are therefore allowed."""
MAX_STOP_IDS = 128
"""Largest number of tokens that a body may name as ends of its text."""
MAX_CHOICES = 16
"""Largest number of prompts times choices in one call."""
MAX_LOGPROBS = 20
"""Largest number of most likely tokens whose log-probabilities are reported."""
UINT64 = 1 << 64
INT64 = range(-(UINT64 // 2), UINT64 // 2)
SEEDS = range(-(UINT64 // 2), UINT64)
"""All signed and unsigned 64-bit integers."""


@dataclass(frozen=True)
class Bounds:
    """What a body may ask for."""

    max_tokens: int
    """Largest number of tokens per choice."""
    max_length: int
    """Largest number of tokens of prompt and text together."""
    timeout: float | None
    """Seconds after which a request ends, unless the body sets a shorter time."""


class Choice(ABC):
    """Formats one choice of a response, whole or event by event."""

    @abstractmethod
    def part(self, event: Event) -> dict[str, Any]:
        """What an event adds to a stream. Events must be given in order."""

    @abstractmethod
    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The choice that all events of its request make."""


@dataclass(frozen=True)
class Call:
    """A call of one of the protocols."""

    model: str
    requests: list[Request]
    """One request for each choice of each prompt."""
    choices: list[Choice]
    """The choice that each request becomes."""
    stream: bool
    usage: "UsageParts"
    kind: str
    """What the protocol calls a whole response."""
    part_kind: str
    """What the protocol calls a part of a stream."""
    prefix: str
    """With which the protocol begins the name of a call."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, choices: list[dict[str, Any]], is_part: bool) -> dict[str, Any]:
        """A response with these choices, or a part of a stream."""
        return {
            "id": f"{self.prefix}-{self.name}",
            "object": self.part_kind if is_part else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass
class Usage:
    """The number of tokens of a call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompts that were not computed, because they were in the cache."""

    def add(self, event: Event) -> None:
        """Count what an event adds to a response."""
        self.completion_tokens += event.token is not None
        self.cached_tokens += event.cached_tokens

    def as_dict(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class UsageParts:
    """Where a stream reports the number of tokens."""

    at_end: bool = False
    """In a last part without choices."""
    always: bool = False
    """In every part, so far."""


@dataclass(frozen=True)
class Options:
    """What both protocols allow a body to set."""

    count: int
    """Number of choices per prompt."""
    stream: bool
    usage: UsageParts
    request: Request
    """A request with these settings, whose prompt and length are still to be set."""
    constraint: GrammarConstraint | None
    """The grammar that the text must follow."""

    def requests(self, ids: tuple[int, ...], max_new_tokens: int) -> list[Request]:
        """One request for each choice, each with random numbers of its own.

        Raises:
            BadRequestError: there can be no such request.
        """
        sampling, constraint = self.request.sampling, self.constraint
        try:
            return [
                replace(
                    self.request,
                    ids=ids,
                    max_new_tokens=max_new_tokens,
                    sampling=replace(sampling, seed=sampling.seed + index),
                    constraint=None if constraint is None else constraint.copy(),
                )
                for index in range(self.count)
            ]
        except ValueError as error:
            raise BadRequestError(str(error)) from error


def take_options(
    given: Fields, model: ServedModel, bounds: Bounds, client: str, num_prompts: int = 1
) -> Options:
    """Take out the fields that both protocols have.

    Raises:
        BadRequestError: one of them is invalid.
    """
    given.refuse(UNSUPPORTED)
    name = given.take("model", str, model.name)
    if name != model.name:
        message = f"model={name[:80]!r} is not served. Use {model.name!r}."
        raise BadRequestError(message, "model", status=404)
    count = given.take("n", int, 1)
    if count < 1 or count * num_prompts > MAX_CHOICES:
        raise BadRequestError(
            f"n={str(count)[:20]} for {num_prompts} prompt(s): request 1 to {MAX_CHOICES} choices "
            "in total.",
            "n",
        )
    if given.take_int("best_of", range(1, MAX_CHOICES + 1), count) not in (1, count):
        raise BadRequestError(
            "best_of must be n, or left out: all choices are returned.", "best_of"
        )
    stream = given.take("stream", bool, False)
    seed = given.take_int("seed", SEEDS, None)
    timeout = given.take("timeout", float, bounds.timeout)
    if bounds.timeout is not None:
        timeout = min(timeout, bounds.timeout)
    try:
        sampling = Sampling(
            given.take("temperature", float, 1.0),
            _top_k(given.take("top_k", int, 0)),
            given.take("top_p", float, 1.0),
            given.take("min_p", float, 0.0),
            uuid.uuid4().int % UINT64 if seed is None else seed,
            given.take("repetition_penalty", float, 1.0),
            given.take("presence_penalty", float, 0.0),
            given.take("frequency_penalty", float, 0.0),
            _logit_bias(given.take("logit_bias", dict, {})),
        )
        request = Request(
            (0,),
            1,
            sampling,
            _stop_ids(given, model),
            _stop(given.values.pop("stop", None)),
            timeout,
            priority=given.take_int("priority", INT64, 0),
            client=client,
            cache_salt=given.take("cache_salt", str, ""),
        )
    except ValueError as error:
        raise BadRequestError(str(error)) from error
    usage = _usage_parts(given.take("stream_options", dict, {}), stream)
    form = _grammar(given)
    try:
        constraint = None if form is None else model.grammars.constraint(form)
    except GrammarError as error:
        raise BadRequestError(str(error)) from error
    return Options(count, stream, usage, request, constraint)


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


def _stop(stop: object) -> tuple[str, ...]:
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) for s in stop):
        raise BadRequestError("stop must be a string or a list of up to 4 strings.", "stop")
    return tuple(stop)


def _stop_ids(given: Fields, model: ServedModel) -> tuple[int, ...]:
    """The tokens that end a text: those of the model, unless they are ignored, and those of the body."""
    own = () if given.take("ignore_eos", bool, False) else model.stop_ids
    ids = given.take("stop_token_ids", list, [])
    allowed = range(model.config.vocab_size)
    if len(ids) > MAX_STOP_IDS or not all(type(i) is int and i in allowed for i in ids):
        raise BadRequestError(
            f"stop_token_ids must be up to {MAX_STOP_IDS} token ids in {allowed.start}.."
            f"{allowed.stop - 1}.",
            "stop_token_ids",
        )
    return (*own, *ids)


def _top_k(count: int) -> int:
    return 0 if count == -1 else count  # vLLM and SGLang write no limit as -1


def _grammar(given: Fields) -> dict[str, Any] | None:
    """The grammar that a body asks for, in the form that `Grammars.constraint` takes."""
    forms = [_response_format(given), given.take("structured_outputs", dict, None)]
    wanted = [form for form in forms if form is not None]
    if not wanted:
        return None
    grammars = [item for form in wanted for item in form.items()]
    if len(grammars) != 1 or not _is_grammar(*grammars[0]):
        raise BadRequestError(
            "a text can follow one grammar: that of `response_format`, or one of "
            "`structured_outputs`: json (a schema), regex, choice (a list of strings) or grammar "
            "(in Lark's notation).",
            "structured_outputs",
        )
    return dict(grammars)


def _response_format(given: Fields) -> dict[str, Any] | None:
    wanted = given.take("response_format", dict, {"type": "text"})
    kind, schema = wanted.get("type"), wanted.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": {"type": "object"}}
    if kind == "json_schema" and isinstance(schema, dict):
        return {"json": schema.get("schema")}
    raise BadRequestError(
        'response_format must be {"type": "text"}, {"type": "json_object"}, or {"type": '
        '"json_schema", "json_schema": {"schema": ...}}.',
        "response_format",
    )


def _is_grammar(kind: str, value: object) -> bool:
    if kind == "json":
        return isinstance(value, dict)
    if kind == "choice":
        return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)
    return kind in ("regex", "grammar") and isinstance(value, str)


def _logit_bias(values: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    for token, bias in values.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        # Token ids have a few digits; an id of thousands of digits would take long to parse.
        if not (token.isdecimal() and len(token) < 10 and is_number and -100 <= bias <= 100):
            raise BadRequestError(
                "logit_bias must map token ids to numbers in -100..100.", "logit_bias"
            )
    return tuple((int(token), float(bias)) for token, bias in values.items())


def _usage_parts(options: dict[str, object], stream: bool) -> UsageParts:
    if options and not stream:
        raise BadRequestError("stream_options requires stream=true.", "stream_options")
    values = [options.get(name, False) for name in ("include_usage", "continuous_usage_stats")]
    known = set(options) <= {"include_usage", "continuous_usage_stats"}
    if not known or not all(isinstance(value, bool) for value in values):
        raise BadRequestError(
            "stream_options may only contain include_usage and continuous_usage_stats, true or false.",
            "stream_options",
        )
    at_end, always = map(bool, values)
    return UsageParts(at_end, at_end and always)
