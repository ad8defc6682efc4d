"""A MoRTransformer under PyTorch's FSDP2: one all-gather of the block serves all its steps.

    torchrun --nproc-per-node 2 examples/fsdp2.py [number of steps]

The weights of a recursion are needed `N_r` times in a forward pass, and where `fully_shard` stands
decides how often they travel: around the RecursionBlock they are gathered once, around the layers
inside once a step. Prints both counts, then trains. gloo on a CPU, NCCL where every rank has a GPU.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from custom_router import text_batches
from mor_layers import (
    DecoderConfig,
    DecoderOutput,
    ExpertChoice,
    MoRTransformer,
    RecursionBlock,
    RecursionConfig,
)
from mor_layers.models import DecoderStack

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    ffn_hidden_size=160,
    num_unrolled_layers=6,  # a block of two layers that runs three times
    num_heads=4,
    recursion=RecursionConfig(3, "cycle", ExpertChoice()),
)
Unit = Literal["block", "stack", "layer"]
"""What is gathered at a time: the RecursionBlock, the layers inside it together, each of them."""


def units_of(model: MoRTransformer, unit: Unit) -> list[nn.Module]:
    """The modules of the recursions that are gathered one at a time."""
    blocks = cast(list[RecursionBlock], list(model.recursions))
    if unit == "block":
        return list(blocks)
    stacks = [cast(DecoderStack, block.layers) for block in blocks]
    return list(stacks) if unit == "stack" else [layer for s in stacks for layer in s.layers]


def shard(
    model: MoRTransformer, mesh: DeviceMesh, unit: Unit = "block", keep_gathered: bool = False
) -> None:
    """Shard a model over the ranks of a mesh, in place.

    Args:
        unit: `block` is the one to use; the others are here to be compared with it.
        keep_gathered: keep the recursion's weights between forward and backward pass instead of
            gathering them again: less traffic, more memory.
    """
    for module in units_of(model, unit):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep_gathered)
    for layer in (*model.prelude.layers, *model.coda.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left: embedding, last norm, output


class Collectives(TorchDispatchMode):
    """Counts the collectives that move parameters of the recursions, told by their size.

    Args:
        units: modules before they are sharded, each gathered as one.
        num_ranks: ranks they will be sharded over.
    """

    def __init__(self, units: list[nn.Module], num_ranks: int) -> None:
        super().__init__()
        self.sizes = {sum(_padded(p, num_ranks) for p in unit.parameters()) for unit in units}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_allgather_base_" and args[0].numel() in self.sizes:
            self.counts["all-gathers"] += 1
        if name == "_reduce_scatter_base_" and args[1].numel() in self.sizes:
            self.counts["reduce-scatters"] += 1
        return func(*args, **(kwargs or {}))


def _padded(parameter: Tensor, num_ranks: int) -> int:
    """Elements that travel: FSDP2 pads the first dimension to a multiple of the ranks."""
    rows = -(-len(parameter) // num_ranks) * num_ranks
    return rows * parameter[0].numel()


def next_ids(ids: Tensor) -> Tensor:
    """The label of each token; none for the last."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1)


def count_collectives(
    mesh: DeviceMesh, unit: Unit, keep_gathered: bool
) -> tuple[Counter[str], Counter[str]]:
    """Collectives for a recursion's weights in a forward and in a backward pass."""
    torch.manual_seed(0)
    model = MoRTransformer(CONFIG).to(mesh.device_type)
    counting = Collectives(units_of(model, unit), mesh.size())
    shard(model, mesh, unit, keep_gathered)
    ids = next(text_batches(2, 32)).to(mesh.device_type)
    with counting:
        output = model(ids, labels=next_ids(ids))
        forward, counting.counts = counting.counts, Counter()
        output.loss.backward()
    return forward, counting.counts


def train(mesh: DeviceMesh, steps: int) -> Iterator[DecoderOutput]:
    """Train a sharded model on random passages, other ones on each rank."""
    torch.manual_seed(0)  # equal weights on all ranks
    model = MoRTransformer(CONFIG).to(mesh.device_type)
    shard(model, mesh)
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1 + mesh.get_rank())
    for _, ids in zip(range(steps), text_batches(), strict=False):
        ids = ids.to(mesh.device_type)
        output = model(ids, labels=next_ids(ids))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield output


def main() -> None:
    # Nothing here changes an output in place, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("steps", type=int, nargs="?", default=100, help="(default: 100)")
    steps = options.parse_args().steps
    if not dist.is_torchelastic_launched():
        options.exit(2, "Start it with torchrun: torchrun --nproc-per-node 2 examples/fsdp2.py\n")
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    first = mesh.get_rank() == 0
    for unit in get_args(Unit):
        for keep in (False, True):
            forward, backward = count_collectives(mesh, unit, keep)
            if first:
                print(
                    f"fully_shard({unit}, reshard_after_forward={not keep})\n"
                    f"  all-gathers: {forward['all-gathers']} forward, "
                    f"{backward['all-gathers']} backward; "
                    f"reduce-scatters: {backward['reduce-scatters']}"
                )
    for i, output in enumerate(train(mesh, steps), start=1):
        if first and (i == 1 or i % 20 == 0):
            print(f"step {i:4}  loss of rank 0 {output.lm_loss:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
