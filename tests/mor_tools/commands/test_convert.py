"""The commands of docs/pages/checkpoints.md, and what `mor convert` says and holds."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mor_layers import DecoderConfig, MoRTransformer, load_model, save_model
from mor_layers.weights import open_model
from mor_tools.commands import main

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "pages" / "checkpoints.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TINY_MODEL = next(text for language, text in BLOCKS if language == "python")
COMMANDS = "".join(text for language, text in BLOCKS if language == "bash")


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """After the page's commands, in this process: what `mor` imports takes seconds."""
    folder = tmp_path_factory.mktemp("convert")
    commands = [shlex.split(line) for line in COMMANDS.splitlines()]
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(printed):
        exec(TINY_MODEL, {})
        for program, *arguments in commands:
            assert (program, arguments[0]) == ("mor", "convert")
            main(arguments)
    assert printed.getvalue().count("largest difference of logits: ") == len(commands)
    return folder


def test_the_commands_of_the_page_keep_logits(folder):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = load_model(folder / "recursive")(ids).logits
    unrolled = AutoModelForCausalLM.from_pretrained(folder / "unrolled").eval()
    torch.testing.assert_close(unrolled(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert unrolled.config.eos_token_id == 2
    routed, again = (open_model(folder / name) for name in ("routed", "routed-again"))
    assert all(torch.equal(routed.weights[name], again.weights[name]) for name in routed.weights)
    assert open_model(folder / "trained").facts["eos_token_id"] == 2


@pytest.mark.full
def test_the_page_runs_in_a_shell(tmp_path):
    command = tmp_path / "bin" / "mor"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom mor_tools.commands import main\n\nmain()\n")
    command.chmod(0o755)
    assert run(tmp_path, TINY_MODEL).returncode == 0
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    source = os.pathsep.join((str(ROOT), str(ROOT / "integrations")))
    result = subprocess.run(
        ["bash", "-ec", COMMANDS],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": source},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    python = [text for language, text in BLOCKS if language == "python"]
    assert run(tmp_path, "\n".join(python[1:])).returncode == 0


def test_deltas_of_full_rank_reproduce_the_dense_model(folder):
    from transformers import AutoModelForCausalLM

    how = ["--recursions", "3", "--init", "stepwise", "--relax-rank", "32"]
    main(["convert", str(folder / "llama"), str(folder / "relaxed"), *how])
    relaxed = load_model(folder / "relaxed").eval()
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    llama = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    torch.testing.assert_close(relaxed(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
    shared = load_model(folder / "recursive").eval()
    assert (shared(ids).logits - llama(ids).logits).abs().max() > 1e-2


def test_steps_with_sublayers_of_their_own_reproduce_the_dense_model(folder):
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    apart = []
    for sublayers in (["attention"], ["attention", "mlp"]):
        written = folder / "-".join(["own", *sublayers])
        how = ["--recursions", "3", "--own-per-step", *sublayers]
        main(["convert", str(folder / "llama"), str(written), *how])
        own = load_model(written).eval()
        assert own.config.recursion.own_per_step == tuple(sublayers)
        apart.append((own(ids).logits - llama(ids).logits).abs().max().item())
    assert apart[0] > 1e-2 and apart[1] < 1e-5


def test_a_prelude_and_a_coda_of_any_length_come_from_a_llama_and_go_back(folder):
    from transformers import AutoModelForCausalLM

    how = ["--recursions", "2", "--sharing", "cycle", "--prelude", "1", "--coda", "3"]
    main(["convert", str(folder / "llama"), str(folder / "ends"), *how])
    main(["convert", str(folder / "ends"), str(folder / "ends-unrolled"), "--to", "llama"])
    ends = load_model(folder / "ends").eval()
    assert [len(part.layers) for part in (ends.prelude, ends.coda)] == [1, 3]
    llama = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    for ours, theirs in ((ends.prelude.layers[0], 0), (ends.coda.layers[0], 5)):
        original = llama.model.layers[theirs].self_attn.q_proj.weight
        assert torch.equal(ours.attention.query.weight, original)
    again = AutoModelForCausalLM.from_pretrained(folder / "ends-unrolled").eval()
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(again(ids).logits, ends(ids).logits, rtol=1e-5, atol=1e-5)


def test_errors_are_told_in_a_line_and_leave_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for arguments, message in (
        (["llama", "unrolled"], "unrolled already exists"),
        (["nowhere", "new"], "nowhere does not exist"),
        (["recursive", "new", "--recursions", "3"], "has a recursion"),
        (
            ["llama", "new", "--recursions", "4"],
            "--sharing sequence: 2, 4, 8; --sharing middle_cycle: 2, 3, 6;",
        ),
        (["llama", "new", "--router", "expert_choice"], "--router has no effect without"),
        (["llama", "new", "--prelude", "2"], "--prelude has no effect without"),
        (["llama", "new", "--recursions", "2", "--coda", "-1"], "coda_layers=-1 must be at least"),
        (
            ["llama", "new", "--recursions", "2", "--prelude", "3", "--to", "published"],
            "published checkpoints cannot express prelude_layers=3 and coda_layers=None",
        ),
        (["llama", "new", "--settings", "any.yaml"], "--settings has no effect"),
        (["llama", "new", "--relax-rank", "2"], "--relax-rank has no effect without"),
        (
            ["llama", "new", "--recursions", "3", "--relax-kind", "dora"],
            "--relax-kind has no effect without --relax-rank",
        ),
        (["llama", "new", "--recursions", "3", "--relax-rank", "0"], "rank=0"),
        (["llama", "new", "--own-per-step", "mlp"], "--own-per-step has no effect without"),
        (["routed", "new", "--to", "llama"], "cannot be written as a Llama"),
        (["relaxed", "new", "--to", "published"], "not supported by the published code"),
        (
            ["llama", "new", "--recursions", "3", "--relax-rank", "2", "--to", "published"],
            "not supported by the published code",
        ),
    ):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(SystemExit, match="2"):
            main(["convert", *arguments])
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == before


MEASURE = """
import resource
from mor_tools.commands import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def convert(source, target, to):
    main(["convert", source, target, "--to", to, "--no-verify"])

ways = [("mor", "megatron"), ("megatron", "mor"), ("mor", "published"), ("published", "llama"),
        ("llama", "mor")]
for size in ("small", "large"):
    before = peak()
    for place, (source, to) in enumerate(ways):
        convert(f"{size}{place}", f"{size}{place + 1}", to)
print(peak() - before)
"""


@pytest.mark.full
def test_no_copy_of_the_model_is_held(tmp_path):
    small = DecoderConfig(61, 32, 64, 4, 4)
    save_model(MoRTransformer(small), tmp_path / "small0")
    config = DecoderConfig(4000, 256, 768, 28, 4)
    save_model(MoRTransformer(config), tmp_path / "large0")
    size = (tmp_path / "large0" / "model.safetensors").stat().st_size
    assert size > 100e6
    result = run(tmp_path, MEASURE)
    assert result.returncode == 0, result.stderr
    assert 0 <= int(result.stdout.splitlines()[-1]) < 0.4 * size
