"""From text to the samples that a training step sees."""

import difflib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mor_dali import BatchOrder
from mor_tools.pretraining.data import text
from mor_tools.pretraining.data.datasets import build_datasets, unigram_entropy
from mor_tools.pretraining.data.text import TextTokenizer, collect, prepare
from mor_tools.pretraining.settings import DataSettings, EvaluationSettings, Settings

STORIES = [f"Story {i}: the {'quick ' * (i % 3)}fox jumps {i} times.\n" * 20 for i in range(40)]


@pytest.fixture
def stories(tmp_path) -> DataSettings:
    """Forty small documents in a .jsonl file."""
    file = tmp_path / "stories.jsonl"
    file.write_text("\n".join(json.dumps({"text": story}) for story in STORIES) + "\n\n", "utf-8")
    return DataSettings(
        path=str(file),
        vocabulary_size=300,
        sequence_length=16,
        held_out_share=0.2,
        prepared_folder=str(tmp_path / "prepared"),
    )


def _documents(settings: DataSettings) -> list[str]:
    prepared = prepare(settings)
    tokenizer = TextTokenizer(prepared.tokenizer, settings.end_of_document)
    dataset = IndexedDataset(str(prepared.prefix))
    documents = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(ids[-1] == tokenizer.eod for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_every_document_survives_and_the_order_is_the_same_each_time_and_place(stories, tmp_path):
    documents = _documents(stories)
    assert sorted(documents) == sorted(STORIES)
    assert documents != STORIES
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    file = shutil.copy(str(stories.path), moved)
    assert documents == _documents(replace(stories, path=file, prepared_folder=str(moved / "text")))


def test_prepared_text_is_found_again_and_depends_on_what_made_it(stories):
    first = prepare(stories)
    written = first.prefix.with_suffix(".bin").stat().st_mtime_ns
    assert prepare(stories) == first
    assert first.prefix.with_suffix(".bin").stat().st_mtime_ns == written
    assert prepare(replace(stories, vocabulary_size=310)) != first
    Path(stories.path).write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}))
    assert prepare(stories) != first


def test_an_interrupted_preparation_leaves_nothing(stories, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "_write_ids", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(stories)
    assert list(Path(stories.prepared_folder).iterdir()) == []


def test_plain_text_is_cut_into_documents_at_line_ends(tmp_path):
    whole = "".join(f"line {i} of a long book, with ünïcode\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(whole, "utf-8")
    (tmp_path / "b.txt").write_text("short", "utf-8")
    pieces = collect(str(tmp_path / "a.txt"))
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == whole
    assert len(collect(str(tmp_path))) == len(pieces) + 1
    assert len({piece.name for piece in collect(str(tmp_path))}) == len(pieces) + 1


def test_python_brings_its_own_text():
    documents = collect(None)
    assert len({document.name for document in documents}) == len(documents)
    found = {document.name: document.text for document in documents}
    assert {"pydoc/for", "argparse.py", "email/architecture.rst"} <= found.keys()
    left_out = ("site-packages/", "test/", "encodings/", "lib2to3/", "pydoc_data/")
    assert not any(name.startswith(left_out) for name in found)
    assert 2_000_000 < sum(map(len, found.values())) < 4_000_000
    assert found["difflib.py"] == Path(difflib.__file__).read_text("utf-8")  # explains itself
    assert found["argparse.py"].startswith("Command-line parsing library")  # docstrings alone
    assert "import" not in found["html/entities.py"].split()  # a table


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"txt": 1}\n', r"a.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", b"not json\n", "line 1"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1"),
        ("a.txt", b"caf\xe9", "is not UTF-8"),
        ("a.txt", b"  \n", r"contains 0 document\(s\)"),
    ],
)
def test_text_that_is_not_what_it_says_is_answered(name, content, answer, tmp_path, stories):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=answer):
        prepare(replace(stories, path=str(tmp_path / name)))
    assert not Path(stories.prepared_folder).exists()


