"""From text to token ids: collects documents, trains a tokenizer, writes Megatron's .bin/.idx pair.

Nothing is downloaded: without a path, the text is the documentation of the Python installation that
runs this, together with those of its source files that contain much explanation. All text is read
into memory; for larger corpora, write .bin/.idx with Megatron-LM's tools/preprocess_data.py and
give its prefix.
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
"""To be increased whenever the same text would be prepared differently, so that old files are not
reused."""
TOKENIZER_SAMPLE = 6_000_000
"""Number of characters on which the tokenizer is trained."""
EXPLAINED_SHARE = 1 / 2
"""Minimum share of comments and docstrings in a Python source file that is included as a whole."""
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
"""Folders of Python's library without text for people: installed packages, the source of pydoc's
topics, tests and their data, tables of encodings, and grammars."""
PIECE = 20_000
"""Plain text is split at line ends into documents of about this many characters."""


@dataclass(frozen=True)
class Document:
    """A piece of text that belongs to one split as a whole."""

    name: str
    """Unique name, which determines the position of the document in the order."""
    text: str
    """Its content."""


@dataclass(frozen=True)
class PreparedText:
    """Text in the form that Megatron's datasets read."""

    prefix: Path
    """Path prefix of the .bin and .idx files."""
    tokenizer: Path
    """Path of the tokenizer.json that they were written with."""


class TextTokenizer:
    """A tokenizer of the `tokenizers` library with the attributes that GPTDataset requires.

    Args:
        path: of a tokenizer.json.
        end_of_document: the token between documents.

    Raises:
        ValueError: the file cannot be read, or does not contain the token.
    """

    pad = -1
    """There is no padding token."""

    def __init__(self, path: Path, end_of_document: str) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"data.tokenizer={path} cannot be read: {str(error)[:200]}."
            ) from error
        eod = self.tokenizer.token_to_id(end_of_document)
        if eod is None:
            raise ValueError(
                f"data.end_of_document={end_of_document!r} is not a token of {path}. Name the "
                "token that it uses between documents."
            )
        self.path = path
        self.eod: int = eod
        self.vocab_size: int = self.tokenizer.get_vocab_size()
        self.unique_identifiers = {"content": _hash([path.read_text("utf-8"), end_of_document])}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def prepare(settings: DataSettings) -> PreparedText:
    """Write the text as .bin/.idx, unless the same text was already prepared with the same
    settings.

    Raises:
        ValueError: there is no text, or a file does not have the format that its name says.
        FileNotFoundError: `path` or `tokenizer` does not exist.
    """
    if settings.tokenizer is not None and not Path(settings.tokenizer).is_file():
        raise FileNotFoundError(f"data.tokenizer={settings.tokenizer} does not exist.")
    if settings.path is not None and Path(f"{settings.path}.idx").is_file():
        return _existing(settings)
    documents = _in_order(collect(settings.path))
    if len(documents) < 2:
        raise ValueError(
            f"data.path={settings.path} contains {len(documents)} document(s) with text, too few "
            "to hold one back for validation. Use more text."
        )
    given = Path(settings.tokenizer).read_text("utf-8") if settings.tokenizer else None
    recipe = [FORMAT, settings.end_of_document, given or str(settings.vocabulary_size)]
    key = _hash(recipe + [part for d in documents for part in (d.name, d.text)])
    folder = Path(settings.prepared_folder) / key
    if not folder.is_dir():
        _write(documents, given, settings, folder)
    return PreparedText(folder / "text", folder / "tokenizer.json")


def collect(path: str | None) -> list[Document]:
    """The documents of a file or folder, or with None those that ship with Python.

    Raises:
        ValueError: a file is not UTF-8, or a line of a .jsonl file has no `text`.
        FileNotFoundError: `path` does not exist.
    """
    if path is None:
        return list(_python_documents())
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("*.txt"))
        return [d for f in files for d in _pieces(f, f.relative_to(place).as_posix())]
    if not place.is_file():
        raise FileNotFoundError(
            f"data.path={path} does not exist, neither as a file or folder nor as {path}.bin and "
            f"{path}.idx."
        )
    is_jsonl = place.suffix == ".jsonl"
    return list(_jsonl_documents(place) if is_jsonl else _pieces(place, place.name))


