"""`mor plan` on the example configurations, its errors, and its rules against the script's."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from mor_layers import from_mapping
from mor_tools.commands import main
from mor_tools.planner import (
    HARDWARE,
    Layout,
    Plan,
    evaluate,
    nearest,
    refusal,
    search,
    starvation,
)
from mor_tools.pretraining.command_line import read_settings
from mor_tools.pretraining.models.workload import workload
from mor_tools.pretraining.settings import Settings

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
CLUSTER, TINY = CONFIGS / "cluster_360m.yaml", CONFIGS / "tiny.yaml"


def test_a_plan_of_the_cluster_is_written_and_drawn_best_first(tmp_path, capsys):
    report, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    main(["plan", str(CLUSTER), "--gpus", "64", "--json", str(report), "--picture", str(picture),
          "--set", "data.vocabulary_size=49152", "--micro-batch-sizes", "2,8"])  # fmt: skip
    plans = json.loads(report.read_text())["plans"]
    seconds = [plan["seconds"]["total"] for plan in plans]
    assert seconds == sorted(seconds) and len(plans) > 10
    for plan in plans:
        assert plan["tensor"] * plan["pipeline"] * plan["context"] * plan["data"] == 64
        parts = {k: v for k, v in plan["memory_bytes"].items() if k != "total"}
        assert sum(parts.values()) == plan["memory_bytes"]["total"]
    assert {plan["pipeline_layout"] for plan in plans} == {"one_stage", "steps_as_stages"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "10 best of" in shown and "heads or widths do not divide" in shown


def test_tiny_is_planned_for_two_processes_and_for_generation(capsys):
    main(["plan", str(TINY), "--gpus", "2", "--hardware", "cpu"])
    assert "TP2" in capsys.readouterr().out
    main(["plan", str(TINY), "--gpus", "1", "--inference"])
    work = workload(read_settings(str(TINY), []))
    assert f"{work.cost.kv_bytes(4) / 2**20:.2f}" in capsys.readouterr().out


def test_a_plan_tries_several_batches_and_warns_of_those_that_starve_the_machine(tmp_path, capsys):
    report = tmp_path / "plan.json"

    def plan(gpus: int, *settings: str) -> tuple[set[int], str]:
        changes = [part for setting in settings for part in ("--set", setting)]
        main(["plan", str(CLUSTER), "--gpus", str(gpus), "--json", str(report),
              "--set", "data.vocabulary_size=49152", *changes])  # fmt: skip
        tried = {row["micro_batch_size"] for row in json.loads(report.read_text())["plans"]}
        return tried, " ".join(capsys.readouterr().out.split())

    tried, shown = plan(8, "training.micro_batch_size=2")
    assert tried == {1, 2, 4}
    assert "warning" not in shown
    assert "M unique parameters, which are stored and trained (" in shown
    assert "unique" not in plan(8, "recursion=null")[1]

    _, shown = plan(512, "training.global_batch_size=512", "training.micro_batch_size=1")
    assert "warning: the batch is too small for these devices" in shown
    assert "There are 2,048 tokens per device and step" in shown


def test_a_micro_batch_size_far_below_the_best_is_told():
    work = workload(read_settings(str(CLUSTER), ["data.vocabulary_size=49152"]))
    best = evaluate(work, Layout(data=8, micro_batch_size=4), HARDWARE["h100"])
    slow = replace(best, layout=replace(best.layout, micro_batch_size=1),
                   utilization=0.6 * best.utilization)  # fmt: skip

    def told(size: int, *plans: Plan) -> list[str]:
        return starvation(work, 8, plans, best.utilization, size)

    assert told(4, best, slow) == []
    (message,) = told(1, best, slow)
    assert (
        message.startswith("training.micro_batch_size=1 reaches an MFU of") and "4 reach" in message
    )
    (message,) = told(2, best, slow)
    assert message.startswith("no layout with training.micro_batch_size=2 fits. Set it to 4")
    (message,) = told(1, slow)
    assert message.startswith(
        "the batch is too small for these devices: the best layout has an MFU"
    )


def test_what_keeps_training_stable_has_its_price():
    plain, helped = (
        workload(read_settings(str(TINY), settings))
        for settings in (
            [],
            ["recursion.step_embeddings=true", "recursion.input_injection=true",
             "recursion.sandwich_norms=true", "recursion.relaxation={rank: 4, projections: [query]}",
             "recursion.router.gate_bias=-1.0"],
        )
    )  # fmt: skip
    more = helped.cost.parameters.total - plain.cost.parameters.total
    # Norms of two layers, vectors of steps, biases, and a delta for each step and layer.
    assert more == 2 * 2 * 192 + (3 + 2) * 192 + 3 + 3 * 2 * 4 * (192 + 192)
    before, after = (evaluate(work, Layout(), HARDWARE["cpu"]) for work in (plain, helped))
    assert after.memory.activations > 1.05 * before.memory.activations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml", "--gpus", "1"], "does not exist"),
        ([str(TINY), "--gpus", "0"], "--gpus 0 must be at least 1"),
        ([str(TINY), "--gpus", "2", "--hardware", "v100"], "Use one of a100, h100, b200, cpu"),
        ([str(TINY), "--gpus", "9" * 400], "and at most 1000000000"),
        ([str(TINY), "--gpus", "2", "--tflops", "0"], "tflops=0.0 must be above 0"),
        ([str(TINY), "--gpus", "2", "--tflops", "inf"], "tflops=inf must be above 0 and finite"),
        ([str(TINY), "--gpus", "2", "--memory-gib", "nan"], "memory_gib=nan must be above 0"),
        ([str(TINY), "--gpus", "2", "--vocab-size", "9" * 400], "must be at most"),
        ([str(TINY), "--gpus", "2", "--vocab-size", "-1"], "--vocab-size -1 must be at least 1"),
        (
            [str(CLUSTER), "--gpus", "2", "--set", f"data.sequence_length={'9' * 400}"],
            "must be between 1 and 1000000000",
        ),
        (
            [str(CLUSTER), "--gpus", "2", "--set", "model.num_unrolled_layers=3000002"],
            "num_unrolled_layers=3000002 must be at most 4096",
        ),
        ([str(TINY), "--gpus", "2", "--set", "steps"], "--set steps is not a key=value setting"),
        ([str(TINY), "--gpus", "2", "--efficiency", "2"], "must be in (0, 1]"),
        ([str(TINY), "--gpus", "2", "--recompute", "some"], "use none, selective, full"),
        ([str(TINY), "--gpus", "2", "--set", "training.stepz=3"], "unknown setting 'stepz'"),
        ([str(CLUSTER), "--gpus", "2", "--set", "uptrain.teacher=llama"], "--set uptrain=null"),
        ([str(TINY), "--gpus", "7"], "The nearest that fits: --gpus 6 "),
        ([str(CLUSTER), "--gpus", "8", "--memory-gib", "2"], "The nearest that fits: --gpus 8 "),
        ([str(CLUSTER), "--gpus", "1", "--memory-gib", "0.01"], "Use a smaller model"),
    ],
)
def test_errors_take_a_line_and_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments])
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and told.count("\n") == 1


def test_the_nearest_that_would_fit_does(capsys):
    with pytest.raises(SystemExit):
        main(["plan", str(CLUSTER), "--gpus", "8", "--memory-gib", "2"])
    words = capsys.readouterr().err.split("The nearest that fits: ")[1].split(" (")[0].split()
    main(["plan", str(CLUSTER), "--memory-gib", "2", *words])
    assert "best of" in capsys.readouterr().out


def test_a_plan_needs_neither_megatron_nor_what_only_a_run_does():
    """The file asks for a loader and a tracker; both are looked for when a run starts."""
    script = f"""
