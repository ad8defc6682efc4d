"""The example of a router of one's own: it works everywhere, and nothing else knows of it."""

import inspect
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import custom_router
from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoRTransformer,
    RecursionConfig,
    from_mapping,
    save_model,
    to_mapping,
)
from mor_layers.costs import account
from mor_layers.generation import Request
from mor_layers.routers import registered_routers, registry
from mor_megatron import RoutingReport
from mor_tools.commands import main
from mor_vllm.plugin import hides_rows, require_servable
from tests.distributed.pool import WorkerPool
from tests.mor_layers.generation.served import assert_exact, serve
from tests.mor_layers.small_models import KV_POLICIES, random_ids, small_config, small_model

SEQUENCE_LENGTH = 14


def test_the_router_takes_at_most_thirty_lines():
    parts = (custom_router.Halting, custom_router.HaltingRouter)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) <= 30
    assert registered_routers()["halting"] is custom_router.Halting


def test_training_lowers_the_loss_and_gives_tokens_different_depths():
    torch.manual_seed(0)
    outputs = list(custom_router.train(25))
    losses = [output.lm_loss.item() for output in outputs]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    assert all(set(output.losses) == {"halting_loss"} for output in outputs)
    shares = custom_router.shares(outputs[-1])
    assert shares[0] == 1.0
    assert 0.0 < shares[2] <= shares[1] < 1.0


def test_the_script_prints_loss_and_depth_shares(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["custom_router.py", "2"])
    custom_router.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step    1  loss 5.")
    assert line.split("tokens that ran each step ")[1].strip().startswith("100%")


def test_what_it_costs_is_what_flop_counter_sees():
    config = small_config(custom_router.Halting())
    model, ids = small_model(config), random_ids(2, 11)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(ids, labels=ids)
        forward = counter.get_total_flops()
        output.loss.backward()
    widths = [d.tokens.shape[0] for r in output.recursions for d in r.decisions]
    cost = account(config, 11, widths)
    assert widths[-1] < 11
    assert 2 * cost.forward.total == forward
    assert 2 * cost.training.total == counter.get_total_flops()
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("policy", ["recursion_wise", "exit_state"])
def test_the_engine_generates_what_the_full_forward_pass_says(policy):
    model = small_model(small_config(custom_router.Halting(), kv_policy=policy))
    requests = [Request(tuple(random_ids(1, n, seed=n)[0].tolist()), 6) for n in (3, 7)]
    served = serve(model, requests)
    for request, own in zip(requests, served, strict=True):
        assert_exact(model, request, own)
    assert len({depth for own in served for depth in own.depths}) > 1


def loss_and_gradients(layout: str):
    """Of one global batch: on one rank, with tensor and sequence parallelism, or as a pipeline."""
    from tests.distributed import megatron_setup as setup
    from tests.distributed.pipeline import pipeline_setup

    is_pipeline = layout == "pipeline"
    parallel = {"one rank": {}, "tensor": {"tp": 2}, "pipeline": {"pp": 2, "vpp": 3}}
    setup.initialize(**parallel[layout])
    recursion = RecursionConfig(3, router=custom_router.Halting(coefficient=0.1))
    config = {"sequence_parallel": layout == "tensor"}
    case = pipeline_setup.Case(recursion, block_size=2, config=config)
    chunks = pipeline_setup.build(case, is_pipeline)
    decisions = pipeline_setup.watch_decisions(chunks)
    tokens = setup.random_tokens(2, SEQUENCE_LENGTH)
    loss = pipeline_setup.forward_backward(chunks, tokens)
    return loss, setup.gather_gradients(chunks), decisions


@pytest.fixture(scope="module")
def on_one_rank(pool: WorkerPool):
    return pool.run(loss_and_gradients, 1, layout="one rank")[0]