def _python_documents() -> Iterator[Document]:
    """The readable text that ships with Python, about 2 MB.

    It consists of pydoc's topics, text files, the source files with much explanation, and the
    docstrings of all others. The other files of the library teach a small model little that it
    could show: the tests are twice as long as everything else, and tables of encodings are numbers.
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
    """The whole file if much of it is explanation, otherwise its docstrings, of which there may be
    none.
    """
    docstrings = _docstrings(source)
    comments = (line for line in map(str.strip, source.splitlines()) if line.startswith("#"))
    explanation = sum(map(len, docstrings)) + sum(map(len, comments))
    if explanation >= EXPLAINED_SHARE * len(source):
        return source
    return "\n\n".join(docstrings)


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():  # about deprecated escape sequences
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
    """Whether a string has no lone surrogate, which JSON can express but tokenizers refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}. Convert it to UTF-8.") from error


def _in_order(documents: list[Document]) -> list[Document]:
    """Documents that contain text, in an order unrelated to their content.

    The held-out split is the end of this order, so each kind of document occurs in both splits.
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
            f"data.path={settings.path} names token ids whose tokenizer is unknown. Set "
            "data.tokenizer to its tokenizer.json."
        )
    if not Path(f"{settings.path}.bin").is_file():
        raise FileNotFoundError(f"{settings.path}.idx exists, but {settings.path}.bin does not.")
    assert settings.path is not None
    _check_pair(Path(f"{settings.path}.idx"), Path(f"{settings.path}.bin"))
    return PreparedText(Path(settings.path), Path(settings.tokenizer))


_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_ID_CODES = {kind.value for kind in DType if "int" in kind.name}
"""Codes in an .idx file for the types that token ids may have."""


def _check_pair(index: Path, ids: Path) -> None:
    """Raise ValueError if an .idx file is not a valid index, or refers to data beyond its own or
    the .bin's end.

    Megatron maps both files into memory and would follow any offset in the index.
    """
    wrong = f"{index} is empty, damaged or not an index of Megatron-Core's datasets"
    fix = "Write the pair again with Megatron-LM's tools/preprocess_data.py, or use other text."
    with index.open("rb") as file:
        head = file.read(34)
        if len(head) < 34 or head[:9] != _INDEX_MAGIC:
            raise ValueError(f"{wrong}: its header is not that of an index. {fix}")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in _ID_CODES:
        raise ValueError(f"{wrong}: version {version} or type code {code} is unknown. {fix}")
    needed, size = 34 + 12 * sequences + 8 * documents, index.stat().st_size
    if size < needed:
        raise ValueError(f"{wrong}: it has {size:,} bytes but needs {needed:,}. {fix}")
    if sequences < 1 or documents < 2:
        raise ValueError(f"{index} lists no documents. {fix}")
    lengths = numpy.memmap(index, numpy.int32, "r", 34, (sequences,))
    starts = numpy.memmap(index, numpy.int64, "r", 34 + 4 * sequences, (sequences,))
    bounds = numpy.memmap(index, numpy.int64, "r", 34 + 12 * sequences, (documents,))
    is_ordered = bounds[0] == 0 and bounds[-1] == sequences and (numpy.diff(bounds) >= 0).all()
    if lengths.min() < 0 or starts.min() < 0 or not is_ordered:
        raise ValueError(f"{wrong}: its lengths and offsets are inconsistent. {fix}")
    ends = starts + lengths.astype(numpy.int64) * DType.size(code)
    if ends.max() > ids.stat().st_size:
        raise ValueError(
            f"{ids} has {ids.stat().st_size:,} bytes, but {index.name} lists {ends.max():,}: it "
            f"was truncated, or belongs to another index. {fix}"
        )


def _write(
    documents: list[Document], tokenizer: str | None, settings: DataSettings, folder: Path
) -> None:
    """Write into a temporary folder and rename it, so that an incomplete one is never read."""
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
    """Train a byte-level BPE on a sample of the training split; returns the content of a
    tokenizer.json.
    """
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
