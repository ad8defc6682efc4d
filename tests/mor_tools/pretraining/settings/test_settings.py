"""Settings of the pretraining script: what is read, and how wrong ones are answered."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mor_layers import ExpertChoice, FixedDepth, TokenChoice
from mor_tools.pretraining import endings, run_folder
from mor_tools.pretraining.command_line import load_settings, schema
from mor_tools.pretraining.data.text import PreparedText
from mor_tools.pretraining.models import sizes
from mor_tools.pretraining.settings import Settings

CONFIGS = Path(__file__).parents[4] / "examples" / "configs"
TINY = ["--config", str(CONFIGS / "tiny.yaml")]

WRONG = {
    "model.hiden_size=64": "unknown setting 'hiden_size'. Allowed: ffn_hidden_size",
    "model.hidden_size=100": "even multiple of num_heads=6",
    "model.hidden_size=0": "model.hidden_size=0 must be at least 1",
    "model.hidden_size=wide": "model.hidden_size='wide': expected int",
    "model.num_kv_heads=4": "num_kv_heads=4 must divide num_heads=6",
    "model.num_unrolled_layers=9": "Use 8 or 11",
    "model.moe.num_experts=1": "num_experts=1 must be at least 2",
    "model.moe.experts_per_token=5": "between 1 and num_experts=4",
    "model.moe.balance_coefficient=-1": "balance_coefficient=-1.0 must be at least 0",
    "model.moe.dispatcher=flex": "use one of allgather, alltoall",
    "recursion.num_recursions=0": "num_recursions=0 must be at least 1",
    "recursion.sharing=spiral": "use one of cycle, sequence",
    "recursion.kv_policy=none": "recursion.kv_policy",
    "recursion.router.type=best": "recursion.router.type='best' is not registered",
    "recursion.router.alpha=0": "alpha=0.0 must be above 0",
    "recursion.router.capacity_factors=[1,0.5]": "2 entries for 3 recursions",
    "recursion.router.balancing=loss": "unknown setting 'balancing'",
    "recursion.expert_routers=two": "recursion.expert_routers",
    "parallel.tensor=0": "parallel.tensor=0 must be at least 1",
    "parallel.tensor=3": "must be a multiple of parallel.tensor=3",
    "parallel.tensor=1": "sequence_parallel=True has no effect",
    "parallel.sequence_parallel=false": "needs parallel.sequence_parallel=True",
    "parallel.context=0": "parallel.context=0 must be at least 1",
    "parallel.context=3": "data.sequence_length=256 must be a multiple of 6",
    "parallel.expert=3": "must divide model.moe.num_experts=4",
    "parallel.pipeline=4": "exceeds the 3 parts of the model",
    "parallel.pipeline_layout=steps_as_stages": "has no effect with parallel.pipeline=1",
    "parallel.pipeline_layout=diagonal": "use one of one_stage, steps_as_stages",
    "model.moe.ffn_hidden_size=255": "model.moe.ffn_hidden_size=255 must be a multiple",
    "data.held_out_share=0": "held_out_share=0.0 must lie in (0, 1)",
    "data.vocabulary_size=100": "vocabulary_size=100 must be at least 257",
    "data.sequence_length=0": "sequence_length=0 must be at least 2",
    "data.sequence_length=96": "sample_tokens=96 leaves no room",
    "training.steps=0": "training.steps=0 must be at least 1",
    "training.steps=1.5": "training.steps=1.5: expected int",
    "training.steps=50": "do not fit into steps=50",
    "training.stop_after=1000": "stop_after=1000 is beyond steps",
    "training.learning_rate=0": "learning_rate=0.0 must be > 0",
    "training.learning_rate=.nan": "learning_rate=nan must be > 0",
    "training.final_learning_rate=1": "must not exceed learning_rate",
    "training.adam_beta2=1": "adam_beta2=1.0 must lie in (0, 1)",
    "training.precision=fp8": "use one of fp32, bf16",
    "training.recompute=some": "use one of none, selective, full",
    "training.seed=-1": "seed=-1 must be at least 0",
    "evaluation.every=0": "evaluation.every=0 must be at least 1",
    "evaluation.prompt=''": "prompt is empty",
    "log_every=0": "log_every=0 must be at least 1",
    "peak_tflops=0": "peak_tflops=0.0 must be above 0",
    "output=''": "output is empty",
    "model=[1": "cannot be read",
    "model=[]": "model=[]: expected a mapping of settings",
    "model.moe=[]": "model.moe=[]: expected a mapping of settings",
    "recursion=[1]": "recursion[0]: expected a mapping of settings, got 1",
    "recursion=[]": "recursion=[] is empty",
    "recursion=[{num_recursions: 2}, {num_recursions: 3}]": "Set block_layers for all 2 recursions but",
    "recursion=[{num_recursions: 2, router: []}]": "recursion[0].router=[]: expected a mapping",
    "recursion.router=[]": "recursion.router=[]: expected a mapping of settings",
    f"model={'[' * 3000}{']' * 3000}": "nested too deeply",
    "model.num_unrolled_layers=1000001": "must be at most 4096",
    "recursion.num_recursions=1000000": "num_recursions=1000000 must be at most 4096",
    "model.hidden_size=10000000000000000000008": "hidden_size=10000000000000000000008 must be at most",
    "model.moe.num_experts=1000000": "num_experts=1000000 must be at most 4096",
    "model.rope_base=10000000000000000000": "rope_base=10000000000000000000 must be at most",
    "model.rms_norm_epsilon=.inf": "rms_norm_epsilon=inf must be above 0, and finite",
    "model.moe.z_loss_coefficient=.inf": "z_loss_coefficient=inf must be finite",
    "data.sequence_length=1": "sequence_length=1 must be at least 2",
    "data.vocabulary_size=1000000000000": "vocabulary_size=1000000000000 must be at most",
    "data.workers=1000000000": "workers=1000000000 must be at most 256",
    "data.path=''": "data.path is empty",
    "data.end_of_document=''": "data.end_of_document is empty",
    "training.timeout_seconds=1e30": "timeout_seconds=1e+30 must be above 0, and at most 2592000",
    "training.learning_rate=.inf": "learning_rate=inf must be > 0, and finite",
    "training.weight_decay=.inf": "weight_decay=inf must be finite",
    "training.seed=99999999999999999999": "seed=99999999999999999999 must be at most 4294967295",
    "training.initial_weights=''": "initial_weights is empty",
    "evaluation.temperature=1e-40": "temperature=1e-40 must lie in 0.001..1000, or be 0",
    "evaluation.temperature=.inf": "temperature=inf must lie in",
    "evaluation.temperature=.nan": "temperature=nan must lie in",
    'output="a\\0b"': "contains a character that is not valid text",
    'evaluation.prompt="\\ud800"': "invalid Unicode character",
    "peak_tflops=.inf": "peak_tflops=inf must be above 0 and finite",
    "training.steps=${missing}": "Interpolation key 'missing' not found",
    "steps": "is not a key=value setting",
    "--steps=3": "is not a key=value setting",
}


@pytest.mark.parametrize(
    ("override", "answer"), WRONG.items(), ids=[override[:40] for override in WRONG]
)
def test_a_wrong_setting_is_answered_with_what_is_allowed(override, answer):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        load_settings([*TINY, override])
    assert answer in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["parallel.pipeline=4"], "model.num_unrolled_layers=14, or parallel"),
        (["parallel.pipeline=3", "model.num_unrolled_layers=17"], "=11 or 20, or parallel"),
        (["recursion=null"], "needs a recursion"),
        (
            ["recursion.num_recursions=1", "recursion.router.type=fixed_depth"],
            "a single step is not repeated",
        ),
        (
            ["recursion.sharing=middle_sequence", "recursion.router.type=fixed_depth"],
            "Use 'cycle' or 'middle_cycle'",
        ),
    ],
)
def test_steps_that_cannot_be_stages_are_answered(overrides, answer):
    spread = ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"]
    with pytest.raises(ValueError, match=answer):
        load_settings([*TINY, *spread, *overrides])


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("training.steps=1000000000000000000", "Lower one of these settings"),
        ("evaluation.batches=100000000000", "evaluation.batches=100000000000 asks for"),
        ("training.global_batch_size=80000000000", "Their order alone takes"),
        ("model.hidden_size=1200000", "Lower the sizes under model."),
        ("model.ffn_hidden_size=16777216", "Lower the sizes under model."),
        ("model.num_unrolled_layers=4088", ""),  # a deep one of this width has room
    ],
)
def test_what_no_machine_holds_is_refused_before_memory_is_taken(override, answer):
    settings = load_settings([*TINY, override])
    before = time.monotonic()
    try:
        sizes.require_room(settings)
        told = ""
    except ValueError as error:
        told = str(error)
    assert time.monotonic() - before < 2  # the whole point: it must not be tried out
    assert answer in told
    assert bool(answer) == bool(told)


def test_what_every_process_is_refused_for_is_told_once_and_last(tmp_path):
    """By torchrun, which has a traceback of its own to print."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom mor_tools.pretraining import endings\n"
        "endings.tell('steps=0 must be at least 1.', os.environ['LOCAL_RANK'] == '0')\n"
        "raise SystemExit(2)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", script], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.count("steps=0 must be at least 1.") == 1
    last = [line for line in done.stderr.splitlines() if line.strip("=- ")][-1]
    assert last.strip() == "error: steps=0 must be at least 1."


