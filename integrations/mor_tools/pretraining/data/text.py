"""From text to token ids: collect documents, train a tokenizer, write Megatron's .bin/.idx pair.

Nothing is downloaded: without a path the text is the documentation that ships with the Python
running this, and those of its source files that explain themselves. Everything is read into memory;
for corpora beyond that, write .bin/.idx with Megatron-LM's tools/preprocess_data.py and give its
prefix.
"""

import ast
import hashlib
import json
import shutil
import struct
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mor_tools.pretraining.settings import DataSettings

FORMAT = "1"
"""Changed whenever the same text would be prepared differently."""
TOKENIZER_SAMPLE = 6_000_000
"""Characters the tokenizer is trained on."""
EXPLAINED_SHARE = 1 / 2
"""Share of comments and docstrings from which a source file of Python comes in whole."""
NOT_PROSE = {
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "turtledemo",
    "ensurepip",
}
"""Folders of Python's library without text for people: what is installed beside it, the source of
pydoc's topics, tests and their data, tables of encodings, and grammars."""
PIECE = 20_000
"""Plain text is cut, at ends of lines, into documents of about this many characters."""


@dataclass(frozen=True)
class Document:
    """A piece of text that training never mixes with the held-out split."""

    name: str
    """Unique; decides where in the order the document comes."""
    text: str
    """Its content."""


@dataclass(frozen=True)
class PreparedText:
    """Text that Megatron's datasets can read."""

    prefix: Path
    """Of the .bin and .idx files."""
    tokenizer: Path
    """Of the tokenizer.json they were written with."""


class TextTokenizer:
    """A tokenizer of the `tokenizers` library with the attributes that GPTDataset looks for.

    Args:
        path: of a tokenizer.json.
        end_of_document: the token between documents.

    Raises:
        ValueError: the file cannot be read, or lacks the token.
    """

    pad = -1
    """No id stands for padding."""

    def __init__(self, path: Path, end_of_document: str) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"data.tokenizer={path} cannot be read: {str(error)[:200]}."
            ) from error
        eod = self.tokenizer.token_to_id(end_of_document)
        if eod is None:
            raise ValueError(
                f"data.end_of_document={end_of_document!r} is no token of {path}. Name the token "
                "that stands between documents there."
            )
        self.path = path
        self.eod: int = eod
        self.vocab_size: int = self.tokenizer.get_vocab_size()
        self.unique_identifiers = {"content": _hash([path.read_text("utf-8"), end_of_document])}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def prepare(settings: DataSettings) -> PreparedText:
    """Writes the text as .bin/.idx, once: later calls with the same text and settings find it.

    Raises:
        ValueError: there is no text, or it is not what its name says.
        FileNotFoundError: `path` or `tokenizer` does not exist.
    """
    if settings.tokenizer is not None and not Path(settings.tokenizer).is_file():
        raise FileNotFoundError(f"data.tokenizer={settings.tokenizer}: there is no such file.")
    if settings.path is not None and Path(f"{settings.path}.idx").is_file():
        return _existing(settings)
    documents = _in_order(collect(settings.path))
    if len(documents) < 2:
        raise ValueError(
            f"data.path={settings.path} holds {len(documents)} document(s) with text, too few to "
            "hold one back for validation. Give more text."
        )
    given = Path(settings.tokenizer).read_text("utf-8") if settings.tokenizer else None
    recipe = [FORMAT, settings.end_of_document, given or str(settings.vocabulary_size)]
    key = _hash(recipe + [part for d in documents for part in (d.name, d.text)])
    folder = Path(settings.prepared_folder) / key
    if not folder.is_dir():
        _write(documents, given, settings, folder)
    return PreparedText(folder / "text", folder / "tokenizer.json")


def collect(path: str | None) -> list[Document]:
    """The documents of a file or folder; None: those that ship with Python.

    Raises:
        ValueError: the file is not UTF-8, or a line of a .jsonl file has no `text`.
        FileNotFoundError: there is nothing at `path`.
    """
    if path is None:
        return list(_python_documents())
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("*.txt"))
        return [d for f in files for d in _pieces(f, f.relative_to(place).as_posix())]
    if not place.is_file():
        raise FileNotFoundError(
            f"data.path={path}: there is no such file or folder, nor {path}.bin and {path}.idx."
        )
    is_jsonl = place.suffix == ".jsonl"
    return list(_jsonl_documents(place) if is_jsonl else _pieces(place, place.name))


def _python_documents() -> Iterator[Document]:
    """What a person would read of what ships with Python, about 2 MB.

    pydoc's topics, text files, the source files that explain themselves, and the docstrings of all
    others. The library's other files teach a small model little that it can show: tests are twice as
    long as all the rest, and tables of encodings are numbers.
    """
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"pydoc/{name}", text)
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*")):
        name = file.relative_to(library)
        if file.suffix not in {".py", ".txt", ".rst"} or NOT_PROSE & set(name.parts[:-1]):
            continue
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(name.as_posix(), _prose(text) if file.suffix == ".py" else text)


def _prose(source: str) -> str:
    """A source file that explains itself, whole; of any other the docstrings, which may be none."""
    docstrings = _docstrings(source)
    comments = (line for line in map(str.strip, source.splitlines()) if line.startswith("#"))
    explanation = sum(map(len, docstrings)) + sum(map(len, comments))
    if explanation >= EXPLAINED_SHARE * len(source):
        return source
    return "\n\n".join(docstrings)


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():  # of escape sequences that Python will no longer read
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented))
    return [docstring for docstring in found if docstring]


