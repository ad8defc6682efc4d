"""What a run leaves behind for people and programs, and shows while it goes on."""

import io
import json
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mor_megatron import RoutingReport
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.reporting.demonstration import TokenDepth
from mor_tools.pretraining.reporting.display import Costs, Display
from mor_tools.pretraining.reporting.history import History
from mor_tools.pretraining.reporting.report import Report, render
from mor_tools.pretraining.reporting.summary import write_summary
from mor_tools.reports.health import Finding
from mor_tools.reports.rows import Routing, Row, Validation, scalars
from mor_tools.reports.trackers import TensorBoard, Wandb

ROUTING = Routing(
    shares=[1.0, 0.75, 0.25],
    dead_positions=0.1,
    metrics={"step_2/sampling_accuracy": 0.8, "step_3/sampling_accuracy": 0.9},
    expert_load=[[0.25, 0.75], [0.5, 0.5], [0.4, 0.6]],
)
ROWS = [
    Row(1, 6.5, 0.001, 1.2),
    Row(2, 6.1, 0.002, 1.1, 1000.0, ROUTING, 6.2, 6.25),
    Row(3, 5.9, 0.002, 1.0),
    Row(4, 5.5, 0.001, 0.9, 3000.0, ROUTING, 5.6),
]
VALIDATION = Validation(5.6, ROUTING, 5.7, Routing([1.0, 0.7, 0.3], 0.1, {}))
REPORT = Report(
    title="Pretraining runs/<test>",
    facts={"Held-out loss": "5.600 nats per token"},
    rows=ROWS,
    unigram_entropy=6.3,
    validation=VALIDATION,
    passage=[TokenDepth("def", 3), TokenDepth(" <f>", 1), TokenDepth("\n", 2)],
    sample="def f():\n    return 1 < 2",
)


@pytest.fixture(scope="module")
def page() -> str:
    return render(REPORT)


def test_the_report_holds_all_its_parts_and_needs_nothing_beside_it(page):
    assert page.count("<figure") == 4
    for heading in ("Loss", "Depth", "Load per recursion step and expert", "A continuation"):
        assert f"<h2>{heading}" in page
    assert not re.search(r"<(script|link|img|iframe)|\bsrc=|url\((?!#)", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]+)"', page))


