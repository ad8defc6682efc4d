"""Texts that must follow a grammar, alone and among others."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request, Sampling
from mor_tools.serving.calls.grammars import GrammarError, Grammars
from mor_tools.serving.loading import random_model
from mor_tools.serving.tokenizers import ByteTokenizer, FileTokenizer
from tests.mor_tools.serving.running import Running, running

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Bo"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as own:
        yield own


def complete(server: Running, **given: Any) -> tuple[str, str]:
    extra = {k: given.pop(k) for k in ("structured_outputs", "response_format") if k in given}
    answer = server.client.completions.create(
        model="random", prompt="x", max_tokens=60, extra_body=extra, **given
    )
    return answer.choices[0].text, answer.choices[0].finish_reason


@pytest.mark.parametrize("seed", range(4))
def test_a_text_follows_its_schema(server: Running, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    text, reason = complete(server, response_format=form, seed=seed)
    person = json.loads(text)
    assert reason == "stop" and set(person) == {"name", "age"}
    assert person["name"] in ("Ada", "Bo") and 0 <= person["age"] <= 99


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", 'both "of" them']}, 'yes|no|both "of" them'),
        ({"grammar": 'start: "<" /[xyz]{2}/ ">"'}, "<[xyz]{2}>"),
    ],
)
def test_a_text_follows_other_grammars(server: Running, form, pattern) -> None:
    texts = set()
    for seed in range(5):
        text, reason = complete(server, structured_outputs=form, seed=seed)
        assert re.fullmatch(pattern, text) and reason == "stop"
        texts.add(text)
    assert len(texts) > 1  # what the grammar leaves open is sampled


def test_choices_of_one_call_have_states_of_their_own(server: Running) -> None:
    answer = server.client.completions.create(
        model="random",
        prompt="x",
        n=4,
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "[ab]{6}"}},
    )
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch("[ab]{6}", text) for text in texts) and len(set(texts)) > 1


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"structured_outputs": {"regex": "("}}, "the grammar cannot be used"),
        ({"structured_outputs": {"regex": 3}}, "can follow one grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "can follow one grammar"),
        ({"structured_outputs": {"choice": []}}, "can follow one grammar"),
        ({"structured_outputs": {}}, "can follow one grammar"),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, "the grammar cannot be used"),
        ({"response_format": {"type": "yaml"}}, "response_format must be"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "can follow one grammar",
        ),
    ],
    ids=str,
)
def test_impossible_grammars_are_refused_with_a_reason(server: Running, extra, reason) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        complete(server, **extra)


def test_a_grammar_that_fails_ends_its_own_text_only() -> None:
    class Failing:
        def allowed(self) -> torch.Tensor:
            raise ValueError("it broke")

        def accept(self, token: int) -> bool:
            return False

    class Empty(Failing):
        def allowed(self) -> torch.Tensor:
            return torch.zeros(256, dtype=torch.bool)

    class Rejecting(Failing):
        def allowed(self) -> torch.Tensor:
            return torch.ones(256, dtype=torch.bool)

        def accept(self, token: int) -> bool:
            raise ValueError("never that one")

    model = random_model().model
    engine = DepthBatchingEngine(model, CacheSettings(1 << 20, 4, max_length=64))
    (expected,) = ([event.token for event in engine.stream(Request((5, 6), 6))] for _ in range(1))
    numbers = [
        engine.submit(Request((5, 6), 6, constraint=constraint))
        for constraint in (None, Failing(), Empty(), Rejecting())
    ]
    events = list(engine.run())
    ends = {e.number: (e.finish_reason, e.error) for e in events if e.finish_reason is not None}
    assert [event.token for event in events if event.number == numbers[0]] == expected
    reasons = ["", "failed: it broke", "allows no further token", "never that one"]
    for number, reason in zip(numbers, reasons, strict=True):
        assert ends[number][0] == ("error" if reason else "length") and reason in ends[number][1]


def test_a_constraint_survives_preemption() -> None:
    served = random_model()
    constraint = served.grammars.constraint({"regex": "[a-z]{20}"})
    texts = []
    for preempts in (False, True):
        engine = DepthBatchingEngine(
            served.model, CacheSettings(1 << 20, 4, 64), decode=served.tokenizer.decode
        )
        sampling = Sampling(1.0, seed=3)
        engine.submit(Request((7,), 3))
        number = engine.submit(Request((5, 6), 30, sampling, constraint=constraint.copy()))
        text = ""
        while not engine.is_idle:
            text += "".join(e.text for e in engine.step() if e.number == number)
            if preempts and engine.counters.ticks == 6:
                progress = engine.scheduler.last()
                assert progress is not None and progress.number == number
                engine.runner.drop(engine._preempt(progress))
        texts.append(text)
    assert texts[0] == texts[1] and re.fullmatch("[a-z]{20}", texts[0])


def test_tokens_of_a_file_follow_a_grammar(tmp_path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello help hero"] * 5, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = FileTokenizer(tmp_path / "tokenizer.json")
    size = tokenizer.get_vocab_size() + 10  # padded, as models are
    constraint = Grammars(loaded, size, stop_ids=(0,)).constraint({"choice": ["hello", "hero"]})

    def allowed() -> set[str | None]:
        (ids,) = constraint.allowed().nonzero(as_tuple=True)
        assert len(constraint.allowed()) == size
        return {tokenizer.id_to_token(int(i)) for i in ids}

    assert allowed() == {
        token
        for token in tokenizer.get_vocab()
        if token and ("hello".startswith(token) or "hero".startswith(token))
    }
    for token in tokenizer.encode("hell").ids:
        assert not constraint.accept(token)
    assert allowed() == {"o"}
    is_complete = constraint.accept(tokenizer.encode("o").ids[0])
    assert is_complete or allowed() == {"<end>"}
    with pytest.raises(ValueError, match="cannot follow its grammar"):
        constraint.accept(tokenizer.encode("x").ids[0])
    with pytest.raises(GrammarError, match="names the token that ends a text"):
        Grammars(loaded, size, stop_ids=()).constraint({"regex": "a"})


def test_without_the_library_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr("mor_tools.serving.calls.grammars.llguidance", None)
    with pytest.raises(GrammarError, match=r"mor-layers\[serve\]"):
        Grammars(ByteTokenizer(), 256, ()).constraint({"regex": "a"})
