"""What the benchmark beside vLLM makes of engines: their turns, ratios, limits and verdicts."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import beside_vllm
from benchmarks.paired_timing import Estimate, estimate
from benchmarks.serving.feed import Feed, Requests, Turn
from benchmarks.serving.limits import Prices, Served
from benchmarks.serving.ours import EngineOptions, Load
from benchmarks.serving.rounds import Row, into_page, take_turns
from benchmarks.serving.shapes import decoder_config
from mor_layers import MoRTransformer
from mor_layers.generation import calibrate


class Counting:
    """An engine that takes `cost` seconds for a tick, and two ticks before a first token."""

    def __init__(self, cost: float = 1.0) -> None:
        self.cost, self.now = cost, 0.0
        self.open: dict[int, int] = {}
        self.lengths: list[int] = []
        self._ages: dict[int, int] = {}

    @property
    def num_running(self) -> int:
        return len(self.open)

    def submit(self, number: int, ids: Sequence[int], new_tokens: int) -> None:
        self.open[number], self._ages[number] = new_tokens, 0
        self.lengths.append(len(ids) + new_tokens)

    def step(self) -> list[int]:
        self.now += self.cost
        numbers = [number for number in self.open if self._ages[number] > 0]
        for number in self.open:
            self._ages[number] += 1
        for number in numbers:
            self.open[number] -= 1
        self.open = {number: left for number, left in self.open.items() if left}
        return numbers

    def feed(self, requests: Requests) -> Feed:
        return Feed(self, requests, lambda: self.now)


def test_a_feed_keeps_all_places_taken_and_times_first_tokens() -> None:
    requests = Requests(3, 5, 4, vocabulary=9, in_flight=6)
    engine = Counting(cost=0.5)
    feed = engine.feed(requests)
    turn = feed.run(60)
    assert turn.tokens >= 60 and turn.seconds == 0.5 * turn.ticks
    assert turn.rate == turn.tokens / turn.seconds
    assert turn.waits and set(turn.waits) == {1.0}  # two ticks; those half written do not count
    assert all(7 <= length <= 9 for length in engine.lengths)
    engine.now += 100  # others have their turns: nobody waits meanwhile
    assert set(feed.run(60).waits) == {1.0}


def test_the_same_requests_come_to_every_engine() -> None:
    requests = Requests(1, 3, 8, vocabulary=50, in_flight=4)
    engines = Counting(), Counting()
    for engine, tokens in zip(engines, (90, 45), strict=True):
        engine.feed(requests).run(tokens)
    shorter = engines[1].lengths
    assert engines[0].lengths[: len(shorter)] == shorter


def turn(tokens: int, seconds: float, waits: tuple[float, ...] = ()) -> Turn:
    return Turn(tokens, seconds, 2 * seconds, 1, 4.0, waits)


def test_a_steady_drift_cancels_in_a_rounds_ratio() -> None:
    moments = iter(range(100))

    def engine(cost: float):
        return lambda tokens: turn(tokens, cost * (1 + 0.1 * next(moments)), waits=(cost,))

    rounds = take_turns({"slow": engine(3.0), "fast": engine(1.0)}, 10, rounds=5, minutes=9)
    found = rounds.throughput("fast", "slow")
    assert found.ratio == pytest.approx(3.0) and found.rounds == 5
    assert found.low == pytest.approx(3.0) and found.high == pytest.approx(3.0)
    assert rounds.throughput("fast", "slow", 0.5).ratio == pytest.approx(1.5)
    assert found.share == rounds.share("fast") == 0.5
    waits = rounds.wait_ratio("slow", "fast", 99)
    assert waits.ratio == pytest.approx(3.0) and waits.rounds == 10


def test_no_round_begins_after_the_time_is_over() -> None:
    rounds = take_turns({"one": lambda tokens: turn(tokens, 1.0)}, 10, rounds=9, minutes=0)
    assert len(rounds.turns["one"]) == 1
    with pytest.raises(ValueError, match="take more rounds"):
        rounds.wait_ratio("one", "one", 50)


def test_prices_are_those_that_both_runs_paid() -> None:
    config = decoder_config("small", 64, 1, "recursion_wise")
    few, many = (Served(config, 2, 8, 1.0, sequences) for sequences in (4, 32))
    true = Prices(2e-9, 3e-8)
    found = Prices.of((few, true.seconds(few)), (many, true.seconds(many)))
    assert found.flop == pytest.approx(true.flop) and found.number == pytest.approx(true.number)
    # More sequences cannot make a token slower. If noise says so, reading costs nothing.
    noisy = Prices.of((few, 1.0), (many, 1.1))
    assert noisy.number == 0 and noisy.seconds(many) == pytest.approx(1.1)
    routed = decoder_config("small", 64, 4, "recursive_sharing")
    shallow, deep = (Served(routed, 2, 8, depth, 32) for depth in (1.5, 3.0))
    assert true.seconds(shallow) < true.seconds(deep) < true.seconds(many)


@pytest.mark.parametrize(
    ("ratios", "is_least", "verdict"),
    [
        ([1.1, 1.2], True, "met"),
        ([0.8, 0.9], True, "missed"),
        ([0.9, 1.1], True, "open"),
        ([0.8, 0.9], False, "met"),
        ([1.1, 1.2], False, "missed"),
    ],
)
def test_verdicts(ratios: list[float], is_least: bool, verdict: str) -> None:
    found = estimate(ratios * 5, share=0.95)
    assert Row("", found, 1.0, is_least).verdict == verdict
    busy = estimate(ratios * 5, share=0.5)
    assert Row("", busy, 1.0, is_least).verdict == f"{verdict}, on a busy machine"


STAND_IN = '''
"""What the benchmark uses of vLLM; it continues each text with the model's own greedy tokens."""
import torch
from transformers import LlamaForCausalLM

