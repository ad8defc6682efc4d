"""A tick as one graph: exact for whatever is in flight, compiled whole, and compiled once.

Most tests run the function without a compiler, which takes a fraction of the time and computes the same.
"""

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mor_layers import MoRTransformer
from mor_layers.cpu_kernels import without_cpu_kernels
from mor_layers.generation import (
    CacheSettings,
    DepthBatchingEngine,
    Request,
    Sampling,
    calibrate,
    turn_dial,
    with_early_exit,
)
from mor_layers.generation.cache import PagedRows
from mor_layers.generation.tick.graph.sizes import FINEST, padded_size
from mor_layers.models import DecoderStack
from mor_layers.recursion import KVPolicy
from mor_layers.routers import Divergence
from tests.mor_layers.generation.every_setting import SERVED
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
from tests.mor_layers.generation.test_chain import model_of
from tests.mor_layers.generation.test_engine import ALL_ROUTERS, POLICIES, SHARINGS
from tests.mor_layers.generation.test_running_ahead import (
    Client,
    answers,
    needing_the_host,
    of_all_kinds,
)
from tests.mor_layers.small_models import ROUTERS, random_ids, small_config, small_model
from tests.pairs import pairwise_sweep


def coming_and_going(model: MoRTransformer, recorder: Recorder, count: int = 12) -> None:
    """Requests of all lengths come while others run, and are served exactly, by graphs alone."""
    requests = [Request(prompt(1 + i % 5, i), 2 + i % 7) for i in range(count)]
    for request in requests:
        recorder.submit(request)
        recorder.step()
    for request, served in zip(requests, recorder.finish(), strict=True):
        assert_exact(model, request, served)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("router", "policy", "sharing"),
    pairwise_sweep(itertools.product(ALL_ROUTERS, POLICIES, SHARINGS)),
)
def test_every_router_and_policy_is_exact(router: str, policy: KVPolicy, sharing: str) -> None:
    model = small_model(small_config(ALL_ROUTERS[router], 3, sharing, policy))
    coming_and_going(model, Recorder(model, num_slots=6, chunk_size=3, compiler="eager"))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compiler", [None, "eager"])
def test_ticks_are_exact_without_a_c_compiler(policy: KVPolicy, compiler: str | None) -> None:
    model = small_model(small_config(ROUTERS["expert_choice"], 3, kv_policy=policy))
    with without_cpu_kernels():
        recorder = Recorder(model, num_slots=6, chunk_size=5, compiler=compiler)
        coming_and_going(model, recorder, count=8)


@pytest.mark.usefixtures("uncompiled")
def test_early_exit_by_a_criterion_is_exact() -> None:
    model = small_model(small_config(num_recursions=3))
    recorder = Recorder(model, num_slots=6, chunk_size=3, compiler="eager")
    coming_and_going(model, recorder, count=4)
    with_early_exit(model, Divergence(0.05))  # another router, whose plans get longer by step
    recorder = Recorder(model, num_slots=6, chunk_size=3, compiler="eager")
    coming_and_going(model, recorder, count=8)
    depths = {depth for own in recorder.served.values() for depth in own.depths}
    assert len(depths) > 1


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["two routers", "fixed depth, then a router"])
def test_several_recursions_are_a_graph_each(name: str) -> None:
    model = model_of(name)
    coming_and_going(model, Recorder(model, num_slots=6, chunk_size=3, compiler="eager"), count=8)


@pytest.mark.usefixtures("uncompiled", "recording")
@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_gpu_records_is_exact(policy: KVPolicy) -> None:
    model = small_model(small_config(ROUTERS["expert_choice_first_step_too"], kv_policy=policy))
    recorder = Recorder(model, num_slots=12, chunk_size=4, compiler="eager")
    coming_and_going(model, recorder)
    # Some ticks had more rows than two for each slot, and ran without a graph.
    coming_and_going(model, Recorder(model, num_slots=2, chunk_size=9, compiler="eager"))


@pytest.mark.usefixtures("uncompiled", "recording")
@pytest.mark.parametrize("name", ["experts of groups", "own attention", "latent rows"])
def test_recipes_that_a_gpu_records_are_exact(name: str) -> None:
    model = small_model(SERVED[name])
    coming_and_going(model, Recorder(model, num_slots=6, chunk_size=3, compiler="eager"), count=8)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("policy", POLICIES)
