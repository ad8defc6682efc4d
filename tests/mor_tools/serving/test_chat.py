"""Conversations, as the chat protocol sends them and a template writes them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from mor_layers import DecoderConfig, MoRTransformer, save_model
from mor_tools.serving.calls.chat_template import ChatTemplate, TemplateError, read_chat_template
from mor_tools.serving.loading import load
from tests.mor_tools.serving.running import Running, running

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('there are no tools') }}{% endif %}
<{{ message.role }}>{{ message.content }}{{ eos_token }}
{%- endfor %}
{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"""
CONFIG = {"bos_token": {"content": "^"}, "eos_token": "$", "chat_template": TEMPLATE}
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
WRITTEN = "^<system>Be brief.$<user>Hi$<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat") / "talker"
    model = MoRTransformer(DecoderConfig(256, 32, 64, 2, 2))
    with torch.no_grad():
        model.output.weight.mul_(20)  # so that the text varies
    save_model(model, folder, eos_token_id=ord("$"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running("--model", str(folder), "--max-length", "256") as own:
        yield own


def test_a_template_writes_a_conversation(folder: Path) -> None:
    template = read_chat_template(folder)
    assert template is not None and template.render(CONVERSATION, {}) == WRITTEN
    assert template.render(CONVERSATION, {"mood": "!"}) == WRITTEN + "!"
    with pytest.raises(TemplateError, match="there are no tools"):
        template.render([{"role": "tool", "content": "x"}], {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% include 'x' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_reaches_nothing_but_its_variables(source: str) -> None:
    with pytest.raises(TemplateError, match="cannot write these messages"):
        ChatTemplate(source, {}).render(CONVERSATION, {})


def test_what_the_folder_says_of_templates(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = read_chat_template(tmp_path)
    assert template is not None and template.render([], {}) == "b"
    (tmp_path / "chat_template.jinja").write_text("{{ c }}")  # goes before the configuration
    template = read_chat_template(tmp_path)
    assert template is not None and template.render([], {"c": "d"}) == "d"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="is no template"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize("value", [300, -1, "1", [1, None], True])
def test_a_token_that_ends_texts_must_exist(tmp_path: Path, value: Any) -> None:
    save_model(MoRTransformer(DecoderConfig(256, 16, 16, 1, 2)), tmp_path / "m", eos_token_id=3)
    assert load(str(tmp_path / "m")).stop_ids == (3,)
    generation = tmp_path / "m" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load(str(tmp_path / "m")).stop_ids == (1, 2)
    generation.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match="eos_token_id"):
        load(str(tmp_path / "m"))


def test_an_answer_continues_what_the_template_writes(server: Running) -> None:
    arguments = {"model": "talker", "temperature": 0, "max_tokens": 20}
    answer = server.client.chat.completions.create(
        messages=CONVERSATION, logprobs=True, top_logprobs=2, **arguments
    )
    plain = server.client.completions.create(prompt=WRITTEN, **arguments)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == plain.choices[0].text
    assert choice.finish_reason == plain.choices[0].finish_reason
    assert answer.usage.total_tokens == plain.usage.total_tokens
    assert answer.usage.prompt_tokens == len(WRITTEN)
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(e.token == e.top_logprobs[0].token and len(e.top_logprobs) == 2 for e in content)
    parts = [
        part.choices[0]
        for part in server.client.chat.completions.create(
            messages=CONVERSATION, stream=True, **arguments
        )
    ]
    assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
    assert "".join(part.delta.content for part in parts) == choice.message.content
    assert parts[-1].finish_reason == choice.finish_reason


def test_a_text_ends_at_its_end_token_and_does_not_show_it(server: Running) -> None:
    arguments = {"model": "talker", "prompt": "x", "temperature": 0, "max_tokens": 3}
    for ignores, reason, length in ((False, "stop", 1), (True, "length", 3)):
        answer = server.client.completions.create(
            **arguments, logit_bias={str(ord("$")): 100}, extra_body={"ignore_eos": ignores}
        )
        (choice,) = answer.choices
        assert choice.finish_reason == reason and answer.usage.completion_tokens == length
        assert choice.text == ("$$$" if ignores else "")


def test_without_a_limit_an_answer_has_what_is_left(server: Running) -> None:
    """The limit of the server is 100 tokens, and that of prompt and answer together 256."""
    for size, left in ((10, 100), (200, 256 - 200 - len(WRITTEN) + 2)):
        messages = [*CONVERSATION[:1], {"role": "user", "content": "x" * size}]
        answer = server.client.chat.completions.create(
            model="talker", messages=messages, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == left


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "with a role: one of system"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "parts of type text",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "there are no tools"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "role, content and name"),
        ({"top_logprobs": 3}, "requires logprobs=true"),
        ({"tools": [{"type": "function"}]}, "tools=.* is not supported"),
        ({"response_format": {"type": "yaml"}}, "response_format must be"),
        ({"max_completion_tokens": 101}, "must be in 1..100"),
        ({"extra_body": {"continue_final_message": True}}, "continue_final_message=True is not"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template=.* is not supported"),
    ],
    ids=str,
)
def test_impossible_conversations_are_refused_with_a_reason(server, arguments, reason) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        server.client.chat.completions.create(
            **{"model": "talker", "messages": CONVERSATION} | arguments
        )


def test_parts_of_a_message_are_joined(server: Running) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    in_parts = [*CONVERSATION[:1], {"role": "user", "content": parts}]
    first, second = (
        server.client.chat.completions.create(model="talker", messages=messages, seed=3)
        for messages in (CONVERSATION, in_parts)
    )
    assert first.choices[0].message == second.choices[0].message


def test_a_model_without_a_template_has_no_chat() -> None:
    with running() as own, pytest.raises(openai.BadRequestError, match="has no chat template"):
        own.client.chat.completions.create(model="random", messages=CONVERSATION)
