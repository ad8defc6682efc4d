"""`mor inspect`: one page, with what the model does with a text, for people and for trackers."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mor_layers import (
    DecoderConfig,
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RandomDepth,
    RecursionConfig,
    TokenChoice,
    load_model,
    save_model,
)
from mor_layers.inspection import inspect_text
from mor_tools.commands import main
from mor_tools.reports import page as pages
from mor_tools.reports.inspection_page import render, scalars
from mor_tools.reports.plots import DARK, LIGHT, palette, text_on
from mor_tools.reports.rows import Routing, Row, line
from tests.mor_layers.small_models import small_model

TEXT = 'a <b> & "é": two\nlines of text, to be cut into windows'
ROUTERS = [FixedDepth(), RandomDepth(), ExpertChoice(), TokenChoice(), DepthAndWidth()]
CONFIG = DecoderConfig(
    256, 16, 24, 5, 2, recursion=RecursionConfig(3, router=ExpertChoice()), moe=MoEConfig(3, 2)
)
ROUTING = Routing([1.0, 0.7, 0.3], 0.1, {"step_2/sampling_accuracy": 0.8}, [[0.5, 0.3, 0.2]] * 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the pretraining script, as far as its folder goes."""
    parent = tmp_path_factory.mktemp("inspect")
    folder = parent / "run"
    save_model(small_model(CONFIG), folder / "model")
    (folder / "run.json").write_text(json.dumps({"settings": {"data": {"sequence_length": 16}}}))
    rows = [Row(step, 5.0 - step, 1e-3, 1.0, 10.0, ROUTING, 4.0, 4.1) for step in (1, 2, 3)]
    (folder / "history.jsonl").write_text("".join(map(line, rows)))
    (parent / "text.txt").write_text(TEXT, "utf-8")
    return folder


@pytest.fixture(scope="module")
def page(run) -> str:
    """Of the run; with the same figures for TensorBoard and wandb beside it."""
    board = str(run.parent / "board")
    return inspected(run, "--tensorboard", board, "--wandb", "tests", "--wandb-offline")


def inspected(folder: Path, *options: str) -> str:
    output = folder.parent / "page.html"
    text = folder.parent / "text.txt"
    main(["inspect", str(folder), "--text", str(text), "--output", str(output), *options])
    return output.read_text("utf-8")


def spans(page: str) -> list[tuple[int, list[str], str]]:
    """Depth, notes and text of each token."""
    found = re.findall(r'<span class="d(\d+)" title="([^"]*)">(.*?)</span>', page, re.DOTALL)
    return [(int(d), html.unescape(t).split("\n"), html.unescape(x)) for d, t, x in found]


def test_the_page_of_a_run_shows_each_token_and_the_training(run, page):
    ids = torch.tensor(list(TEXT.encode()))
    seen = inspect_text(load_model(run / "model"), ids, 16)  # as long as the run's sequences
    assert f"{len(ids)} in 4 windows of at most 16" in page
    tokens = spans(page)
    assert [depth for depth, _, _ in tokens] == seen.depths.tolist()
    assert "".join(text for _, _, text in tokens).replace("\ufffd\ufffd", "é") == TEXT
    assert f"surprise {seen.surprise[7]:.2f} nats" in tokens[7][1]
    assert f"score for step 1: {seen.scores[0, 7]:.4f}" in tokens[7][1]
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads == [
        "Steps",
        "Depth of each token",
        "Depth of tokens",
        "Depth against surprise",
        "Router scores",
        "Load per recursion step and expert",
        "Training: loss",
        "Training: routing",
        "Training: load, at the last logged step",
    ]
    assert page.count("<figure") == len(heads) - 2


def test_the_page_needs_nothing_beside_it(page):
    assert not re.search(r"<(script|link|img|iframe|image)|\bsrc=|url\((?!#)|@import", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]+)"', page))


def test_the_model_folder_alone_has_no_history_and_a_window_can_be_given(run):
    text = ["--text", str(run.parent / "text.txt"), "--window", "5"]
    main(["inspect", str(run / "model"), *text])
    page = (run / "model" / "inspection.html").read_text("utf-8")
    assert "windows of at most 5" in page and "Training" not in page


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: type(router).__name__)
@pytest.mark.parametrize(
    "moe",
    [None, pytest.param(MoEConfig(3, 2), marks=pytest.mark.full)],
    ids=["dense", "experts"],
)
def test_every_router_has_a_page(router, moe):
    config = replace(CONFIG, recursion=RecursionConfig(3, router=router), moe=moe)
    seen = inspect_text(small_model(config), torch.tensor(list(TEXT.encode())), 16)
    page = render(seen, list(TEXT), "page")
    assert ("Router scores" in page) == (type(router) not in (FixedDepth, RandomDepth))
    assert ("recursion step and expert" in page) == (moe is not None)