def test_drawings_have_the_colours_of_the_page_and_ids_of_their_own(page):
    assert not re.search(r"#0[de]00\d\d", page)
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert {"ink", "accent", "d1", "d3"} <= used <= set(re.findall(r"--(\w+):", page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", page)) <= set(ids)


def test_warnings_come_first_in_the_report_where_there_are_any(page):
    assert "<h2>Warnings" not in page
    finding = Finding("loss", 1200, "the loss <rises>")
    warned = render(replace(REPORT, findings=[finding]))
    assert "<li>From step 1,200: the loss &lt;rises&gt;</li>" in warned
    assert warned.index("<h2>Warnings") < warned.index("<h2>Loss")


def test_text_in_the_report_is_text_and_not_markup(page):
    assert "Pretraining runs/&lt;test&gt;" in page
    assert "return 1 &lt; 2" in page
    assert '<span class="d1" title="1 step"> &lt;f&gt;</span>' in page


def test_tokens_of_unlike_depth_have_unlike_colours(page):
    assert re.findall(r'<span class="(d\d)" title=', page) == ["d3", "d1", "d2"]
    for mode in page.split("prefers-color-scheme: dark"):
        colours = re.findall(r"--d\d: (#\w+)", mode)
        assert len(colours) == len(set(colours)) == 4


def test_each_panel_is_a_drawing_of_its_own_that_a_phone_has_room_for(page):
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    drawings = [re.findall(r"<svg.*?</svg>", figure, re.DOTALL) for figure in figures]
    assert [len(panels) for panels in drawings] == [1, 1, 3, 2]
    for panel in (panel for panels in drawings for panel in panels):
        assert float(re.search(r'width="([\d.]+)pt"', panel)[1]) < 72 * 6.6
    assert page.count("max-width: min(100%, ") == sum(map(len, drawings))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_run_without_recursion_has_a_report_without_routing():
    rows = [replace(row, routing=None) for row in ROWS]
    plain = replace(REPORT, rows=rows, validation=Validation(5.6), passage=[])
    page = render(plain)
    assert page.count("<figure") == 1
    assert "<h2>Depth" not in page


def test_a_run_that_was_never_logged_has_a_report():
    assert "<svg" in render(replace(REPORT, rows=ROWS[:1], validation=Validation(5.6)))


def test_depth_shares_are_those_who_ran_a_step_but_not_the_next():
    assert Routing([0.9, 0.6, 0.1], 0.0, {}).depth_shares == pytest.approx([0.1, 0.3, 0.5, 0.1])


def test_several_recursions_are_taken_together():
    reports = [
        RoutingReport((1.0, 0.5), 0.2, {"step_1/x": 1.0}, torch.tensor([[[3.0, 1]], [[1, 1]]])),
        RoutingReport((1.0, 0.3), 0.4, {"step_1/x": 3.0}, torch.tensor([[[1.0, 3]], [[0, 2]]])),
    ]
    together = Routing.from_reports(reports)
    assert together.shares == pytest.approx([1.0, 0.4])
    assert together.dead_positions == pytest.approx(0.3)
    assert together.expert_load == [[0.5, 0.5], [0.25, 0.75]]
    assert Routing.from_reports([]) is None


def test_the_steps_of_several_recursions_are_numbered_through():
    reports = [
        RoutingReport((1.0, 1.0), 0.0, {"step_1/x": 1.0}, torch.tensor([[[3.0, 1]], [[1, 1]]])),
        RoutingReport((1.0, 0.5), 0.2, {"step_2/x": 2.0}, torch.tensor([[[3.0, 1]], [[1, 1]]])),
        RoutingReport((1.0, 0.3), 0.4, {"step_2/x": 9.0}, torch.tensor([[[1.0, 3]], [[0, 2]]])),
    ]
    together = Routing.from_reports(reports, blocks=[1, 2])
    assert together.shares == pytest.approx([1.0, 1.0, 1.0, 0.4])
    assert together.by_recursion == [together.shares[:2], together.shares[2:]]
    assert together.steps == [2, 2] and together.depth_shares is None
    assert together.dead_positions == pytest.approx((0.0 + 0.3) / 2)
    assert together.metrics == {"step_1/x": 1.0, "step_4/x": 2.0}
    assert together.expert_load == [[0.75, 0.25], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]
    shown = scalars(replace(ROWS[-1], routing=together))
    assert shown["routing/step_4/share"] == pytest.approx(0.4)
    assert shown["depth/recursion_1/2"] == 1.0
    assert shown["depth/recursion_2/1"] == pytest.approx(0.6)
    assert "depth/1" not in shown


def test_a_resumed_history_forgets_what_came_after_the_checkpoint(tmp_path):
    first = History(tmp_path, 0)
    for row in ROWS:
        first.add(row)
    first.close()
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # the process was killed here
    resumed = History(tmp_path, 2)
    assert resumed.rows == ROWS[:2]
    resumed.add(ROWS[2])
    assert History(tmp_path, 9).rows == ROWS[:3]


EXPECTED = {
    "loss/validation_causal": 6.25,
    "routing/dead_positions": 0.1,
    "routing/step_2/share": 0.75,
    "routing/step_3/agreement": 0.9,
    "depth/1": 0.25,
    "depth/2": 0.5,
    "experts/step_3/expert_1": 0.6,
}


def test_tensorboard_has_depths_agreement_dead_positions_and_cells(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = History(tmp_path, 0, [TensorBoard(tmp_path / "tensorboard")])
    for row in ROWS:
        history.add(row)
    history.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in EXPECTED.items():
        (first, *_) = events.Scalars(name)
        assert (first.step, first.value) == (2, pytest.approx(value))


def test_wandb_gets_what_tensorboard_gets_and_goes_on_as_the_same_run(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    for part in (ROWS[:2], ROWS[2:]):
        if part[0].step > 1:
            time.sleep(1.1)  # wandb names the folder of a session after the second
        wandb = Wandb("tests", tmp_path / "wandb", "offline", "run", {"training": {"steps": 4}})
        history = History(tmp_path, part[0].step - 1, [wandb])
        for row in part:
            history.add(row)
        history.close()

    def logged() -> dict[str, list[float]]:
        files = list((tmp_path / "wandb").rglob("run-*.wandb"))
        assert len({file.name for file in files}) == 1
        found: dict[str, list[float]] = {}
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
            for data in wandb_records(file.read_bytes()):
                for item in Record.FromString(data).history.item:
                    name = item.key or "/".join(item.nested_key)
                    found.setdefault(name, []).append(json.loads(item.value_json))
        return found

    deadline = time.monotonic() + 20  # a process of wandb's own writes the files
    while len(logged().get("step", [])) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert logged()["step"] == [1, 2, 3, 4]
    for name, value in EXPECTED.items():
        assert logged()[name][0] == pytest.approx(value)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of an offline run: LevelDB's log format behind a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole, or the last part
            yield record
            record = b""


def test_ranks_that_do_not_write_leave_no_history(tmp_path):
    silent = History(tmp_path, 0, is_writer=False)
    silent.add(ROWS[0])
    silent.close()
    assert silent.rows == []
    assert list(tmp_path.iterdir()) == []


def test_the_summary_has_what_programs_look_for(tmp_path):
    history = History(tmp_path, 0)
    for row in ROWS:
        history.add(row)
    path = tmp_path / "summary.json"
    settings = load_settings(["recursion.num_recursions=3", "recursion.router.type=expert_choice"])
    write_summary(
        path,
        settings,
        history,
        validation=VALIDATION,
        unigram_entropy=6.3,
        parameters=1234,
        flops_per_token=1e6,
        sample="def f",
    )
    summary = json.loads(path.read_text())
    assert summary["tokens_per_second"] == 2000.0
    assert (summary["validation_loss"], summary["causal_validation_loss"]) == (5.6, 5.7)
    assert summary["depth_shares"] == pytest.approx([0, 0.25, 0.5, 0.25])
    assert summary["causal_depth_shares"] == pytest.approx([0, 0.3, 0.4, 0.3])
    assert summary["versions"]["megatron-core"].startswith("0.")
    assert summary["settings"]["recursion"]["router"]["alpha"] == 0.1
    assert {"validation_loss", "unigram_entropy", "parameters", "flops_per_token"} <= set(summary)


def _shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=100)
    with Display("runs/test", 4, 6.3, console) as display:
        display.say("resumed at step 1 of 4")
        display.show(ROWS[1], Costs(2e7, None))
        display.show(ROWS[3], Costs(2e7, 0.25))
    return console.file.getvalue()


def test_without_a_terminal_each_row_is_a_line():
    lines = _shown(terminal=False).splitlines()
    assert lines[0] == "resumed at step 1 of 4"
    assert lines[1].startswith(
        "step 2/4 · loss 6.100 · validation 6.200 (routed as in generation 6.250, unigram 6.300)"
    )
    assert "MFU" not in lines[1]
    assert "MFU 25.0%" in lines[2]
    assert "share of tokens 1.00 0.75 0.25 · dead 10%" in lines[2]
    assert len(lines) == 3


def test_a_terminal_shows_shares_and_expert_load_per_step():
    shown = _shown(terminal=True)
    for expected in ("4 of 4", "5.500", "load of 2 experts", "0.25 0.75", "████", "left"):
        assert expected in shown


def test_ranks_without_a_console_show_nothing(capsys):
    with Display("runs/test", 4, 6.3, None) as display:
        display.say("hello")
        display.show(ROWS[1], Costs(2e7, None))
    assert capsys.readouterr().out == ""