@pytest.mark.parametrize("layout", ["tensor", pytest.param("pipeline", marks=pytest.mark.full)])
def test_megatron_computes_on_two_ranks_what_it_computes_on_one(pool, on_one_rank, layout):
    expected_loss, expected, decisions = on_one_rank
    widths = {len(noted) for decision in decisions for noted in decision}
    assert len(widths) > 1, "no token exits, so nothing is routed"
    for loss, gradients, _ in pool.run(loss_and_gradients, 2, layout=layout):
        assert loss == pytest.approx(expected_loss, abs=1e-6)
        assert gradients.keys() == expected.keys()
        assert any("router" in name and g.any() for name, g in gradients.items())
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_plan_counts_it_in_every_layout(tmp_path):
    settings = {
        "model": {"num_unrolled_layers": 8},
        "recursion": {
            "num_recursions": 3,
            "router": {"type": "custom_router:Halting", "share": 0.4},
        },
        "data": {"vocabulary_size": 1000},
    }
    file, report = tmp_path / "run.yaml", tmp_path / "plan.json"
    OmegaConf.save(settings, file)
    command = ["plan", str(file), "--gpus", "2", "--hardware", "cpu", "--json", str(report)]
    main([*command, "--micro-batch-sizes", "1,2"])
    plans = json.loads(report.read_text())["plans"]
    assert {plan["pipeline_layout"] for plan in plans} == {"one_stage", "steps_as_stages"}


def test_a_run_counts_it_and_measures_it_once():
    from mor_tools.pretraining.models import build
    from mor_tools.pretraining.session import Session
    from mor_tools.pretraining.settings import Settings

    settings = Settings(recursion=RecursionConfig(3, router=custom_router.Halting()))
    router = next(s.router for s in build.shape(settings, 256).stacks if s.router is not None)
    assert router.parameters == 3 * (settings.model.hidden_size + 1)
    ways = []

    def evaluate(held_out, causal=False):
        ways.append(causal)
        return 5.0 + causal, [RoutingReport((1.0, 0.5, 0.5), 0.0, {}, None)]

    def validate(settings):
        run = object.__new__(Session)  # without the processes and files of a run
        trainer, data = SimpleNamespace(evaluate=evaluate), SimpleNamespace(held_out=None)
        vars(run).update(trainer=trainer, data=data, settings=settings)
        return run.validate()

    assert validate(settings).causal_loss == 5.0  # generation routes alike
    assert ways == [False]
    other = replace(settings, recursion=RecursionConfig(3, router=ExpertChoice()))
    assert validate(other).causal_loss == 6.0
    assert ways == [False, False, True]


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_vllm_serves_it_under_every_policy(policy):
    config = small_config(custom_router.Halting(), kv_policy=policy)
    require_servable(config)
    # It does not say that all tokens run step 1.
    assert hides_rows(config) == (policy != "exit_state")


@pytest.fixture
def not_imported(monkeypatch):
    """As in a process that has not imported the example."""
    others = {n: kind for n, kind in registered_routers().items() if n != "halting"}
    monkeypatch.setattr(registry, "_REGISTRY", others)


def test_a_saved_model_is_inspected_where_nobody_imported_the_router(
    tmp_path, request, monkeypatch
):
    values = OmegaConf.to_object(OmegaConf.create(custom_router.MODEL))
    config = replace(from_mapping(DecoderConfig, values), hidden_size=16, ffn_hidden_size=24)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    save_model(small_model(config), folder)
    text.write_text("What a reader takes in at once, and what takes longer.", "utf-8")
    request.getfixturevalue("not_imported")
    command = ["inspect", str(folder), "--text", str(text)]
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--trust-remote-code"])
    assert "depth" in (folder / "inspection.html").read_text("utf-8")


def test_a_registered_router_is_read_by_either_name_without_an_import():
    for name in ("halting", "custom_router:Halting"):
        values = {"num_recursions": 3, "router": {"type": name, "share": 0.25}}
        config = from_mapping(RecursionConfig, values)
        assert config.router == custom_router.Halting(share=0.25)
        assert to_mapping(config.router)["type"] == "custom_router:Halting"


def test_the_published_format_has_no_place_for_it(tmp_path):
    folder = tmp_path / "model"
    save_model(MoRTransformer(small_config(custom_router.Halting())), folder)
    from mor_layers.weights import open_model
    from mor_tools.formats.published_files import write_published

    with pytest.raises(ValueError, match="published checkpoints cannot describe router='Halting'"):
        write_published(open_model(folder), tmp_path)
