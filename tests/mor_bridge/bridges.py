"""Models that Megatron-Bridge takes from folders and back.

Every function runs on a rank of a worker pool.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mor_layers.weights import load_model, state_of
from mor_megatron import causal_routing
from mor_megatron.platform import bridge_on_cpu
from tests.distributed import megatron_setup as setup
from tests.distributed.checkpoints.test_weights import logits_through_stages


@dataclass(frozen=True)
class Found:
    """What there and back came to, on one rank."""

    logits: float
    """Largest difference from those of the model in plain PyTorch; 0 before the last stage."""
    changed: list[str]
    """Tensors that were exported with other values, or not at all."""


def start(**layout: int) -> None:
    """Lays the world out, and lets Megatron-Bridge be imported."""
    bridge_on_cpu.enable()
    setup.initialize(**layout)


def build(
    bridge: Any, *, sp: bool = False, tp: int = 1, pp: int = 1, ep: int = 1
) -> list[nn.Module]:
    """This rank's part of the Megatron model of an AutoBridge, with its weights."""
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = tp
    provider.pipeline_model_parallel_size = pp
    provider.expert_model_parallel_size = ep
    provider.sequence_parallel = sp
    provider.parallel_output = False
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def there_and_back(folder: Path, layout: dict[str, int], sp: bool) -> Found:
    """Take a folder into Megatron and its tensors out of it again."""
    start(**layout)
    from megatron.bridge import AutoBridge

    import mor_bridge  # noqa: F401 registers the bridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    return compared(bridge, build(bridge, sp=sp, **layout), folder)


def compared(bridge: Any, chunks: list[nn.Module], folder: Path) -> Found:
    """How a Megatron model, and what is exported from it, differ from the model in a folder."""
    ours = load_model(folder).eval()
    ids = torch.randint(
        0, ours.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3)
    )
    chunks[0].eval()
    with torch.no_grad(), causal_routing(chunks):
        logits = logits_through_stages(chunks[0], ids)
        expected = ours(ids, causal_routing=True).logits
    exported = dict(bridge.export_hf_weights(chunks, cpu=True, show_progress=False))
    back = state_of(ours.config, {name.removeprefix("model."): t for name, t in exported.items()})
    state = ours.state_dict()
    changed = [
        name for name in state if not torch.equal(back.pop(name, torch.empty(0)), state[name])
    ]
    difference = (
        0.0 if logits is None else (logits[..., : expected.shape[-1]] - expected).abs().max().item()
    )
    return Found(difference, [*changed, *back])
