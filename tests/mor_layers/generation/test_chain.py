"""Generation with several recursions: what is cached, chunked and batched equals the full pass."""

from dataclasses import replace

import pytest
import torch

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    TokenChoice,
)
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.generation.incremental import IncrementalDecoder
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
from tests.mor_layers.small_models import plain_config, random_ids, small_model

CHOICE = RecursionConfig(
    3, "cycle", ExpertChoice(capacity_factors=(0.8, 0.5, 0.3)), "recursive_sharing", block_layers=1
)
FIXED = RecursionConfig(2, "middle_cycle", block_layers=2, share_norms=False, step_embeddings=True)
TOKEN = RecursionConfig(3, "middle_cycle", TokenChoice(), "exit_state", block_layers=1)
UPDATE = replace(TOKEN, sharing="cycle", kv_policy="sharing_with_update")
IN_SEQUENCE = RecursionConfig(2, "middle_sequence", block_layers=2)
WIDE = replace(CHOICE, router=DepthAndWidth(), kv_policy="recursion_wise")
MODELS = {
    "two routers": (CHOICE, TOKEN),
    "fixed depth, then a router": (FIXED, UPDATE),
    "one by one between two routers": (TOKEN, IN_SEQUENCE, CHOICE),
    "one by one, twice": (IN_SEQUENCE, replace(IN_SEQUENCE, sharing="sequence")),
    "experts in dense ends": (WIDE, FIXED),
}


def model_of(name: str) -> MoRTransformer:
    recursions = MODELS[name]
    layers = sum(recursion.num_unrolled_layers or 0 for recursion in recursions)
    config = replace(plain_config(layers), recursion=recursions)
    if "experts" in name:
        config = replace(config, moe=MoEConfig(4, 2), dense_ends=True)
    model = small_model(config).eval()
    for block in (block for own in model.blocks for block in own):
        for buffer, values in block.named_buffers():
            if buffer.endswith("training_steps"):
                values.fill_(1000)
    return model


REQUESTS = [
    Request(prompt(n, seed=n), max_new_tokens=m) for n, m in ((9, 5), (1, 7), (4, 3), (13, 2))
]


@pytest.mark.parametrize("name", MODELS)
def test_requests_get_the_logits_of_the_full_pass(name):
    model = model_of(name)
    served = serve(model, REQUESTS, chunk_size=4)
    for request, own in zip(REQUESTS, served, strict=True):
        assert own.finish_reason == "length"
        assert_exact(model, request, own)
    depths = {depth for own in served for depth in own.depths}
    assert (len(depths) > 1) == (name != "one by one, twice")


@pytest.mark.parametrize("name", ["two routers", "fixed depth, then a router"])
def test_requests_that_are_preempted_get_the_same(name):
    model = model_of(name)
    kv_bytes = 0.7 * CacheSettings.for_all_steps(model, 16).kv_bytes  # for two texts at most
    steps = sum(recursion.num_recursions for recursion in MODELS[name])
    shares = (0.4,) * steps  # fewer than run, so that too many requests are admitted
    recorder = Recorder(model, int(kv_bytes), page_size=2, chunk_size=3, shares=shares)
    for request in REQUESTS:
        recorder.submit(request)
    served = recorder.finish()
    assert recorder.engine.counters.preemptions > 0
    for request, own in zip(REQUESTS, served, strict=True):
        assert_exact(model, request, own)


def test_a_cancelled_request_leaves_nothing_behind():
    model = model_of("two routers")
    recorder = Recorder(model, chunk_size=4)
    numbers = [recorder.submit(request) for request in REQUESTS]
    for _ in range(3):
        recorder.step()
    assert recorder.engine.cancel(numbers[0])
    served = recorder.finish()
    for request, own in list(zip(REQUESTS, served, strict=True))[1:]:
        assert_exact(model, request, own)


@pytest.mark.parametrize("name", MODELS)
def test_texts_that_grow_are_as_if_read_at_once(name):
    model, ids = model_of(name), random_ids(3, 21)
    whole = model(ids, causal_routing=True)
    decoder, begin = IncrementalDecoder(model, 3), 0
    for length in (5, 1, 1, 12, 2):
        states = decoder.extend(ids[:, begin : begin + length])
        logits = model.output(states)
        expected = whole.logits[:, begin : begin + length]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        begin += length
    assert torch.equal(decoder.depths[:, :21], whole.depths)


def test_texts_are_cut_and_reordered_with_all_their_rows():
    model, ids = model_of("one by one between two routers"), random_ids(2, 9)
    decoder = IncrementalDecoder(model, 2)
    decoder.extend(ids)
    decoder.cut(6)
    decoder.select(torch.tensor([1, 1]))
    texts = torch.cat([ids[[1, 1], :6], random_ids(2, 4, seed=1)], dim=1)
    states = decoder.extend(texts[:, 6:])
    expected = model(texts, causal_routing=True).logits[:, 6:]
    torch.testing.assert_close(model.output(states), expected, rtol=1e-5, atol=1e-5)


def test_shares_are_those_of_all_steps():
    model = model_of("two routers")
    with pytest.raises(ValueError, match="must have 6 entries, one for each of the 3 \\+ 3 steps"):
        DepthBatchingEngine(model, CacheSettings(1 << 20, shares=(1.0, 0.5, 0.3)))
    settings = CacheSettings(1 << 20, num_slots=2, max_length=32, shares=(1, 1, 1, 1.0, 0.1, 0.1))
    caches = DepthBatchingEngine(model, settings).caches
    assert len(caches.pages) == 4 and caches.num_bytes <= settings.kv_bytes
    assert caches.num_bytes > 0.9 * settings.kv_bytes


def test_the_links_of_a_chain_share_the_modules_of_the_model():
    model = model_of("one by one between two routers")
    own = {id(parameter) for parameter in model.parameters()}
    chain = model.chain()
    linked = {id(p) for link in chain for p in link.parameters()}
    assert linked == own and len(chain) == 3
    assert [len(link.prelude.layers) for link in chain] == [1, 2, 1]
    assert [link.config.schedule.prelude for link in chain] == [1, 2, 1]
