"""Step counts, and what is refused before anything is computed."""

import math
from pathlib import Path

import pytest

from mor_tools.comparison.costs import Costs
from mor_tools.comparison.plan import plan
from mor_tools.comparison.statistics import NO_DIFFERENCE, Difference, Spread
from mor_tools.pretraining.command_line import read_settings

COMMON = """
data: {vocabulary_size: 300, sequence_length: 32}
training: {steps: 100, warmup_steps: 10, decay_steps: 30, global_batch_size: 4, micro_batch_size: 4}
evaluation: {sample_tokens: 0}
"""
DENSE = (
    COMMON + "model: {hidden_size: 32, ffn_hidden_size: 64, num_unrolled_layers: 6, num_heads: 4}"
)
DENSE = DENSE.replace("num_heads: 4", "num_heads: 4, num_kv_heads: 2")
LOOPED = (
    DENSE
    + """
recursion: {num_recursions: 2, router: {type: expert_choice, capacity_factors: [1.0, 0.5]}}
"""
)


def write(folder: Path, **texts: str) -> list[Path]:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return [folder / f"{name}.yaml" for name in texts]


def flops_by_hand(tokens_of_layers: list[int], scored: int = 0) -> int:
    """Training FLOPs of a sequence of 32 tokens; 384 rows of embedding, heads of 8 numbers."""
    h, ffn, kv, vocabulary = 32, 64, 16, 384
    forward = 2 * 32 * h * vocabulary
    for k in tokens_of_layers:
        forward += 2 * k * h * (h + kv + kv + h)  # query, key, value, output
        forward += 2 * (2 * k * k * h)  # scores, and the weighted sum of values
        forward += 2 * k * 3 * h * ffn
    return 3 * forward + 2 * scored * h * 3


def test_equal_flops_gives_the_steps_that_the_accounting_says(tmp_path):
    comparison = plan(write(tmp_path, dense=DENSE, looped=LOOPED), ["flops"], seeds=2)
    dense, looped = comparison.models
    of_dense = flops_by_hand([32] * 6)
    # Prelude, two layers for all tokens, two for half of them, coda; scorers see 32 and 32 tokens.
    of_looped = flops_by_hand([32, 32, 32, 16, 16, 32], scored=64)
    assert dense.costs.flops_per_token * 32 == of_dense
    assert looped.costs.flops_per_token * 32 == pytest.approx(of_looped)
    assert dense.settings.training.steps == 100
    assert comparison.budget == 100 * 4 * of_dense
    expected = round(100 * of_dense / of_looped)
    assert expected > 110
    assert looped.settings.training.steps == expected
    assert looped.settings.training.warmup_steps == int(10 * expected / 100)
    assert looped.settings.training.decay_steps == int(30 * expected / 100)


def test_the_warm_up_of_a_router_counts(tmp_path):
    warm = LOOPED.replace("type: expert_choice", "type: expert_choice, warmup_steps: 40")
    cold, costs = (
        Costs(read_settings(str(file), [])) for file in write(tmp_path, cold=LOOPED, warm=warm)
    )
    by_hand = 0.0
    for step in range(40):
        factor = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * step / 40))
        tokens = math.floor(factor * 32)
        by_hand += 4 * 32 * costs.flops_with([1.0, tokens / 32])
    assert costs.flops(40) == pytest.approx(by_hand)
    assert costs.flops(100) == pytest.approx(by_hand + 60 * 4 * 32 * costs.flops_per_token)
    assert costs.flops(100) > 1.02 * cold.flops(100)
    for steps in (1, 7, 39, 40, 41, 250):
        assert costs.steps_for(costs.flops(steps)) == steps


def test_equal_tokens_and_a_budget_give_the_same_steps_to_all(tmp_path):
    files = write(tmp_path, dense=DENSE, looped=LOOPED.replace("steps: 100", "steps: 70"))
    assert [m.settings.training.steps for m in plan(files, ["tokens"]).models] == [100, 100]
    comparison = plan(files, ["tokens"], budget=4 * 32 * 250)
    assert [m.settings.training.steps for m in comparison.models] == [250, 250]
    twice = plan(files, ["flops"], budget=2 * plan(files, ["flops"]).budget)
    assert twice.models[0].settings.training.steps == 200