def _pieces(file: Path, name: str) -> Iterator[Document]:
    pieces: list[list[str]] = [[]]
    size = 0
    for line in _read(file).splitlines(keepends=True):
        pieces[-1].append(line)
        size += len(line)
        if size >= PIECE:
            pieces.append([])
            size = 0
    for number, piece in enumerate(pieces):
        yield Document(f"{name}:{number}", "".join(piece))


def _jsonl_documents(file: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str) or not _is_unicode(text):
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with a string under 'text', "
                f"got {line[:60]!r}."
            )
        yield Document(f"{file.name}:{number}", text)


def _is_unicode(text: str) -> bool:
    """Whether there is no lone surrogate, which JSON can escape and tokenizers refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}. Convert it first.") from error


def _in_order(documents: list[Document]) -> list[Document]:
    """Documents with text, in an order unrelated to their content.

    The held-out split is the last share of them, so each kind of document is in both splits.
    """
    return sorted((d for d in documents if d.text.strip()), key=lambda d: _hash([d.name]))


def _hash(parts: list[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _existing(settings: DataSettings) -> PreparedText:
    if settings.tokenizer is None:
        raise ValueError(
            f"data.path={settings.path} names token ids, whose tokenizer is not known. "
            "Set data.tokenizer to its tokenizer.json."
        )
    if not Path(f"{settings.path}.bin").is_file():
        raise FileNotFoundError(f"{settings.path}.idx is there, but {settings.path}.bin is not.")
    assert settings.path is not None
    _check_pair(Path(f"{settings.path}.idx"), Path(f"{settings.path}.bin"))
    return PreparedText(Path(settings.path), Path(settings.tokenizer))


_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_ID_CODES = {kind.value for kind in DType if "int" in kind.name}
"""Of the kinds of numbers that ids can be."""


def _check_pair(index: Path, ids: Path) -> None:
    """Raise ValueError where an .idx is no index, or asks for more than it or the .bin holds.

    Megatron maps both files into memory and would follow whatever the index says.
    """
    wrong = f"{index} is empty, damaged or no index of Megatron-Core's datasets"
    fix = "Write the pair again with Megatron-LM's tools/preprocess_data.py, or name other text."
    with index.open("rb") as file:
        head = file.read(34)
        if len(head) < 34 or head[:9] != _INDEX_MAGIC:
            raise ValueError(f"{wrong}: it does not begin like one. {fix}")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in _ID_CODES:
        raise ValueError(f"{wrong}: version {version}, numbers of kind {code}. {fix}")
    needed, size = 34 + 12 * sequences + 8 * documents, index.stat().st_size
    if size < needed:
        raise ValueError(f"{wrong}: it has {size:,} bytes and needs {needed:,}. {fix}")
    if sequences < 1 or documents < 2:
        raise ValueError(f"{index} lists no documents. {fix}")
    lengths = numpy.memmap(index, numpy.int32, "r", 34, (sequences,))
    starts = numpy.memmap(index, numpy.int64, "r", 34 + 4 * sequences, (sequences,))
    bounds = numpy.memmap(index, numpy.int64, "r", 34 + 12 * sequences, (documents,))
    is_ordered = bounds[0] == 0 and bounds[-1] == sequences and (numpy.diff(bounds) >= 0).all()
    if lengths.min() < 0 or starts.min() < 0 or not is_ordered:
        raise ValueError(f"{wrong}: its lengths and places make no sense. {fix}")
    ends = starts + lengths.astype(numpy.int64) * DType.size(code)
    if ends.max() > ids.stat().st_size:
        raise ValueError(
            f"{ids} has {ids.stat().st_size:,} bytes, and {index.name} lists {ends.max():,}: it was "
            f"cut, or belongs to another index. {fix}"
        )


def _write(
    documents: list[Document], tokenizer: str | None, settings: DataSettings, folder: Path
) -> None:
    """Fills a folder under another name first, so that a half-written one is never read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        tokenizer = tokenizer or train_tokenizer(documents, settings)
        (unfinished / "tokenizer.json").write_text(tokenizer, "utf-8")
        chosen = TextTokenizer(unfinished / "tokenizer.json", settings.end_of_document)
        _write_ids(documents, chosen, unfinished / "text")
        if not folder.is_dir():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def train_tokenizer(documents: list[Document], settings: DataSettings) -> str:
    """A byte-level BPE, as the content of a tokenizer.json, from a sample of the training split."""
    training = documents[: max(1, round(len(documents) * (1 - settings.held_out_share)))]
    size = sum(len(document.text) for document in training)
    sample = training[:: max(1, size // TOKENIZER_SAMPLE)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=[settings.end_of_document],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in sample), trainer)
    return tokenizer.to_str()


def _write_ids(documents: list[Document], tokenizer: TextTokenizer, prefix: Path) -> None:
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for start in range(0, len(documents), 64):
        texts = [document.text for document in documents[start : start + 64]]
        for encoding in tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False):
            builder.add_document([*encoding.ids, tokenizer.eod], [len(encoding.ids) + 1])
    builder.finalize(f"{prefix}.idx")