__version__ = "0.0"

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize, output_kind):
        assert temperature == 0 and ignore_eos and not detokenize and output_kind == "delta"
        self.max_tokens = max_tokens

class Given:
    def __init__(self, **values): self.__dict__ |= values

class Engine:
    def __init__(self, model, settings):
        self.model, self.open = model, {}
        self.vllm_config = Given(
            model_config=Given(dtype=model.dtype, architectures=["Llama"],
                               enforce_eager=settings["enforce_eager"]),
            cache_config=Given(kv_cache_memory_bytes=settings["kv_cache_memory_bytes"],
                               block_size=128, enable_prefix_caching=False),
            scheduler_config=Given(max_num_seqs=settings["max_num_seqs"],
                                   max_num_batched_tokens=settings["max_num_batched_tokens"],
                                   enable_chunked_prefill=True),
        )

    def add_request(self, number, prompt, sampling):
        self.open[number] = [list(prompt["prompt_token_ids"]), sampling.max_tokens]

    def abort_request(self, numbers):
        for number in numbers: del self.open[number]

    def has_unfinished_requests(self): return bool(self.open)

    def get_num_unfinished_requests(self): return len(self.open)

    @torch.no_grad()
    def step(self):
        print("chatter on standard output")
        made = []
        for number, entry in list(self.open.items()):
            token = self.model(torch.tensor([entry[0]])).logits[0, -1].argmax().item() {wrong}
            entry[0].append(token)
            entry[1] -= 1
            if not entry[1]: del self.open[number]
            made.append(Given(request_id=number, outputs=[Given(token_ids=[token])]))
        return made

class LLM:
    def __init__(self, folder, skip_tokenizer_init, dtype, **settings):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.llm_engine = Engine(model, settings)