def test_missing_files_are_named(stories, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="does not exist, neither as a file or folder nor as"
    ):
        prepare(replace(stories, path=str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer"):
        prepare(replace(stories, tokenizer=str(tmp_path / "nothing.json")))


def test_an_existing_pair_needs_its_tokenizer(stories):
    prepared = prepare(stories)
    pair = replace(stories, path=str(prepared.prefix))
    with pytest.raises(ValueError, match=r"Set data\.tokenizer"):
        prepare(pair)
    assert prepare(replace(pair, tokenizer=str(prepared.tokenizer))) == prepared
    with pytest.raises(ValueError, match="is not a token of"):
        TextTokenizer(prepared.tokenizer, "<eos>")
    prepared.prefix.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"\.bin does not"):
        prepare(replace(pair, tokenizer=str(prepared.tokenizer)))


@pytest.mark.parametrize(
    ("suffix", "damage", "answer"),
    [
        (".idx", lambda content: b"", "is empty, damaged or not an index"),
        (".idx", lambda content: b"no index" * 10, "its header is not that of an index"),
        (".idx", lambda content: content[:40], "has 40 bytes but needs"),
        (".idx", lambda content: content[:17] + b"\x07" + content[18:], "type code 7 is unknown"),
        (".idx", lambda content: content[:18] + b"\xff" * 8 + content[26:], "but needs 2"),
        (".idx", lambda content: content[:18] + bytes(8) + content[26:], "lists no documents"),
        (
            ".idx",
            lambda content: content[:34] + b"\xff" * 4 + content[38:],
            "lengths and offsets are inconsistent",
        ),
        (".bin", lambda content: b"", "bin has 0 bytes"),
        (".bin", lambda content: content[:-2], "it was truncated, or belongs to another index"),
    ],
)
def test_a_pair_that_is_damaged_is_named(stories, suffix, damage, answer):
    prepared = prepare(stories)
    pair = replace(stories, path=str(prepared.prefix), tokenizer=str(prepared.tokenizer))
    file = prepared.prefix.with_suffix(suffix)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=answer):
        prepare(pair)


def _datasets(stories: DataSettings, folder: Path):
    evaluation = EvaluationSettings(sample_tokens=4)
    settings = Settings(output=str(folder / "run"), data=stories, evaluation=evaluation)
    prepared = prepare(stories)
    tokenizer = TextTokenizer(prepared.tokenizer, stories.end_of_document)
    return build_datasets(settings, prepared, tokenizer), tokenizer


def test_held_out_documents_are_in_no_training_sample(stories, tmp_path):
    stories = replace(stories, sequence_length=16)
    datasets, tokenizer = _datasets(stories, tmp_path)
    assert set(datasets.train.indices).isdisjoint(datasets.held_out.indices)
    assert len(datasets.held_out.indices) == 8
    sample = datasets.train[3]
    assert sample["tokens"].shape == sample["labels"].shape == (16,)
    assert (sample["tokens"][1:] == sample["labels"][:-1]).all()
    assert tokenizer.decode(sample["tokens"].tolist())


def test_samples_number_their_documents(stories, tmp_path):
    datasets, tokenizer = _datasets(replace(stories, sequence_length=1200), tmp_path)
    sample = datasets.train[0]
    ends = (sample["tokens"] == tokenizer.eod).nonzero().flatten().tolist()
    assert len(ends) > 1
    assert sample["documents"][0] == 0
    for number, end in enumerate(ends):  # an end belongs to the document it ends
        assert sample["documents"][end : end + 2].tolist() == [number, number + 1][: 1200 - end]


def test_unigram_entropy_is_that_of_the_held_out_documents(stories, tmp_path):
    datasets, tokenizer = _datasets(stories, tmp_path)
    held_out = datasets.held_out
    ids = numpy.concatenate([held_out.dataset[int(i)] for i in held_out.indices]).tolist()
    expected = -sum(
        ids.count(i) / len(ids) * math.log(ids.count(i) / len(ids)) for i in sorted(set(ids))
    )
    assert unigram_entropy(held_out, tokenizer.vocab_size) == pytest.approx(expected)
    with pytest.raises(ValueError, match="outside the tokenizer's vocabulary of 10 tokens"):
        unigram_entropy(held_out, 10)


def test_a_split_too_short_for_one_sample_is_answered(stories, tmp_path):
    with pytest.raises(ValueError, match="the held-out split has"):
        _datasets(replace(stories, held_out_share=0.001), tmp_path)
    with pytest.raises(ValueError, match="but one sample needs 100001"):
        _datasets(replace(stories, sequence_length=100_000), tmp_path)


@pytest.mark.parametrize("first", [0, 24])
def test_copies_of_the_model_share_the_samples_of_one(first):
    def order(rank, copies):
        return [list(b) for b in BatchOrder(first=first, end=48, size=2, rank=rank, ranks=copies)]

    alone = order(0, 1)
    assert alone[0] == [first, first + 1]
    turns = zip(*(order(rank, 3) for rank in range(3)), strict=True)
    assert [batch for turn in turns for batch in turn] == alone


def test_each_kind_of_document_is_in_both_splits():
    # The held-out split is the end of the order, and names that sort together are of one kind.
    documents = [text.Document(f"{kind}/{i}", "words") for kind in "ab" for i in range(50)]
    ordered = text._in_order(documents)
    assert sorted(d.name for d in ordered) == sorted(d.name for d in documents)
    for part in (ordered[:80], ordered[80:]):
        assert {d.name[0] for d in part} == {"a", "b"}
    assert text._in_order(documents[::-1]) == ordered
