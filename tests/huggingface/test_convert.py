"""The commands of docs/pages/checkpoints.md make a Llama recursive and unroll it again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mor_commands import main
from mor_layers.model_folder import load_model

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "checkpoints.md"
COMMANDS = [
    line.removeprefix("mor ").split()
    for line in PAGE.read_text("utf-8").splitlines()
    if line.startswith("mor convert")
]


def run(folder: Path, commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    """`mor` with each of these arguments, in one process: what it imports takes seconds."""
    code = f"from mor_commands import main\nfor arguments in {commands}: main(arguments)"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.core.small_models import randomized

    folder = tmp_path_factory.mktemp("convert")
    sizes = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=2,
    )
    randomized(LlamaForCausalLM(sizes)).save_pretrained(folder / "llama")
    result = run(folder, COMMANDS)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_commands_of_the_page_keep_logits(folder):
    from transformers import AutoModelForCausalLM

    assert len(COMMANDS) == 2
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = load_model(folder / "recursive")(ids).logits
    unrolled = AutoModelForCausalLM.from_pretrained(folder / "unrolled").eval()
    torch.testing.assert_close(unrolled(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert unrolled.config.eos_token_id == 2


def test_errors_are_told_in_a_line_and_leave_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for arguments, message in (
        (["llama", "unrolled"], "unrolled exists"),
        (["nowhere", "new"], "there is no nowhere"),
        (["recursive", "new", "--recursions", "3"], "has a recursion"),
        (["llama", "new", "--recursions", "4"], "cannot split 6 shared layers"),
        (["llama", "new", "--router", "expert_choice"], "--router has no effect without"),
    ):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(SystemExit, match="2"):
            main(["convert", *arguments])
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == before