import sys

blocked = ["megatron", "nvidia", "wandb", "tokenizers", "transformers"]
sys.modules.update(dict.fromkeys(blocked))  # importing one of them raises ModuleNotFoundError
import mor_tools.planner, mor_tools.pretraining.command_line
from mor_tools.commands import main

settings = ["--set", "data.loader=dali", "--set", "wandb.project=mine"]
main(["plan", {str(CLUSTER)!r}, "--gpus", "32", *settings])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "best of" in ran.stdout


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "adaptive_halting"])
def test_what_is_planned_is_what_the_script_builds(router):
    from mor_tools.pretraining.models import build

    settings = read_settings(str(TINY), [f"recursion.router.type={router}"])
    shape = build.shape(settings, settings.data.vocabulary_size)
    work = workload(settings)
    assert work.cost.parameters.total == build.parameters(shape)
    flops = build.flops_per_token(shape, settings, None)
    assert work.cost.flops_per_token() == pytest.approx(flops)
    assert not work.is_bf16
    assert work.documents


RECURSIONS = {
    "none": None,
    "middle": {"num_recursions": 3, "router": {"type": "expert_choice"}},
    "sequence": {"num_recursions": 2, "sharing": "sequence"},
    "exit_state": {"num_recursions": 3, "kv_policy": "exit_state",
                   "router": {"type": "expert_choice"}},
}  # fmt: skip


