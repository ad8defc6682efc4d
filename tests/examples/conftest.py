"""Text for the small experiments."""

import json

import pytest

from experiments import text_pieces


@pytest.fixture
def short_text(monkeypatch, tmp_path) -> None:
    """Small text in place of what ships with Python."""
    file = tmp_path / "text.jsonl"
    lines = ({"text": f"document {i}: " + "red blue " * (i % 7 + 2)} for i in range(90))
    file.write_text("\n".join(map(json.dumps, lines)))
    settings = text_pieces.DataSettings

    def small(**given: int):
        return settings(path=str(file), prepared_folder=str(tmp_path / "prepared"), **given)

    monkeypatch.setattr(text_pieces, "DataSettings", small)