'''
SHORT = "--shape small --layers 6 --batch 4 --kv-sequences 2 --new-tokens 6 --tokens 8 --rounds 2"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package named vllm, which the benchmark's second process imports."""

    def write(wrong: str = "") -> list[str]:
        folder = tmp_path / "packages" / "vllm"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(STAND_IN.replace("{wrong}", wrong))
        kinds = "class RequestOutputKind: DELTA = 'delta'\n"
        (folder / "sampling_params.py").write_text(kinds)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={folder.parent} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        return ["beside_vllm.py", "--vllm-python", str(python), *SHORT.split()]

    return write


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Other tests may use all cores afterwards."""
    monkeypatch.setattr(beside_vllm.os, "sched_setaffinity", lambda process, cores: None)


class InPlace:
    """Our own engine in place of vLLM's process."""

    def __init__(self, python: str, model: MoRTransformer, most: Requests, settings: dict) -> None:
        self.model = model
        self.facts = {"version": "0.0", "max_num_seqs": most.in_flight} | settings

    def answers(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return Load.answers(self.model, prompts, new_tokens)

    def load(self, requests: Requests) -> None:
        self.run = Load(self.model, requests, 1 << 22, EngineOptions(temperature=0.0)).run

    def __enter__(self) -> "InPlace":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_a_record_has_each_ratio_and_what_was_compared(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "record.json"
    monkeypatch.setattr(beside_vllm, "VLLMProcess", InPlace)
    command = ["beside_vllm.py", "--vllm-python", "-", *SHORT.split(), "--json", str(file)]
    page = tmp_path / "page.md"
    page.write_text("# Costs\n<!-- beside vLLM: throughput -->\n\n| old |\n| --- |\n\nMore.\n")
    monkeypatch.setattr(sys, "argv", [*command, "--profile", "--page", str(page)])
    beside_vllm.main()
    record = json.loads(file.read_text())
    assert record["equality"] == "0 of 120 greedy tokens are chosen otherwise"
    assert len(record["rows"]) == 7
    assert all(row["found"]["rounds"] in (2, 4) and row["verdict"] for row in record["rows"])
    assert set(record["equal batch"]) == {"vllm", "plain", "plain, few", "routed"}
    assert 1 < record["equal batch"]["routed"]["mean_depth"] < 4
    assert record["equal kv"]["routed"]["sequences"] > 2
    assert record["operations"]["routed"][0]["milliseconds"] > 0
    assert "MoR-4" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# Costs\n") and text.endswith(" |\n\nMore.\n") and "old" not in text
    assert text.count("\n| engine's own share") == 2

    monkeypatch.setattr(sys, "argv", [*command, "--first-token", "--prompt", "9"])
    beside_vllm.main()
    record = json.loads(file.read_text())
    assert [row["target"] for row in record["rows"]] == [1.0] * 4
    assert len(record["seconds_to_first_token"]["vllm"]) >= 4


@pytest.mark.full
def test_a_compiled_tick_is_timed_as_a_whole() -> None:
    torch.manual_seed(0)
    model = MoRTransformer(decoder_config("small", 64, 2, "recursive_sharing", layers=4))
    calibrate(model, [torch.randint(64, (4, 32))])
    requests = Requests(2, 3, 6, vocabulary=64, in_flight=4)
    load = Load(model, requests, 1 << 22, EngineOptions(temperature=0.0, compiler="eager"))
    load.settle()  # calibrates again, so that the graph is compiled anew
    load.forget()
    assert load.run(12).tokens >= 12
    assert 0 < load.own_share < 1 and 1 <= load.depth <= 2


@pytest.mark.parametrize("kind", ["throughput", "first token"])
def test_the_page_has_the_recorded_figures(kind: str) -> None:
    docs = Path(__file__).parents[2] / "docs"
    name = f"beside_vllm_{kind.replace(' ', '_')}.json"
    record = json.loads((docs / "measurements" / name).read_text())
    rows = [
        Row(row["name"], Estimate(**row["found"]), row["target"], row["is_least"])
        for row in record["rows"]
    ]
    page = (docs / "pages" / "costs.md").read_text("utf-8")
    assert into_page(page, kind, rows) == page


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no line '<!-- beside vLLM: first token -->'"):
        into_page("# Costs\n", "first token", [])


@pytest.mark.full
def test_vllms_process_serves_the_same_weights(tmp_path, monkeypatch, stand_in) -> None:
    file = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", [*stand_in(), "--json", str(file)])
    beside_vllm.main()
    record = json.loads(file.read_text())
    assert record["equality"] == "0 of 120 greedy tokens are chosen otherwise"
    assert record["vllm"]["max_num_seqs"] == 4 and not record["vllm"]["prefix_caching"]
    assert record["equal kv"]["vllm"]["sequences"] < 4


@pytest.mark.full
def test_another_model_and_an_engine_that_fails_are_errors(monkeypatch, stand_in) -> None:
    monkeypatch.setattr(sys, "argv", stand_in(wrong="^ 1"))
    with pytest.raises(RuntimeError, match="not serve the same model: 20 of 20 greedy"):
        beside_vllm.main()
    monkeypatch.setattr(sys, "argv", stand_in(wrong="+ nothing"))
    with pytest.raises(RuntimeError, match=r"(?s)vLLM's process ended with 1.*nothing"):
        beside_vllm.main()