def test_a_decoder_without_recursion_has_a_page():
    config = replace(CONFIG, recursion=None, moe=None)
    seen = inspect_text(small_model(config), torch.tensor(list(TEXT.encode())), 16)
    assert "undefined of the token itself" in render(seen, list(TEXT), "page")


def test_steps_of_several_recursions_say_whose_they_are():
    early, late = RecursionConfig(2, "cycle", block_layers=1), RecursionConfig(3, "cycle")
    late = replace(late, router=ExpertChoice())
    config = replace(CONFIG, recursion=(early, late), num_unrolled_layers=5)
    seen = inspect_text(small_model(config), torch.tensor(list(TEXT.encode())), 16)
    page = render(seen, list(TEXT), "page")
    assert "<th>step (recursion)</th>" in page
    names = re.findall(r"<td>(\d \(\d\))</td>", page)
    assert names == ["1 (1)", "2 (1)", "3 (2)", "4 (2)", "5 (2)"]
    assert scalars(seen)["inspect/step_5/share"] == pytest.approx(seen.shares[4])


def test_a_long_text_is_shown_in_part_and_says_so(monkeypatch):
    monkeypatch.setattr(pages, "MOST_TOKENS", 10)
    seen = inspect_text(small_model(CONFIG), torch.tensor(list(TEXT.encode())), 16)
    page = render(seen, list(TEXT.encode().decode("latin1")), "page")
    assert len(spans(page)) == 10
    assert f"The first 10 of {len(seen.ids)} tokens" in page


def test_tensorboard_gets_the_same_figures(run, page):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.parent / "board"))
    events.Reload()
    seen = inspect_text(load_model(run / "model"), torch.tensor(list(TEXT.encode())), 16)
    for name, value in scalars(seen).items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(3, pytest.approx(value))]
    assert {"inspect/step_2/agreement", "inspect/experts/step_3/expert_2"} <= set(scalars(seen))
    assert set(events.Tags()["images"]) == {
        "inspect/Depth of tokens",
        "inspect/Depth against surprise",
        "inspect/Router scores",
        "inspect/Load per recursion step and expert",
    }
    assert "inspect/step_1/score" in events.Tags()["histograms"]


def test_wandb_gets_the_same_figures(run, page):
    kept = run.parent / "wandb-inspection"
    assert list(kept.rglob("run-*.wandb"))
    assert len(list(kept.rglob("*.png"))) == 4


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("depths", [1, 3, 12])
def test_colours_differ_and_text_on_them_is_legible(mode, depths):
    background, named = {"light": ("#ffffff", LIGHT), "dark": ("#15171a", DARK)}[mode]
    colors = palette(depths, mode)
    assert len({color for color, _ in colors}) == depths + 1
    assert all(_contrast(color, text) >= 4.5 for color, text in colors)
    assert all(_contrast(color, background) >= 4.5 for color in named.values())


def _contrast(*colors: str) -> float:
    """Of two colours, by WCAG 2."""
    luminances = []
    for color in colors:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(luminances)
    return (high + 0.05) / (low + 0.05)


def test_text_on_white_is_black():
    assert (text_on((1, 1, 1)), text_on((0, 0, 0))) == ("#000000", "#ffffff")


def test_what_cannot_be_shown_is_answered(run, capsys):
    (run.parent / "empty.txt").write_text("")
    text = str(run.parent / "text.txt")
    checkpoint, nothing = run.parent / "unfinished", run.parent / "nothing"
    (checkpoint / "checkpoints").mkdir(parents=True)
    (checkpoint / "checkpoints" / "latest").write_text("step_00000001")
    nothing.mkdir()
    for arguments, message in (
        ([str(checkpoint), "--text", text], "Convert it with `mor convert`"),
        ([str(nothing), "--text", text], "is not a model: it has no config.json"),
        ([str(run / "nowhere"), "--text", text], "does not exist"),
        ([str(run), "--text", str(run.parent / "empty.txt")], "has 0 tokens. Use a text"),
        ([str(run), "--text", text, "--window", "-1"], "window=-1 must be at least 1"),
        ([str(run), "--text", text, "--wandb-offline"], "no effect without --wandb"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["inspect", *arguments])
        assert message in capsys.readouterr().err
    assert not (run / "inspection.html").exists()