def test_ticks_with_and_without_a_graph_take_turns(policy: KVPolicy) -> None:
    """Where pages run out, sequences give way, in ticks without a graph."""
    model = small_model(small_config(ROUTERS["expert_choice"], 3, "middle_cycle", policy))
    calibrate(model, [random_ids(8, 32)])
    requests = [Request(prompt(4, seed), 20) for seed in range(6)]
    tight = {"kv_bytes": 24_000, "num_slots": 6, "shares": (0.3, 0.02, 0.02)}
    recorder = Recorder(model, compiler="eager", **tight)
    static, ran = recorder.engine.runner.links[0].static, []
    assert static is not None
    for request in requests:
        recorder.submit(request)
    while not recorder.engine.is_idle:
        recorder.step()
        ran.append(static.has_tokens)
    assert recorder.engine.counters.preemptions > 0
    changes = sum(a != b for a, b in itertools.pairwise(ran))
    assert changes > 2, "ticks of both kinds"
    for request, served in zip(requests, recorder.finish(), strict=True):
        assert_exact(model, request, served)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("policy", POLICIES)
def test_prefixes_are_shared_and_requests_cancelled(policy: KVPolicy) -> None:
    model = small_model(small_config(ROUTERS["token_choice"], kv_policy=policy))
    system = prompt(18, 30)
    requests = [Request((*system, *prompt(n, 20 + n)), 6) for n in (1, 7, 2, 2, 9, 5)]
    recorder = Recorder(model, num_slots=3, chunk_size=6, compiler="eager")
    numbers = [recorder.submit(request) for request in requests]
    for _ in range(9):
        recorder.step()
    assert recorder.engine.cancel(numbers[1])
    served = recorder.finish()
    assert sum(own.cached_tokens for own in served) > 0
    assert served[1].finish_reason == "cancelled"
    for number in (0, 2, 3, 4, 5):
        assert_exact(model, requests[number], served[number])


@pytest.mark.usefixtures("uncompiled")
def test_logprobs_of_prompts_are_the_same() -> None:
    model = small_model(small_config(ROUTERS["expert_choice"]))
    requests = [
        Request(prompt(n, n), 5, Sampling(1.0), num_logprobs=2, prompt_logprobs=True)
        for n in (5, 1, 9)
    ]

    def events(compiler: str | None) -> list[tuple[Any, ...]]:
        engine = DepthBatchingEngine(model, CacheSettings(1 << 20, 4, 64), 3, compiler=compiler)
        for request in requests:
            engine.submit(request)
        found = [
            (event.number, event.token, event.depth, event.prompt_depths, logprob)
            for event in engine.run()
            for logprob in (*event.prompt_logprobs, event.logprobs)
        ]
        return sorted(found, key=lambda own: own[0])

    for wanted, got in zip(events(None), events("eager"), strict=True):
        assert got[:4] == wanted[:4]
        assert got[4].token == wanted[4].token
        assert got[4].logprob == pytest.approx(wanted[4].logprob, abs=1e-5)
        assert [i for i, _ in got[4].best] == [i for i, _ in wanted[4].best]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("eight_bits", ["is_int8", "is_fp8"])
