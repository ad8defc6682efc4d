"""The chat protocol: `POST /v1/chat/completions`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mor_layers.generation import Event
from mor_layers.generation.sampling import Logprobs
from mor_tools.serving.calls.chat_template import TemplateError
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

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "audio": (None,),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None,),
    "echo": (None, False),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
"""Fields of the protocol that are not supported, with the values that have no effect."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def parse(body: bytes | bytearray, model: ServedModel, bounds: Bounds, client: str) -> Call:
    """Parse a body. This can take seconds for a long prompt, so do not call it in an event loop.

    Raises:
        BadRequestError: the body is invalid, or requests something that is not supported.
    """
    if model.chat_template is None:
        raise BadRequestError(
            f"{model.name} has no chat template. Use /v1/completions, or put the template into the "
            "model's folder as chat_template.jinja."
        )
    given = Fields(body)
    given.refuse(UNSUPPORTED)
    messages = _messages(given.values.pop("messages", None))
    variables = given.take("chat_template_kwargs", dict, {})
    options = take_options(given, model, bounds, client)
    allowed = range(1, bounds.max_tokens + 1)
    wanted = given.take_int("max_tokens", allowed, None)
    wanted = given.take_int("max_completion_tokens", allowed, wanted)
    top = given.take_int("top_logprobs", range(MAX_LOGPROBS + 1), None)
    logprobs = given.take("logprobs", bool, False)
    if top is not None and not logprobs:
        raise BadRequestError("top_logprobs requires logprobs=true.", "top_logprobs")
    given.finish(IGNORED)
    try:
        prompt = model.chat_template.render(messages, variables)
    except TemplateError as error:
        raise BadRequestError(str(error), "messages") from error
    ids = tuple(model.tokenizer.encode(prompt))
    if wanted is None:  # as much as there is room for
        wanted = max(1, min(bounds.max_tokens, bounds.max_length - len(ids)))
    scored = replace(options.request, num_logprobs=(top or 0) if logprobs else None)
    requests = replace(options, request=scored).requests(ids, wanted)
    choices: list[Choice] = [
        _Choice(index, logprobs, model.tokenizer) for index in range(len(requests))
    ]
    return Call(
        model.name,
        requests,
        choices,
        options.stream,
        options.usage,
        kind="chat.completion",
        part_kind="chat.completion.chunk",
        prefix="chatcmpl",
    )


class _Choice(Choice):
    def __init__(self, index: int, has_logprobs: bool, tokenizer: Tokenizer) -> None:
        self.index, self.has_logprobs, self.tokenizer = index, has_logprobs, tokenizer

    def part(self, event: Event) -> dict[str, Any]:
        delta = {"role": "assistant"} if event.prompt_depths else {}
        return self._choice("delta", delta | {"content": event.text}, [event])

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        content = "".join(event.text for event in events)
        return self._choice("message", {"role": "assistant", "content": content}, events)

    def _choice(self, key: str, message: dict[str, str], events: Sequence[Event]) -> dict[str, Any]:
        logprobs = [self._entry(e.logprobs) for e in events if e.logprobs is not None]
        return {
            "index": self.index,
            key: message,
            "logprobs": {"content": logprobs} if self.has_logprobs else None,
            "finish_reason": events[-1].finish_reason,
            # Our extension of the protocol: the recursion steps that each token took.
            "depths": [event.depth for event in events if event.token is not None],
        }

    def _entry(self, logprobs: Logprobs) -> dict[str, Any]:
        best = [self._token(token, logprob) for token, logprob in logprobs.best]
        return self._token(logprobs.token, logprobs.logprob) | {"top_logprobs": best}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _messages(messages: object) -> list[dict[str, str]]:
    """The messages, with the text of each as one string."""
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("messages must be a list of at least one message.", "messages")
    return [_message(message) for message in messages]


def _message(message: object) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequestError(
            f"a message must be an object with a role: one of {', '.join(ROLES)}.", "messages"
        )
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequestError(
            "the content of a message must be a string, or a list of parts of type text.",
            "messages",
        )
    unknown = set(message) - {"role", "content", "name", "refusal"}
    if unknown or not isinstance(message.get("name", ""), str) or message.get("refusal"):
        raise BadRequestError(
            "a message may have role, content and name, which must be a string.", "messages"
        )
    known = {"role": message["role"], "content": content}
    return known | ({"name": message["name"]} if "name" in message else {})
