"""Bodies of requests to the server."""

import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from mor_tools.serving.calls import chat, completions
from mor_tools.serving.calls.chat_template import ChatTemplate
from mor_tools.serving.calls.fields import BadRequestError
from mor_tools.serving.calls.protocol import MAX_CHOICES, Bounds
from mor_tools.serving.loading import ServedModel, random_model
from tests.campaigns import hostile

MOST = 100
VALID: list[dict[str, Any]] = [
    {"model": "m", "prompt": "once", "max_tokens": 5, "temperature": 0.5, "seed": 3},
    {"prompt": ["one", "two"], "n": 2, "stop": ["a", "b"], "stream": True},
    {"prompt": [1, 2, 3], "top_p": 0.9, "top_k": 5, "stream_options": None, "user": "me"},
    {"prompt": [[1], [2, 3]], "timeout": 3, "stream": True, "stream_options": {}},
    {"prompt": "x", "logit_bias": {"3": 1}, "echo": True, "logprobs": 2, "best_of": 1},
    {"prompt": "x", "min_p": 0.1, "repetition_penalty": 1.1, "priority": -3, "ignore_eos": True},
    {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3, "n": 2},
    {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}], "name": "b"}]},
    {"messages": [{"role": "user", "content": ""}], "logprobs": True, "top_logprobs": 3},
    {"prompt": "x", "structured_outputs": {"regex": "(ab|c)*d{2,5}"}},
    {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}, "n": 2},
]
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {})
BOUNDS = Bounds(MOST, max_length=1000, timeout=60.0)


@functools.cache
def served() -> ServedModel:
    """A model with a chat template."""
    return replace(random_model(), name="m", stop_ids=(0,), chat_template=TEMPLATE)


def hostile_body(source: random.Random) -> tuple[bytes, bool]:
    """A valid body in which places are hostile, or whose bytes are damaged; and whether it is a chat."""
    wanted: Any = source.choice(VALID)
    for _ in range(source.choice([0, 1, 1, 2])):
        if isinstance(wanted, dict) and wanted:
            wanted = hostile.changed(source, wanted)
    if source.random() < 0.05:
        wanted = {"prompt": list(range(200_000))}
    content = hostile.as_json(wanted)
    if source.random() < 0.3:
        content = hostile.damaged(source, content)
    return content, "messages" in wanted


def body(source: random.Random, folder: Path) -> str | None:
    """A hostile body is refused, or understood as it is meant."""
    content, is_chat = hostile_body(source)
    model = served()
    try:
        call = (chat if is_chat else completions).parse(content, model, BOUNDS, "")
    except BadRequestError as error:
        return str(error)
    said = json.loads(content)
    json.dumps(call.response([], is_part=True)).encode()
    assert 1 <= len(call.requests) <= MAX_CHOICES
    assert all(1 <= request.max_new_tokens <= MOST for request in call.requests)
    assert call.stream == bool(said.get("stream"))
    if is_chat:
        (text,) = {bytes(request.ids).decode() for request in call.requests}
        assert text.count("\n") >= len(said["messages"])
        return None
    prompt, number = said["prompt"], said.get("n") or 1
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if is_one else prompt
    expected = [
        tuple(p.encode() if isinstance(p, str) else p) for p in prompts for _ in range(number)
    ]
    assert [request.ids for request in call.requests] == expected
    return None