def test_without_torchrun_an_ending_is_told_by_the_process(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(endings, "PATIENCE", 0.0)
    endings.tell("one fails alone.", is_first_on_machine=False)
    assert capsys.readouterr().err == "error: one fails alone.\n"


def test_routers_over_experts_need_experts():
    with pytest.raises(ValueError, match="needs layers with experts"):
        load_settings([*TINY, "model.moe=null", "recursion.expert_routers=per_step"])


@pytest.mark.parametrize(
    ("world_size", "overrides", "answer"),
    [
        (3, [], "3 processes cannot hold copies of parallel.tensor=2"),
        (2, ["parallel.expert=4"], "parallel.expert=4 must divide the 2 processes"),
        (4, [], "Use a multiple of 16"),
        (
            4,
            ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"],
            "in groups of 2. Use a multiple of 16",
        ),
    ],
)
def test_a_wrong_number_of_processes_is_answered(world_size, overrides, answer):
    settings = load_settings([*TINY, *overrides])
    with pytest.raises(ValueError, match=answer):
        settings.data_parallel_size(world_size)


def test_processes_beyond_a_model_are_copies():
    settings = load_settings([*TINY, "training.global_batch_size=32"])
    assert settings.data_parallel_size(8) == 4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_file_is_valid(path):
    settings = load_settings(["--config", str(path)])
    assert settings.output.startswith(f"runs/{path.stem.split('_')[0]}")


def test_defaults_are_valid_and_overrides_win_over_the_file():
    assert load_settings([]) == Settings()
    settings = load_settings([*TINY, "training.learning_rate=1e-3", "model.moe=null"])
    assert settings.training.learning_rate == 1e-3
    assert settings.model.moe is None
    assert settings.model.hidden_size == 192


def test_another_router_type_starts_from_its_own_defaults():
    assert isinstance(load_settings(TINY).recursion.router, ExpertChoice)
    overrides = ["recursion.router.type=token_choice", "recursion.router.temperature=2"]
    assert load_settings([*TINY, *overrides]).recursion.router == TokenChoice(temperature=2.0)


def test_a_router_of_ones_own_is_named_by_module_and_class():
    name = "mor_layers.routers.loops.baselines:FixedDepth"
    assert load_settings([*TINY, f"recursion.router.type={name}"]).recursion.router == FixedDepth()


def test_a_missing_configuration_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_settings(["--config", "nowhere.yaml"])


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert schema() in printed
    for expected in (
        "hidden_size: int = 192",
        "Width of the residual stream",
        "type: token_choice",
        "stop_after: int | null = null",
    ):
        assert expected in printed


def _claimed(folder: Path, *overrides: str) -> tuple[Settings, PreparedText]:
    text = PreparedText(folder / "prepared" / "key" / "text", folder / "tokenizer.json")
    return load_settings([*TINY, f"output={folder / 'run'}", *overrides]), text


def test_a_folder_keeps_the_settings_of_its_run(tmp_path):
    settings, text = _claimed(tmp_path)
    assert not run_folder.is_complete(settings)
    run_folder.claim(settings, text)
    faster, _ = _claimed(tmp_path, "parallel.distributed_optimizer=true", "log_every=1")
    assert not run_folder.is_complete(faster)
    wider, _ = _claimed(tmp_path, "model.hidden_size=384", "training.steps=300")
    with pytest.raises(ValueError, match=r"hidden_size was 192, now 384; training.steps was 400"):
        run_folder.is_complete(wider)


def test_a_folder_keeps_the_text_of_its_run(tmp_path):
    settings, text = _claimed(tmp_path)
    run_folder.claim(settings, text)
    run_folder.claim(settings, text)
    other = PreparedText(tmp_path / "prepared" / "other" / "text", text.tokenizer)
    with pytest.raises(ValueError, match="run on other text"):
        run_folder.claim(settings, other)
