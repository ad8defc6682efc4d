"""The pointer-chasing experiment: its task, its targets, and that it runs and resumes."""

import json
from dataclasses import replace

import pytest
import torch

from experiments import depth_must_help as experiment
from experiments.depth_must_help import BY_HEAD, HOPS, NO_ANSWER, ORACLE, PRIOR, QUICK, Outcome
from mor_tools.comparison.statistics import NO_DIFFERENCE


def test_answers_follow_the_edges_hop_by_hop():
    batch = experiment.draw_batch(QUICK, torch.Generator().manual_seed(0))
    n = QUICK.nodes
    for ids, answers, hops in zip(batch.ids, batch.answers, batch.hops, strict=True):
        following = {int(edge) // n: int(edge) % n for edge in ids[:n]}
        assert sorted(following.values()) == list(range(n))
        assert (answers[:n] == NO_ANSWER).all() and (hops[:n] == 0).all()
        for token, answer, number in zip(ids[n:], answers[n:], hops[n:], strict=True):
            node, asked = divmod(int(token) - n * n, HOPS)
            assert asked + 1 == number
            for _ in range(number):
                node = following[node]
            assert node == answer


CYCLE = [2, 3, 1, 0]  # 0 -> 2 -> 1 -> 3 -> 0
NUMBERS = [1, 0, 3, 2]  # of the edges 0 -> 2, 1 -> 3, 2 -> 1 and 3 -> 0


@pytest.mark.parametrize(
    ("start", "hops", "node", "total"),
    [
        (0, 1, 2, 1),
        (0, 2, 1, 1 + 3),
        (0, 3, 3, 1 + 3 + 0),
        (1, 1, 3, 0),
        (1, 2, 0, 0 + 2),
        (2, 2, 3, 3 + 0),
        (3, 2, 2, 2 + 1),
        (3, 3, 1, 2 + 1 + 3),
    ],
)
def test_answers_are_those_worked_out_by_hand(start: int, hops: int, node: int, total: int):
    cycle, numbers, starts, asked = (
        torch.tensor([values]) for values in (CYCLE, NUMBERS, [start], [hops])
    )
    assert experiment.answers_of(cycle, None, starts, asked).item() == node
    assert experiment.answers_of(cycle, numbers, starts, asked).item() == total


def test_sums_are_those_of_the_numbers_that_the_edges_show():
    plan = replace(QUICK, task="sums", batch=20)
    batch = experiment.draw_batch(plan, torch.Generator().manual_seed(0))
    n, m = plan.nodes, plan.numbers
    assert int(batch.ids.max()) < plan.vocabulary
    for ids, answers in zip(batch.ids, batch.answers, strict=True):
        following, numbers = {}, {}
        for token in ids[:n].tolist():
            edge, number = divmod(token, m)
            following[edge // n], numbers[edge // n] = edge % n, number
        assert sorted(following.values()) == list(range(n))
        for token, answer in zip(ids[n:].tolist(), answers[n:].tolist(), strict=True):
            node, asked = divmod(token - n * n * m, HOPS)
            total = 0
            for _ in range(asked + 1):
                total, node = total + numbers[node], following[node]
            assert answer == total
    asked = batch.answers[batch.answers != NO_ANSWER]
    # Of sums of 1, 2 and 3 numbers, equally often; each number is 0 or 1, equally often.
    expected = [
        (1 / 2 + 1 / 4 + 1 / 8) / 3,
        (1 / 2 + 1 / 2 + 3 / 8) / 3,
        (1 / 4 + 3 / 8) / 3,
        1 / 24,
    ]
    found = torch.bincount(asked, minlength=HOPS + 1) / len(asked)
    assert found.tolist() == pytest.approx(expected, abs=0.08)


def test_tokens_begin_as_sums_of_what_they_consist_of():
    plan = replace(QUICK, task="sums")
    model = experiment.MoRTransformer(experiment.models(plan)["fixed depth 1"])
    experiment.initialize(model, plan)
    rows = model.embedding.weight[: plan.nodes**2 * plan.numbers].view(
        plan.nodes, plan.nodes, plan.numbers, -1
    )
    # Edges that differ in one part differ by the same vector, whatever the other parts are.
    torch.testing.assert_close(rows[0, :, 0] - rows[1, :, 0], (rows[0, :, 1] - rows[1, :, 1]))
    torch.testing.assert_close(rows[:, 2, 0] - rows[:, 2, 1], rows[:, 5, 0] - rows[:, 5, 1])
    assert not torch.allclose(rows[0, 0, 0], rows[0, 0, 1])


def test_shares_are_those_of_the_questions_that_need_a_step():
    batch = experiment.draw_batch(
        replace(QUICK, batch=500, questions=32), torch.Generator().manual_seed(1)
    )
    needed = batch.hops.clamp(min=1)  # an edge needs one step
    found = [float((needed > step).float().mean()) for step in range(HOPS)]
    assert found == pytest.approx(experiment.Plan().shares, abs=0.01)


def test_the_verdict_asks_for_accuracy_steps_and_order_in_every_seed():
    def outcome(accuracy: float, depth: float, by_hops: list[float]) -> Outcome:
        return Outcome(accuracy, [], depth, depth, by_hops)

    results = {
        "fixed depth 2": [outcome(0.5, 2, [2.0] * 3)] * 3,
        "fixed depth 3": [outcome(accuracy, 3, [3.0] * 3) for accuracy in (0.9, 0.88, 0.89)],
        "good": [outcome(0.89, 1.5, [1.0, 2.0, 3.0])] * 3,
        "unordered": [outcome(0.89, 1.5, [1, 2, 3])] * 2 + [outcome(0.89, 1.5, [2, 1, 3])],
        "wrong": [outcome(0.7, 1.5, [1.0, 2.0, 3.0])] * 3,
    }
    first, good, unordered, wrong = experiment.verdict(results)
    assert first == "best fixed depth: fixed depth 3, accuracy 0.890"
    assert NO_DIFFERENCE in good and "0.50 of the steps" in good and "depth rises" in good
    assert "depth does not rise" in unordered
    assert "-0.190 ± 0.025: lower" in wrong


def test_the_sums_are_learned_by_the_same_models():
    plan = replace(QUICK, task="sums", steps=2)
    config = experiment.models(plan)[PRIOR]
    found = experiment.outcomes(PRIOR, config, 0, plan)
    assert found[PRIOR].mean_depth == HOPS and 0 <= found[PRIOR].accuracy < 0.9
    assert len(found[PRIOR].by_hops) == HOPS


def test_it_runs_and_resumes(tmp_path, capsys):
    arguments = ["--quick", "--seeds", "1", "--steps", "2", "--output", str(tmp_path)]
    results = experiment.main(arguments)
    assert {PRIOR, f"{ORACLE}, {BY_HEAD}", "expert-choice"} <= set(results)
    assert results["fixed depth 2"][0].mean_depth == 2
    shares = experiment.Plan().shares
    assert results["random depth"][0].mean_depth == pytest.approx(sum(shares), abs=0.3)
    stored = json.loads((tmp_path / "results.json").read_text())
    capsys.readouterr()
    assert experiment.main(arguments) == results
    assert "seed 0:" not in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == stored
    assert (tmp_path / "results.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        experiment.main([*arguments, "--steps", "3"])
    with pytest.raises(SystemExit):
        experiment.main([*arguments, "--task", "sums"])