def test_each_seed_has_runs_of_all_models_that_differ_in_nothing_else(tmp_path):
    comparison = plan(write(tmp_path, dense=DENSE, looped=LOOPED), ["tokens"], seeds=2)
    runs = list(comparison.runs())
    assert [(r.model, r.seed) for r in runs] == [
        ("dense", 1), ("looped", 1), ("dense", 2), ("looped", 2)
    ]  # fmt: skip
    assert len({run.settings.output for run in runs}) == 4
    assert [run.settings.training.seed for run in runs] == [1, 1, 2, 2]


def test_parameters_that_differ_are_told_with_what_to_change(tmp_path):
    files = write(tmp_path, dense=DENSE, looped=LOOPED)
    with pytest.raises(
        ValueError, match=r"looped has \d+\.\d% fewer parameters than dense"
    ) as told:
        plan(files, ["parameters"])
    (width,) = (
        part.partition("=")[2]
        for part in str(told.value).split()
        if part.startswith("model.ffn_hidden_size=")
    )
    looped = LOOPED.replace("ffn_hidden_size: 64", f"ffn_hidden_size: {width}")
    comparison = plan(write(tmp_path, dense=DENSE, looped=looped), ["parameters", "flops"])
    parameters = [model.costs.parameters for model in comparison.models]
    assert parameters[1] == pytest.approx(parameters[0], rel=0.02)
    assert comparison.equal == ("parameters", "flops")


def test_key_value_bytes_that_differ_are_told_with_what_to_change(tmp_path):
    more = DENSE.replace("num_kv_heads: 2", "num_kv_heads: 4")
    with pytest.raises(ValueError, match=r"100\.0% more key-value bytes.*num_kv_heads=2 .*\+0\.0%"):
        plan(write(tmp_path, dense=DENSE, more=more), ["kv"])
    # 3 of 4 steps' tokens are kept: 6 layers keep 32 rows, against 4 with 32 and 2 with 16.
    comparison = plan(write(tmp_path, dense=DENSE, looped=LOOPED), ["kv"], tolerance=0.2)
    dense, looped = (model.costs.kv_bytes for model in comparison.models)
    assert (dense, looped) == (2 * 6 * 2 * 16, 2 * 5 * 2 * 16)


@pytest.mark.parametrize(
    ("equal", "options", "told"),
    [
        (["time"], {}, "--equal time is unknown. Use flops, tokens, parameters, kv"),
        (["flops", "tokens"], {}, "both say how long"),
        (["flops"], {"seeds": 0}, "--seeds 0 must be at least 1"),
        (["flops"], {"budget": -1.0}, "--budget -1.0 must be above 0"),
        (["flops"], {"budget": 1e3}, "FLOPs, more than the budget of 1000"),
        (["kv"], {"tolerance": 1.5}, "--tolerance 1.5"),
        (["flops"], {"changes": ["training.stop_after=3"]}, "would stop the runs"),
        (["flops"], {"changes": ["training.colour=3"]}, "dense.yaml: "),
    ],
)
def test_wrong_options_are_refused(tmp_path, equal, options, told):
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        plan(write(tmp_path, dense=DENSE, looped=LOOPED), equal, **options)


def test_other_text_a_name_twice_and_a_single_file_are_refused(tmp_path):
    other = DENSE.replace("sequence_length: 32", "sequence_length: 64")
    with pytest.raises(ValueError, match=r"data\.sequence_length=64 \(in dense: 32\)"):
        plan(write(tmp_path, dense=DENSE, other=other), ["tokens"])
    (file,) = write(tmp_path, dense=DENSE)
    with pytest.raises(ValueError, match="two files are named dense"):
        plan([file, file], ["tokens"])
    with pytest.raises(ValueError, match="at least 2"):
        plan([file], ["tokens"])


def test_nothing_is_claimed_inside_the_spread():
    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t(2) = 4.303, so ± 0.248.
    inside = Difference.between([5.1, 5.2, 5.3], [5.0, 5.0, 5.0])
    assert inside.mean == pytest.approx(0.2)
    assert inside.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert NO_DIFFERENCE in inside.verdict()
    # What the seeds have in common does not hide a difference.
    beyond = Difference.between([5.1, 6.1, 7.12], [5.0, 6.0, 7.0])
    assert beyond.verdict().endswith("higher")
    assert Difference.between([5.0, 6.0, 7.0], [5.1, 6.1, 7.12]).verdict().endswith("lower")
    assert "no spread" in Difference.between([1.0], [2.0]).verdict()
    assert not Difference.between([1.0], [2.0]).is_beyond_spread
    assert Spread.of([1.0, 2.0, 3.0]).shown() == "2.000 ± 1.000"
    assert Spread.of([1.0]).shown() == "1.000"
