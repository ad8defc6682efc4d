"""Models whose recursion is spread over the pipeline, or lies in one stage, to compare them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from torch import Tensor, nn

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from tests.distributed import megatron_setup as setup

Options = dict[str, Any]
SEQUENCE_LENGTH = 14
EXPERT = ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5)
TOKEN = TokenChoice(z_loss_coefficient=0.01)
MOE: Options = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}
DISTRIBUTED: Options = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}


@dataclass(frozen=True)
class Case:
    """A model and where it runs: `pp` stages with steps as virtual stages, or one rank."""

    recursion: RecursionConfig
    pp: int = 2
    tp: int = 1
    dp: int = 1
    cp: int = 1
    block_size: int = 4
    config: Options = field(default_factory=dict)
    ddp: Options = field(default_factory=dict)
    length: int = SEQUENCE_LENGTH
    documents: bool = False
    """Whether sequences hold several documents and padding."""

    @property
    def world_size(self) -> int:
        return self.pp * self.tp * self.dp * self.cp

    @property
    def model(self) -> Options:
        """The configuration's overrides, the same in every layout."""
        by_scheme = 1 if self.recursion.sharing == "middle_cycle" else 0
        lengths = self.recursion.prelude_layers, self.recursion.coda_layers
        ends = sum(by_scheme if length is None else length for length in lengths)
        return {"num_layers": self.block_size * self.recursion.num_recursions + ends} | self.config


@dataclass(frozen=True)
class Outcome:
    """What a layout computes."""

    loss: float
    gradients: dict[str, Tensor]
    decisions: list[tuple[Tensor, ...]]
    """Of every microbatch in order: positions, gates and plan at each step. On the first rank."""


def build(case: Case, is_pipeline: bool) -> list[DistributedDataParallel]:
    """The wrapped chunks of this rank, in the layout of the case or on one stage."""
    from mor_megatron import connect_stages, recursion_block_spec, recursion_pipeline_spec
    from mor_megatron.training import weigh_loops

    config = setup.tiny_config(**case.model)
    if not is_pipeline:
        chunks = setup.tiny_gpt(
            config, block=lambda c, v: recursion_block_spec(c, case.recursion, vp_stage=v)
        )
        weigh_loops(chunks)
        return setup.data_parallel(chunks, **case.ddp)
    chunks = setup.tiny_gpt(
        config,
        block=lambda c, v: recursion_pipeline_spec(
            c, case.recursion, vp_stage=v, documents=case.documents
        ),
    )
    connect_stages(chunks)
    weigh_loops(chunks)
    return setup.data_parallel(chunks, **case.ddp)


def initialize(case: Case, is_pipeline: bool) -> None:
    steps = case.recursion.num_recursions
    groups = {"pp": case.pp, "tp": case.tp, "cp": case.cp, "vpp": steps}
    setup.initialize(**(groups if is_pipeline else {}))


def outcome(case: Case, is_pipeline: bool, num_sequences: int = 4) -> Outcome:
    """Loss, gradients and decisions of one global batch, one sequence a microbatch."""
    initialize(case, is_pipeline)
    chunks = build(case, is_pipeline)
    decisions = watch_decisions(chunks)
    tokens = setup.random_tokens(num_sequences, case.length)
    loss = forward_backward(chunks, tokens, case.documents)
    assert_nothing_waits(chunks)
    return Outcome(loss, setup.gather_gradients(chunks), decisions)


def forward_backward(
    chunks: list[DistributedDataParallel],
    tokens: Tensor,
    documents: bool = False,
    forward_only: bool = False,
) -> float:
    """As `megatron_setup.forward_backward`, for any layout."""
    from mor_megatron import recursion_forward_backward

    is_pipeline = len(chunks) > 1
    run = recursion_forward_backward if is_pipeline else get_forward_backward_func()
    world = parallel_state.get_data_parallel_world_size()
    share = tokens.chunk(world)[parallel_state.get_data_parallel_rank()]
    microbatches = share.split(1)
    for chunk in chunks:
        chunk.zero_grad_buffer()

    def step(iterator: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        inputs = batch[:, :-1]
        positions = torch.arange(inputs.size(1)).expand_as(inputs)
        mask = attention_mask(inputs) if documents else None
        own = {"inputs": inputs, "positions": positions, "labels": batch[:, 1:]}
        if documents:
            own["padding"] = is_padding(inputs)
        group = parallel_state.get_context_parallel_group()
        own = get_batch_on_this_cp_rank(own, is_hybrid_cp=False, cp_group=group)
        output = model(
            own["inputs"],
            own["positions"],
            mask,
            labels=own["labels"],
            padding_mask=own.get("padding"),
        )
        if not get_model_config(model).calculate_per_token_loss:
            # A context-parallel rank has its part of the mean.
            return output, lambda losses: (losses.sum() / inputs.numel(), losses.detach().mean())
        count = torch.tensor(output.numel(), dtype=torch.int)
        return output, lambda losses: (losses.sum(), count, losses.detach().mean())

    reports = run(
        forward_step_func=step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=tokens.size(1) - 1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    total = torch.tensor([sum(reports), len(reports)], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def train_step(chunks: list[DistributedDataParallel], optimizer: Any, tokens: Tensor) -> Any:
    """Loss before a step of the optimizer, and the gradient's norm before it was clipped."""
    from mor_megatron import update_routers

    optimizer.zero_grad()
    loss = forward_backward(chunks, tokens)
    succeeded, norm, _ = optimizer.step()
    assert succeeded
    update_routers(chunks)
    return loss, norm


def attention_mask(inputs: Tensor) -> Tensor:
    """Two documents, the second of which begins at a third of the sequence. `[b 1 s s]`."""
    s = inputs.size(1)
    document = (torch.arange(s) >= s // 3).long()
    barred = torch.ones(s, s).triu(1).bool() | (document[:, None] != document)
    return barred.expand(inputs.size(0), 1, s, s)


def is_padding(inputs: Tensor) -> Tensor:
    """The last token of the first document, and three at the end. `[b s]`."""
    s = inputs.size(1)
    place = torch.arange(s)
    return ((place == s // 3 - 1) | (place >= s - 3)).expand_as(inputs)


def stages_of(chunks: list[DistributedDataParallel]) -> list[Any]:
    from mor_megatron import recursion_layers

    return list(recursion_layers(chunks))


def watch_decisions(chunks: list[DistributedDataParallel]) -> list[tuple[Tensor, ...]]:
    """A list that fills with what is decided about each microbatch."""
    seen: list[tuple[Tensor, ...]] = []
    for layer in stages_of(chunks):
        record = layer.statistics.record

        def watch(tokens: Any, output: Any, record: Any = record) -> None:
            noted = []
            for decision in output.decisions:
                noted += [decision.tokens.positions, decision.gates, decision.plan]
            seen.append(tuple(n.detach().clone() for n in noted if n is not None))
            record(tokens, output)

        layer.statistics.record = watch
    return seen


def assert_nothing_waits(chunks: list[DistributedDataParallel]) -> None:
    """No microbatch left anything behind on a stage."""
    for stage in stages_of(chunks):
        assert not getattr(stage, "flights", {}), "a microbatch still waits"
