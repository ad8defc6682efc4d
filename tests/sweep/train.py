"""Trains the model of a case for two steps, in its layout or on one rank.

The functions that take a process group run on a rank (`tests.distributed.pool`).
"""

import logging
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from mor_layers import RecursionConfig
from mor_megatron import (
    connect_stages,
    recursion_block_spec,
    recursion_forward_backward,
    recursion_pipeline_spec,
    update_routers,
)
from mor_megatron.layers import validate
from mor_megatron.parallel import LAYOUT_RULES, Arrangement, Names, require_rules
from mor_megatron.training import weigh_loops
from tests.distributed import megatron_setup as setup
from tests.sweep import factors
from tests.sweep.draw import Case

NUM_STEPS = 2
NUM_PADDING = 5
MOST_MEMORY = 10 << 30
"""Bytes of addresses that a rank may take; a healthy one takes half."""
DOCUMENT_LENGTH = 9


@dataclass(frozen=True)
class Outcome:
    """What a layout computed in two steps of an optimizer."""

    losses: list[float]
    norms: list[float]
    """Of the gradient, before each step."""
    gradients: dict[str, Tensor]
    """Of the first step. Empty with the distributed optimizer, which keeps them in pieces."""
    parameters: dict[str, Tensor]
    """After the last step."""


def recursion_of(case: Case) -> RecursionConfig:
    """The recursion of a case.

    Raises:
        ValueError: these settings do not go together.
    """
    return RecursionConfig(
        factors.NUM_RECURSIONS,
        router=factors.ROUTERS[case["router"]],
        kv_policy=case["keys and values"],
        expert_routers=case["routers over experts"],
        **factors.RECIPES[case["recipe"]],
    )


def fields_of(case: Case, layout: factors.Layout) -> dict[str, Any]:
    """What a case sets of a TransformerConfig."""
    recursion = recursion_of(case)
    by_scheme = 1 if recursion.sharing.startswith("middle") else 0
    lengths = recursion.prelude_layers, recursion.coda_layers
    ends = sum(by_scheme if length is None else length for length in lengths)
    fields = {"num_layers": ends + factors.BLOCK_SIZE * factors.NUM_RECURSIONS}
    fields |= factors.LAYERS[case["layers"]]
    # Experts need sequence parallelism beside tensor parallelism; one rank has neither.
    return fields | {"sequence_parallel": layout.sp}


def refusal(case: Case) -> str | None:
    """Why the library, or Megatron, refuses a case before anything is built; None if it can run."""
    layout = factors.LAYOUTS[case["layout"]]
    try:
        _check_use(case)
        recursion = recursion_of(case)
        fields = fields_of(case, layout) | factors.RECOMPUTE[case["recomputed"]]
        sizes = {
            "tensor_model_parallel_size": layout.tp,
            "context_parallel_size": layout.cp,
            "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": layout.groups["vpp"],
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.groups["etp"],
            "overlap_p2p_comm": layout.spreads_steps,
        }
        recursion.require_experts("num_moe_experts" in fields)
        require_rules(
            Arrangement(
                fields["num_layers"],
                recursion,
                num_heads=4,
                num_kv_heads=2,
                ffn_hidden_size=64,
                expert_ffn_hidden_size=fields.get("moe_ffn_hidden_size"),
                num_experts=fields.get("num_moe_experts"),
                sequence_length=factors.LENGTH,
                tensor=layout.tp,
                sequence_parallel=layout.sp,
                pipeline=layout.pp,
                pipeline_layout="steps_as_stages" if layout.spreads_steps else "one_stage",
                context=layout.cp,
                expert=layout.ep,
            ),
            LAYOUT_RULES,
            Names(),
        )
        validate(setup.make_config(**(setup.LLAMA_LIKE | sizes | fields)), recursion)
    except (ValueError, AssertionError) as error:
        return str(error)
    return None


def _check_use(case: Case) -> None:
    """Raise ValueError where a value of a case changes nothing that another one does not."""
    layers = factors.LAYERS[case["layers"]]
    has_experts = "num_moe_experts" in layers
    if case["recomputed"] == "keys and values of latent rows" and "kv_lora_rank" not in layers:
        raise ValueError("latent rows need latent attention")
    if case["recomputed"] == "MLP" and has_experts:
        raise ValueError("an MLP to recompute needs dense layers")
    if case["recomputed"] == "experts" and not has_experts:
        raise ValueError("experts to recompute need experts")