def test_an_8_bit_cache_is_rounded_once(eight_bits: str) -> None:
    model = small_model(small_config(ROUTERS["token_choice"], 3, kv_policy="recursive_sharing"))
    requests = [Request(prompt(1 + i % 3, i), 2 + i % 5) for i in range(8)]
    options = {"num_slots": 8, eight_bits: True}
    plain, static = (serve(model, requests, compiler=c, **options) for c in (None, "eager"))
    for wanted, got in zip(plain, static, strict=True):
        assert (got.tokens, got.depths) == (wanted.tokens, wanted.depths)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        pytest.param("expert_choice", "recursive_sharing", marks=pytest.mark.full),
        pytest.param("random_depth", "recursion_wise", marks=pytest.mark.full),
        pytest.param("depth_and_width", "sharing_with_update", marks=pytest.mark.full),
        pytest.param("expert_choice_first_step_too", "exit_state", marks=pytest.mark.full),
    ],
)
def test_one_graph_serves_whatever_is_in_flight(router: str, policy: KVPolicy) -> None:
    torch.compiler.reset()
    compiled = CompileCounterWithBackend("eager")  # a break would raise an error: fullgraph=True
    model = small_model(small_config(ALL_ROUTERS[router], kv_policy=policy))
    recorder = Recorder(model, num_slots=20, chunk_size=4, compiler=compiled)
    recorder.submit(Request(prompt(2), 3))
    recorder.step()
    assert compiled.frame_count == 1
    requests = [Request(prompt(1 + i % 5, i), 2 + i % 7) for i in range(24)]
    numbers = []
    for request in requests:
        numbers.append(recorder.submit(request))
        recorder.step()
    served = recorder.finish()
    for request, number in zip(requests, numbers, strict=True):
        assert_exact(model, request, served[number])
    assert compiled.frame_count == 1, "something in flight changed the graph"


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_the_graph_goes_on_without_the_host_in_every_way(backend: str) -> None:
    torch.compiler.reset()
    compiled = CompileCounterWithBackend(backend)
    model = small_model(small_config(ROUTERS["token_choice"], 2))
    client = Client(model, compiler=compiled, runs_ahead=True)
    requests = of_all_kinds(10, 1) + needing_the_host(1) + of_all_kinds(4, 2)
    assert answers(client, requests) == answers(Client(model), requests)
    assert client.num_ahead > 10 and compiled.frame_count == 1


@pytest.mark.full
def test_a_graph_is_compiled_anew_for_another_router_only() -> None:
    torch.compiler.reset()
    compiled = CompileCounterWithBackend("eager")
    model = small_model(small_config(ALL_ROUTERS["depth_and_width"]))

    recorder = Recorder(model, num_slots=6, chunk_size=4, compiler=compiled)

    def depths() -> set[int]:
        request = Request(prompt(6), 5)
        number = recorder.submit(request)
        served = recorder.finish()[number]
        assert_exact(model, request, served)
        return set(served.depths)

    assert depths() != {3} and compiled.frame_count == 1
    turn_dial(model, depth=-9.0)
    assert depths() == {3} and compiled.frame_count == 2
    with torch.no_grad():
        model.output.weight.mul_(-1)
    model.coda.layers[0].mlp.up.weight = torch.nn.Parameter(torch.zeros(10, 12))
    assert depths() == {3} and compiled.frame_count == 2, "weights are no constants of the graph"


@pytest.mark.full
def test_every_engine_has_a_graph_of_its_own() -> None:
    torch.compiler.reset()
    models = [small_model(small_config(ROUTERS["expert_choice"]), seed) for seed in (0, 1)]
    recorders = [Recorder(model, num_slots=6, compiler="eager") for model in models]
    for model, recorder in zip(models, recorders, strict=True):
        coming_and_going(model, recorder, count=4)


@pytest.mark.full
@pytest.mark.parametrize("name", SERVED)
def test_every_setting_is_one_graph(name: str) -> None:
    torch.compiler.reset()
    compiled = CompileCounterWithBackend("aot_eager")
    model = small_model(SERVED[name]).double()  # some of them make rounding errors large
    recorder = Recorder(model, num_slots=12, chunk_size=4, compiler=compiled)
    coming_and_going(model, recorder)
    assert compiled.frame_count == len(recorder.engine.runner.links)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("policy", POLICIES)
def test_compilers_compute_the_same(policy: KVPolicy, backend: str) -> None:
    torch.compiler.reset()
    model = small_model(small_config(ROUTERS["expert_choice"], 3, kv_policy=policy))
    coming_and_going(model, Recorder(model, num_slots=12, chunk_size=4, compiler=backend))


def test_a_graph_takes_pages_as_the_host_does() -> None:
    """The same entries at the same rows, whether lists grow with or without a graph, or in turns."""
    generator = torch.Generator().manual_seed(0)
    host, graph = (PagedRows(num_pages=40, page_size=3, num_lists=5, max_rows=60) for _ in "ab")
    for turn in range(30):
        count = 1 + int(torch.randint(6, (), generator=generator))
        lists = torch.randint(4, (count,), generator=generator).sort().values
        is_new = torch.rand(len(lists), generator=generator) < 0.8
        if turn % 7 == 6:
            for pages in (host, graph):
                pages.release(torch.tensor([turn % 4]))
            continue
        places, rows = host.append(lists[is_new])
        assert graph.reserve(len(lists))
        graph.begin_graph()
        found = graph.append_in_graph(lists.where(is_new, 4), is_new)
        graph.end_graph(int(graph.num_free_in_graph))
        assert torch.equal(found[0][is_new], places) and torch.equal(found[1][is_new], rows)
        assert graph.free_pages == host.free_pages
        assert torch.equal(graph.counts, host.counts)


