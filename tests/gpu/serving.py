"""Checks of the generation engine on one GPU. Every function runs on a CPU in a rehearsal."""

from typing import Any

import torch

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from tests.distributed import megatron_setup as setup


def replayed_ticks_give_the_full_pass(recursion: RecursionConfig) -> dict[str, Any]:
    """Greedy tokens and depths of requests that come and go, while ticks replay CUDA graphs."""
    setup.initialize()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    config = DecoderConfig(64, 32, 64, num_unrolled_layers=8, num_heads=4, recursion=recursion)
    model = MoRTransformer(config).to(setup.device()).eval()
    engine = DepthBatchingEngine(model, CacheSettings(1 << 22, num_slots=16), compiler="aot_eager")
    requests = [Request(tuple(range(1, 2 + i % 5)), 4 + i % 7) for i in range(24)]
    texts = {engine.submit(request): list(request.ids) for request in requests}
    depths: dict[int, list[int]] = {number: [] for number in texts}
    for event in engine.run():
        if event.token is not None and event.depth is not None:
            texts[event.number].append(event.token)
            depths[event.number] += event.prompt_depths or (event.depth,)
    for number, text in texts.items():
        ids = torch.tensor([text], device=setup.device())
        with torch.no_grad():
            output = model(ids, causal_routing=True)
        start = len(requests[number].ids)
        assert output.logits[0, start - 1 : -1].argmax(dim=-1).tolist() == text[start:]
        assert output.depths[0, :-1].tolist() == depths[number]
    return {"sizes": engine.runner.num_recorded}