def train(case: Case, alone: bool) -> Outcome:
    """Two steps of the case in its layout, or on one rank that recomputes nothing.

    The optimizer moves a weight in proportion to its gradient (Adam with an epsilon of 1), because
    Adam as it is would turn the rounding of a gradient that should be zero into a whole step.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    _limit_memory()
    layout = factors.Layout() if alone else factors.LAYOUTS[case["layout"]]
    setup.initialize(**layout.groups)
    recursion, fields = recursion_of(case), fields_of(case, layout)
    has_documents = case["sequences"] != "whole"
    ddp: dict[str, Any] = {}
    if not alone:
        fields |= factors.RECOMPUTE[case["recomputed"]]
        ddp = factors.DATA_PARALLEL[case["data parallel"]]

    def block(config: TransformerConfig, stage: int | None) -> Any:
        if layout.spreads_steps:
            return recursion_pipeline_spec(
                config, recursion, vp_stage=stage, documents=has_documents
            )
        return recursion_block_spec(config, recursion, vp_stage=stage)

    chunks = setup.tiny_gpt(setup.tiny_config(**fields), block, tied=case["output"] == "tied")
    if layout.spreads_steps:
        connect_stages(chunks)
    weigh_loops(chunks)
    wrapped = setup.data_parallel(chunks, **ddp)
    optimizer = setup.build_optimizer(wrapped, lr=1.0, adam_eps=1.0, clip_grad=0.0)
    losses, norms, gradients = [], [], {}
    for step in range(NUM_STEPS):
        tokens = setup.random_tokens(factors.NUM_SEQUENCES, factors.LENGTH, seed=step)
        optimizer.zero_grad()
        losses.append(_forward_backward(wrapped, tokens, has_documents, layout))
        if step == 0 and not ddp.get("use_distributed_optimizer"):
            gradients = setup.gather_gradients(wrapped)
        norms.append(_step(optimizer))
        update_routers(wrapped)
    return Outcome(losses, norms, gradients, setup.gather_parameters(wrapped))


def _limit_memory() -> None:
    """End a case that would take the machine's memory with an error."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, hard))


def _step(optimizer: MegatronOptimizer) -> float:
    """A step of the optimizer; the norm of the gradient before it."""
    norm = float(optimizer.get_grad_norm())
    succeeded, _, _ = optimizer.step()
    assert succeeded, "the optimizer skipped its step"
    return norm


def _forward_backward(
    chunks: list[Any], tokens: Tensor, has_documents: bool, layout: factors.Layout
) -> float:
    """The mean loss of a global batch `[sequences, s + 1]`, which leaves gradients behind."""
    world = parallel_state.get_data_parallel_world_size()
    share = tokens.chunk(world)[parallel_state.get_data_parallel_rank()]
    microbatches = share.split(1)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    run = recursion_forward_backward if layout.spreads_steps else get_forward_backward_func()
    reports = run(
        forward_step_func=_documents_step if has_documents else _step_of_whole_sequences,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=tokens.size(1) - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    # Last stages report, each context-parallel rank its part of the mean of a sequence.
    total = torch.tensor(sum(reports), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return (total / layout.tp / len(tokens)).item()


def _step_of_whole_sequences(
    microbatches: Iterator[Tensor], model: nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    batch = _batch(next(microbatches))
    batch = _cut(batch)
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return losses, lambda losses: _part_of_mean(losses, torch.ones_like(losses), factors.LENGTH)


def _documents_step(
    microbatches: Iterator[Tensor], model: nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    batch = _batch(next(microbatches))
    place = torch.arange(factors.LENGTH)
    document = place // DOCUMENT_LENGTH
    is_same = document[:, None] == document[None]
    mask = is_same.tril().logical_not().expand(1, 1, -1, -1)
    batch["padding"] = (place >= factors.LENGTH - NUM_PADDING).expand(1, -1)
    batch = _cut(batch)
    losses = model(
        batch["tokens"],
        batch["positions"],
        mask,
        labels=batch["labels"],
        padding_mask=batch["padding"],
    )
    counted = 1 - batch["padding"].float()
    number = factors.LENGTH - NUM_PADDING
    return losses, lambda losses: _part_of_mean(losses, counted, number)


def _batch(sequence: Tensor) -> dict[str, Tensor]:
    """The inputs and labels of a sequence `[1, s + 1]`."""
    positions = torch.arange(factors.LENGTH).expand(1, -1)
    return {"tokens": sequence[:, :-1], "labels": sequence[:, 1:], "positions": positions}


def _cut(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's part of a batch."""
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def _part_of_mean(losses: Tensor, counted: Tensor, number: int) -> tuple[Tensor, Tensor]:
    part = (losses * counted).sum() / number
    return part, part.detach().clone()