def test_layers_that_are_not_routed_are_refused() -> None:
    model = small_model(small_config(sharing="sequence", block_size=2))
    with pytest.raises(ValueError, match="this model has none"):
        DepthBatchingEngine(model, CacheSettings(1 << 20), compiler="eager")


def test_a_compiler_that_there_is_not_is_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"'nothing' is no backend of torch\.compile\. Use .*'inductor'"
    ):
        DepthBatchingEngine(small_model(small_config()), CacheSettings(1 << 20), compiler="nothing")


@pytest.mark.parametrize("part", ["recursions.0.layers", "coda"])
def test_hooks_are_refused(part: str) -> None:
    model = small_model(small_config())
    layer = model.get_submodule(part).layers[0]  # type: ignore[index]
    layer.mlp.down.register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(ValueError, match="have hooks"):
        DepthBatchingEngine(model, CacheSettings(1 << 20), compiler="eager")


def rows_per_token(monkeypatch: pytest.MonkeyPatch, arriving: int) -> dict[str, float]:
    """Rows that each part of a busy engine's model computes, over the tokens that it runs.

    Args:
        arriving: requests that come in a tick. Some 35 times as many are in flight.
    """
    model = small_model(small_config(ROUTERS["token_choice"], 3))
    stacks = {"prelude": model.prelude, "block": model.recursions[0].layers, "coda": model.coda}
    counted: Counter[int] = Counter()
    run, read_out = DecoderStack.forward, model.output.forward

    def counted_run(stack: DecoderStack, hidden: Tensor, *given: Any) -> Tensor:
        counted[id(stack)] += len(hidden)
        return run(stack, hidden, *given)

    def counted_read_out(hidden: Tensor) -> Tensor:
        counted[id(model.output)] += len(hidden)
        return read_out(hidden)

    monkeypatch.setattr(DecoderStack, "forward", counted_run)
    monkeypatch.setattr(model.output, "forward", counted_read_out)
    source = random.Random(0)
    settings = CacheSettings(1 << 23, 48 * arriving, 64)
    engine = DepthBatchingEngine(
        model, settings, chunk_size=16, packs_weights=False, compiler="eager"
    )
    for number in range(100 * arriving):
        engine.submit(Request(prompt(source.randrange(2, 30), number), source.randrange(4, 30)))
        if number % arriving == 0:
            engine.step()
    while not engine.is_idle:
        engine.step()
    counters = engine.counters
    # The last token of a text does not enter.
    entered = counters.prompt_tokens + counters.generated_tokens - counters.finished
    tokens = {"prelude": entered, "block": counters.steps, "coda": entered}
    rows = {name: counted[id(stack)] / tokens[name] for name, stack in stacks.items()}
    return rows | {"output": counted[id(model.output)] / counters.generated_tokens}


@pytest.mark.usefixtures("uncompiled")
def test_nearly_every_row_holds_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_per_token(monkeypatch, arriving=1)
    assert 1 <= rows["prelude"] < 1.02 and 1 <= rows["block"] < 1.02
    # Who leaves is found out in the graph, which has room for a standard deviation more than usual.
    assert 1 <= rows["coda"] < 1.25 and 1 <= rows["output"] < 1.4


@pytest.mark.usefixtures("uncompiled", "recording")
def test_few_rows_of_recorded_sizes_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_per_token(monkeypatch, arriving=2)
    assert 1 <= rows["prelude"] < 1.05 and 1 <= rows["block"] < 1.05
    assert 1 <= rows["coda"] < 1.25 and 1 <= rows["output"] < 1.3


def test_few_sizes_are_close() -> None:
    sizes = [padded_size(count, has_few=True) for count in range(1, 1025)]
    for count, size in enumerate(sizes, start=1):
        assert count <= size < count + max(FINEST, count / 16)
    assert len(set(sizes)) < 100
    assert [padded_size(count, has_few=False) for count in (0, 1, 2, 3, 77)] == [2, 2, 2, 3, 77]