@pytest.mark.parametrize("with_experts", [False, True])
@pytest.mark.parametrize("recursion", RECURSIONS)
def test_a_layout_is_legal_where_the_script_takes_it(recursion, with_experts):
    """On 1 to 12 processes; also settings that must be refused."""
    model = {"num_unrolled_layers": 8, "num_heads": 12, "num_kv_heads": 6, "hidden_size": 192}
    if with_experts:
        model["moe"] = {"num_experts": 4}
    values = {"model": model, "data": {"sequence_length": 96}}
    values["training"] = {"global_batch_size": 24, "micro_batch_size": 2}
    if RECURSIONS[recursion]:
        values["recursion"] = RECURSIONS[recursion]
    work = workload(from_mapping(Settings, values | {"evaluation": {"sample_tokens": 8}}))
    outcomes, ends = [], {"evaluation": {"sample_tokens": 8}}
    for t, p, c, e, d, is_spread in product(
        (1, 2, 3, 4), (1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 5), (False, True)
    ):
        if is_spread and p == 1:
            continue
        kind = "steps_as_stages" if is_spread else "one_stage"
        layout = Layout(t, p, kind, c, e, d, 2, "none", t > 1)
        parallel = {"tensor": t, "pipeline": p, "context": c, "expert": e,
                    "pipeline_layout": kind, "sequence_parallel": t > 1}  # fmt: skip
        try:
            settings = from_mapping(Settings, values | ends | {"parallel": parallel})
            expected = settings.data_parallel_size(layout.num_devices) == d
        except ValueError:
            expected = False
        assert (refusal(work, layout) is None) == expected, (layout, refusal(work, layout))
        outcomes.append(expected)
        if expected:
            assert evaluate(work, layout, HARDWARE["h100"]).seconds > 0
    assert any(outcomes) and not all(outcomes)


def test_ten_thousand_devices_are_planned():
    settings = read_settings(
        str(CLUSTER), ["training.global_batch_size=40000", "data.vocabulary_size=49152"]
    )
    found = search(workload(settings), 10000, HARDWARE["h100"], (1, 2, 4), ("none", "full"))
    assert {p.layout.num_devices for p in found.fitting} == {10000}
    assert len(found.fitting) > 20


@pytest.mark.parametrize("batch", [512, 4_000_000])
def test_a_million_devices_are_planned_in_seconds(batch):
    """Also where no layout is legal and the nearest number of devices is looked for."""
    changes = [f"training.global_batch_size={batch}", "data.vocabulary_size=49152"]
    work = workload(read_settings(str(CLUSTER), changes))
    begin = time.process_time()
    found = search(work, 1_000_000, HARDWARE["h100"], (1, 2), ("none", "full"))
    assert bool(found.fitting) == (batch > 512)
    near = nearest(work, 1_000_000, HARDWARE["h100"])
    assert near is not None
    assert near.layout.num_devices == (1_000_000 if batch > 512 else 1_048_576)
    assert time.process_time() - begin < 5


def test_what_is_beyond_a_few_turns_of_a_schedule_is_as_if_it_were_played():
    from mor_tools.planner.evaluate import _makespan, _peak
    from mor_tools.planner.schedule import simulate

    for durations in ([[(1.0, 2.0)], [(3.0, 5.0)], [(1.5, 3.0)]],
                      [[(1.0, 2.0), (0.5, 1.0)], [(2.0, 3.0), (0.7, 1.0)]]):  # fmt: skip
        passes = simulate(durations, 60)
        assert _makespan(durations, 60) == pytest.approx(max(run.end for run in passes))
        for p, own in enumerate(durations):
            kept = [3.0, 5.0][: len(own)]
            at_once, most = 0.0, 0.0
            for run in (run for run in passes if run.stage == p):
                at_once += kept[run.chunk] if run.is_forward else -kept[run.chunk]
                most = max(most, at_once)
            assert _peak(p, len(durations), kept, 60) == most
