"""Text and token ids of a run, and the tokenizer beside them."""

import json
import random
import tempfile
from functools import cache
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from mor_tools.pretraining.data.text import TextTokenizer, collect, prepare
from mor_tools.pretraining.settings import DataSettings
from tests.campaigns import hostile

LINES = [json.dumps({"text": f"document {i}: red and blue " * (1 + i % 3)}) for i in range(8)]
END = "<|endoftext|>"


@cache
def _prepared() -> dict[str, bytes]:
    """The files that a preparation of LINES writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl")
        path.write_text("\n".join(LINES))
        done = prepare(_settings(Path(folder), path=str(path)))
        return {file.name: file.read_bytes() for file in done.prefix.parent.iterdir()}


def lines(source: random.Random, folder: Path) -> str | None:
    """A .jsonl or .txt file with hostile lines or damaged bytes; ids must decode to its text."""
    content = "\n".join(_line(source, line) for line in LINES).encode("utf-8", "surrogatepass")
    if source.random() < 0.5:
        content = hostile.damaged(source, content)
    path = folder / "text.jsonl"
    if source.random() < 0.3:  # a folder of files instead
        path = folder / "texts"
        path.mkdir()
        (path / "more.txt").write_text("red and blue")
        (path / "text.txt").write_bytes(content)
    else:
        path.write_bytes(content)
    settings = _settings(folder, path=str(path))
    if source.random() < 0.5:  # a tokenizer that is given costs no training
        (folder / "tokenizer.json").write_bytes(_prepared()["tokenizer.json"])
        settings = _settings(folder, path=str(path), tokenizer=str(folder / "tokenizer.json"))
    try:
        done = prepare(settings)
    except (ValueError, OSError) as error:
        return str(error)
    tokenizer = TextTokenizer(done.tokenizer, END)
    ids = IndexedDataset(str(done.prefix))
    found = sorted(tokenizer.decode(ids[i][:-1].tolist()) for i in range(len(ids)))
    wanted = sorted(d.text for d in collect(str(path)) if d.text.strip())
    assert found == wanted
    return None


def pair(source: random.Random, folder: Path) -> str | None:
    """An existing .bin, .idx and tokenizer.json, of which one is damaged."""
    files = dict(_prepared())
    touched = source.choice(sorted(files))
    if source.random() < 0.05:
        del files[touched]
    elif source.random() < 0.9:
        files[touched] = hostile.damaged(source, files[touched])
    for name, content in files.items():
        (folder / name).write_bytes(content)
    settings = _settings(
        folder, path=str(folder / "text"), tokenizer=str(folder / "tokenizer.json")
    )
    try:
        done = prepare(settings)
        TextTokenizer(done.tokenizer, END)
        ids = IndexedDataset(str(done.prefix))
    except (ValueError, OSError) as error:
        return str(error)
    for index in range(len(ids)):  # whatever they are now, they are read within the file
        assert len(ids[index]) == ids.sequence_lengths[index]
    return None


def _settings(folder: Path, **given: str) -> DataSettings:
    return DataSettings(
        vocabulary_size=257, held_out_share=0.3, prepared_folder=str(folder / "prepared"), **given
    )


def _line(source: random.Random, line: str) -> str:
    chance = source.random()
    if chance < 0.85:
        return line
    try:
        mapping = hostile.changed(source, json.loads(line))
        return json.dumps(mapping, ensure_ascii=source.random() < 0.5)
    except RecursionError:
        return '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
