"""A recursive model with apex's norms and optimizer, in a process where the stand-in is imported."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers import ExpertChoice, RecursionConfig
from mor_megatron import default_layer_spec, recursion_block_spec
from mor_megatron.checkpoints import runs
from mor_megatron.layers.sublayers.norms import FusedNorm
from tests.distributed import megatron_setup as setup


def build(distributed: bool) -> tuple[Any, Any]:
    """Chunks and optimizer; norms as on a machine with a GPU."""
    config = setup.tiny_config(num_layers=8, transformer_impl="local")
    saved = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        layer = default_layer_spec(config)
        block = recursion_block_spec(config, RecursionConfig(3, router=ExpertChoice()), layer)
    finally:
        torch.cuda.is_available = saved
    model = setup.tiny_gpt(config, lambda config, vp_stage: block)
    chunks = setup.data_parallel(model, use_distributed_optimizer=distributed)
    return chunks, setup.build_optimizer(chunks, weight_decay=0.1)


def train_save_resume(directory: Path, distributed: bool) -> dict[str, Any]:
    """Losses of steps 3 and 4, undisturbed and after a resume; and what was used."""
    from apex.normalization import fused_layer_norm

    setup.initialize()
    fused_layer_norm.calls.clear()
    chunks, optimizer = build(distributed)
    norms = {type(m) for m in chunks[0].modules() if type(m).__name__.endswith("Norm")}
    assert norms == {FusedNorm}
    first = [setup.train_step(chunks, optimizer, tokens(step)) for step in range(2)]
    runs.save(directory, 2, chunks, optimizer)
    undisturbed = [setup.train_step(chunks, optimizer, tokens(step)) for step in range(2, 4)]
    expected = setup.gather_parameters(chunks)
    chunks, optimizer = build(distributed)
    runs.load(directory, chunks, optimizer)
    resumed = [setup.train_step(chunks, optimizer, tokens(step)) for step in range(2, 4)]
    found = setup.gather_parameters(chunks)
    part = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    return {
        "first": first,
        "undisturbed": undisturbed,
        "resumed": resumed,
        "changed": [name for name in expected if not torch.equal(expected[name], found[name])],
        "norms": set(fused_layer_norm.calls),
        "optimizer": f"{type(part.optimizer).__module__}.{type(part.optimizer).__name__}",
    }


def without_apex() -> list[float]:
    """Losses of the first two steps with our norm and torch's optimizer."""
    setup.initialize()
    config = setup.tiny_config(num_layers=8)
    recursion = RecursionConfig(3, router=ExpertChoice())
    model = setup.tiny_gpt(config, lambda config, v: recursion_block_spec(config, recursion))
    chunks = setup.data_parallel(model)
    optimizer = setup.build_optimizer(chunks, weight_decay=0.1)
    return [setup.train_step(chunks, optimizer, tokens(step)) for step in range(2)]


def tokens(step: int) -> Tensor:
    return setup.random_tokens(4, 12, seed=step)
