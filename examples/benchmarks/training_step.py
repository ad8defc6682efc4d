"""Time, memory and FLOPs of a training step with a recursion, over those of a plain GPTModel.

    python examples/benchmarks/training_step.py --json ratios.json

Both models are unmodified GPTModels of one unrolled depth on one attention core; the plain one has
weights of its own at every depth. A step is a forward and a backward pass, without the optimizer.
Each case is compared with the plain model on its own, in rounds of plain, ours, ours, plain, until the
median of the rounds' ratios is known to 1.5 % (`paired_timing`). There is no verdict where other work
takes more than a tenth of the processor. On a CPU, time is processor time of one thread and memory is
counted: parameters, their gradients and Adam's two moments, and what autograd keeps for the backward
pass. On a GPU, time is between CUDA events and memory is the allocator's peak plus Adam's moments.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig, RouterConfig, TokenChoice
from mor_layers.costs import account
from mor_layers.recursion import KVPolicy
from mor_megatron import RecursionLayer, recursion_block_spec, recursion_layers, token_depths

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import machine
from benchmarks.paired_timing import Estimate, Timing, measure

PLAIN = RecursionConfig(1, sharing="cycle")
ROUTERS: dict[str, tuple[RouterConfig, tuple[KVPolicy, ...]]] = {
    "expert_choice": (
        ExpertChoice(),
        ("recursion_wise", "recursive_sharing", "sharing_with_update"),
    ),
    "token_choice": (TokenChoice(), ("recursion_wise", "recursive_sharing")),
}
Case = tuple[int, str, RouterConfig, KVPolicy]
"""Recursions, name and settings of the router, KV policy."""


@dataclass(frozen=True)
class Row:
    """One comparison; ratios are over the plain model."""

    router: str
    kv_policy: str
    num_recursions: int
    time: Estimate
    """Ratio of the times, and how well it is known."""
    memory_ratio: float
    flop_ratio: float
    """Limit that arithmetic alone sets, with the tokens that really ran each step."""


class Contender:
    """A model and what it costs to run a step of it."""

    def __init__(self, decoder: DecoderConfig, recursion: RecursionConfig, ids: Tensor) -> None:
        torch.manual_seed(0)
        self.decoder = replace(decoder, recursion=recursion)
        self.model = _build(decoder, recursion).to(ids.device)
        self.ids = ids
        self.positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)

    def step(self) -> Timing:
        """Run a step; the time it took."""
        self.model.zero_grad(set_to_none=False)
        start, started = _now(), time.perf_counter()
        self._loss().backward()
        seconds, passed = _now() - start, time.perf_counter() - started
        # A GPU has no other work; what the processor does meanwhile says nothing.
        return Timing(seconds, None if self.ids.is_cuda else seconds / passed)

    def flops(self) -> float:
        """Training FLOPs of a step with the tokens that ran in the last one."""
        tokens = None
        if any(True for _ in recursion_layers(self.model)) and self.decoder.recursion != PLAIN:
            depths = token_depths(self.model)
            steps = range(self.decoder.recursion.num_recursions)  # type: ignore[union-attr]
            # A step runs as many rows as the widest sequence needs.
            tokens = [(depths > step).sum(dim=1).amax().item() for step in steps]
        return account(self.decoder, self.ids.shape[1] - 1, tokens).training.total * len(self.ids)

    def memory(self) -> int:
        """Bytes at the peak of a step with Adam."""
        state = sum(4 * p.numel() * p.element_size() for p in self.model.parameters())
        if self.ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.step()
            moments = state // 2
            return torch.cuda.max_memory_allocated() + moments
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output kept by its own node would never be freed

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._loss()
        return state + sum(kept.values())

    def _loss(self) -> Tensor:
        ids, labels = self.ids[:, :-1], self.ids[:, 1:]
        return self.model(ids, self.positions, None, labels=labels).mean()


def compare(
    decoder: DecoderConfig, ids: Tensor, half_width: float, rounds: int, cases: list[Case]
) -> Iterator[Row]:
    """A row for every case, each against the plain model in the same run."""
    plain = Contender(decoder, PLAIN, ids)
    plain.step()
    plain_memory, plain_flops = plain.memory(), plain.flops()
    console = Console(stderr=True)
    for count, name, router, policy in track(cases, "comparing", console=console):
        recursion = RecursionConfig(count, router=router, kv_policy=policy)
        ours = Contender(decoder, recursion, ids)
        ours.step()  # the first step allocates
        yield Row(
            router=name,
            kv_policy=policy,
            num_recursions=count,
            time=measure(plain.step, ours.step, half_width, rounds),
            memory_ratio=ours.memory() / plain_memory,
            flop_ratio=ours.flops() / plain_flops,
        )


def _build(decoder: DecoderConfig, recursion: RecursionConfig) -> GPTModel:
    on_gpu = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=decoder.num_unrolled_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_query_groups=decoder.kv_heads,
        ffn_hidden_size=decoder.ffn_hidden_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=on_gpu,
        bf16=on_gpu,
        params_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    block = recursion_block_spec(config, recursion)
    if recursion == PLAIN:  # ordinary Megatron layers, not a recursion of one step
        layers: list[Any] = []
        for spec in block.layer_specs or []:
            if spec.module is RecursionLayer:
                layers += spec.submodules.layer_specs  # type: ignore[union-attr]
        block = replace(block, layer_specs=layers)
    return GPTModel(
        config,
        block,
        vocab_size=decoder.vocab_size,
        max_sequence_length=8192,
        position_embedding_type="rope",
    )


def _plain(row: Row) -> dict[str, Any]:
    """A row for a JSON file."""
    return asdict(row) | {"verdict": row.time.verdict}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _start_one_rank() -> None:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from mor_megatron.platform import cpu

        cpu.enable()
        torch.set_num_threads(1)
    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    backend = "nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--layers", default=14, help="unrolled layers (14)", **number)
    parser.add_argument("--hidden", default=512, help="hidden size (512)", **number)
    parser.add_argument("--heads", default=8, help="attention heads (8)", **number)
    parser.add_argument("--ffn", default=1408, help="width of the SwiGLU MLP (1408)", **number)
    parser.add_argument("--vocab", default=1024, help="vocabulary (1024)", **number)
    parser.add_argument("--sequence", default=512, help="tokens in a sequence (512)", **number)
    parser.add_argument("--micro-batch", default=2, help="sequences (2)", **number)
    parser.add_argument("--rounds", default=100, help="rounds per case at most (100)", **number)
    parser.add_argument(
        "--half-width",
        type=float,
        default=0.015,
        metavar="X",
        help="relative half width of the interval that ends a case (0.015)",
    )
    parser.add_argument(
        "--recursions", type=int, nargs="+", default=[2, 3, 4], metavar="N", help="steps (2 3 4)"
    )
    parser.add_argument(
        "--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS), help="routers (all)"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=get_args(KVPolicy),
        help="KV policies (all that a router has)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write rows, settings and machine there"
    )
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    decoder = DecoderConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        ffn_hidden_size=arguments.ffn,
        num_unrolled_layers=arguments.layers,
        num_heads=arguments.heads,
    )
    for count in arguments.recursions:  # settings that do not divide end here, not halfway
        RecursionConfig(count).schedule(arguments.layers)
    _start_one_rank()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (arguments.micro_batch, arguments.sequence + 1)
    ids = torch.randint(arguments.vocab, shape, device=device)
    precision = (arguments.half_width, arguments.rounds)
    cases = [
        (count, name, ROUTERS[name][0], policy)
        for count in arguments.recursions
        for name in arguments.routers
        for policy in ROUTERS[name][1]
        if policy in (arguments.policies or ROUTERS[name][1])
    ]
    rows = list(compare(decoder, ids, *precision, cases))
    table = Table("router", "KV policy", "steps", "time", "95 %", "rounds", "processor", "verdict")
    table.add_column("FLOPs (limit)")
    table.add_column("memory")
    for row in rows:
        timed = row.time
        table.add_row(
            row.router,
            row.kv_policy,
            str(row.num_recursions),
            f"{timed.ratio:.3f}",
            f"{timed.low:.3f}–{timed.high:.3f}",
            str(timed.rounds),
            "–" if timed.share is None else f"{timed.share:.0%}",
            timed.verdict,
            f"{row.flop_ratio:.3f}",
            f"{row.memory_ratio:.3f}",
        )
    Console().print(table)
    if arguments.json:
        settings = {name: v for name, v in vars(arguments).items() if name != "json"}
        record = {"machine": machine(), "settings": settings, "rows": list(map(_plain, rows))}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
