"""Files that stand for more than they hold, refused before memory is taken."""

import time

import pytest

from mor_layers.settings.yaml_files import read_yaml


def test_a_file_with_aliases_and_interpolations_is_read(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &a [1, 2]\nb: *a\nc: ${a}\n")
    values = read_yaml(file)
    assert values["b"] == [1, 2] and values["c"] == [1, 2]


def doubling(levels: int) -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (doubling(40), "expansion exceeds"),
        ("a: &a [*a]", "cannot be read"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: [", "cannot be read"),
        ("# " + "x" * 2_000_000, "has 2,000,002 bytes"),
    ],
)
def test_a_file_that_cannot_be_settings_is_refused_at_once(tmp_path, text, reason):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=reason) as refusal:
        read_yaml(file)
    assert time.monotonic() - begun < 5 and str(file) in str(refusal.value)
    assert len(str(refusal.value)) < 500
