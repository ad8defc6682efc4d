"""Bodies of requests to the server."""

import json
import random
from pathlib import Path
from typing import Any

from mor_tools.serving.loading import ByteTokenizer
from mor_tools.serving.protocol import MAX_CHOICES, BadRequestError, parse
from tests.campaigns import hostile

MOST = 100
VALID: list[dict[str, Any]] = [
    {"model": "m", "prompt": "once", "max_tokens": 5, "temperature": 0.5, "seed": 3},
    {"prompt": ["one", "two"], "n": 2, "stop": ["a", "b"], "stream": True},
    {"prompt": [1, 2, 3], "top_p": 0.9, "top_k": 5, "stream_options": None, "user": "me"},
    {"prompt": [[1], [2, 3]], "timeout": 3, "stream": True, "stream_options": {}},
    {"prompt": "x", "logit_bias": {}, "echo": False, "best_of": 1, "suffix": ""},
]


def body(source: random.Random, folder: Path) -> str | None:
    """A valid body in which places are hostile, or whose bytes are damaged."""
    wanted: Any = source.choice(VALID)
    for _ in range(source.choice([0, 1, 1, 2])):
        if isinstance(wanted, dict) and wanted:
            wanted = hostile.changed(source, wanted)
    if source.random() < 0.05:
        wanted = {"prompt": list(range(200_000))}
    content = hostile.as_json(wanted)
    if source.random() < 0.3:
        content = hostile.damaged(source, content)
    try:
        call = parse(content, "m", ByteTokenizer(), MOST, timeout=60.0)
    except BadRequestError as error:
        return str(error)
    said = json.loads(content)
    prompt, number = said["prompt"], said.get("n") or 1
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if is_one else prompt
    expected = [
        tuple(p.encode() if isinstance(p, str) else p) for p in prompts for _ in range(number)
    ]
    assert [request.ids for request in call.requests] == expected
    assert 1 <= len(call.requests) <= MAX_CHOICES
    assert all(1 <= request.max_new_tokens <= MOST for request in call.requests)
    assert call.stream == bool(said.get("stream"))
    json.dumps(call.chunk([])).encode()
    return None
