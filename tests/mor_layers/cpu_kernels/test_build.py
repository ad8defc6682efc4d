"""The library of kernels: made once, whole, and not missed where it cannot be made."""

import ctypes
import logging
from pathlib import Path

import pytest

from mor_layers.cpu_kernels import build


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for compiled extensions, and sources that compile in no time."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "FOLDER", sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions" / "mor_layers"


def test_a_library_is_made_once_and_again_when_its_source_changes(folder: Path) -> None:
    first = build._built("c++")
    assert ctypes.CDLL(str(first)).answer() == 42
    made = first.stat().st_mtime_ns
    assert build._built("c++") == first and first.stat().st_mtime_ns == made
    (build.FOLDER / "one.cpp").write_text('extern "C" int answer() { return 43; }\n')
    assert build._built("c++") != first
    names = {path.suffix for path in folder.iterdir()}
    assert names == {".so", ".lock"}, "nothing half-written is left"


def test_what_cannot_be_compiled_is_said_once_and_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (build.FOLDER / "one.cpp").write_text("this is no C++\n")
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert "plain PyTorch takes their place" in caplog.text
    assert "one.cpp" in caplog.text, "the compiler's own words"
    assert not list(folder.glob("*.so"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    caplog.clear()
    assert build.library.__wrapped__() is None
    assert not caplog.text, "without a compiler there is nothing to mend"


def test_processors_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder may be shared by machines of several kinds."""
    here = build._built("c++")
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    assert build._built("c++") != here
