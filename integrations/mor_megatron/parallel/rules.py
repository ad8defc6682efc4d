"""The rules for legal parallel layouts, in one table for the planner, the settings and the layers.

Each rule has a condition, a summary of a few words for the planner, which counts rejected layouts,
and an error message for a user who chose the layout. Conditions on other parts of Megatron-Core's
configuration are checked in `mor_megatron.layers.validation` and `mor_megatron.pipeline.rules`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mor_layers import RecursionConfig
from mor_layers.models import unrolled_lengths
from mor_layers.recursion import SharingSchedule
from mor_megatron.parallel.stages import blocks_per_part, even_stages

PipelineLayout = Literal["one_stage", "steps_as_stages"]


@dataclass(frozen=True)
class Arrangement:
    """The properties of a model and of its parallel layout that the rules depend on."""

    num_unrolled_layers: int
    recursion: RecursionConfig | tuple[RecursionConfig, ...] | None = None
    """The recursion, or several, which follow one another."""
    num_heads: int = 1
    num_kv_heads: int = 1
    ffn_hidden_size: int = 1
    expert_ffn_hidden_size: int | None = None
    """Inner width of an expert, or None without experts."""
    num_experts: int | None = None
    """Number of experts, or None if all MLPs are dense."""
    sequence_length: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    pipeline_layout: PipelineLayout = "one_stage"
    context: int = 1
    expert: int = 1
    devices: int = 1
    """Number of devices of the run. Only `BATCH_RULES` use this and the two fields below."""
    global_batch_size: int = 1
    micro_batch_size: int = 1

    @property
    def recursions(self) -> tuple[RecursionConfig, ...]:
        """All recursions, in order."""
        if self.recursion is None:
            return ()
        return self.recursion if isinstance(self.recursion, tuple) else (self.recursion,)

    @property
    def only(self) -> RecursionConfig | None:
        """The recursion; None if there is none, or several."""
        return self.recursions[0] if len(self.recursions) == 1 else None

    @cached_property
    def schedules(self) -> tuple[SharingSchedule, ...]:
        """For each recursion, the layer that runs at each depth of its part of the model."""
        lengths: tuple[int, ...] = (self.num_unrolled_layers,)
        if len(self.recursions) > 1:
            lengths = unrolled_lengths(self.recursions, self.num_unrolled_layers)
        return tuple(r.schedule(n) for r, n in zip(self.recursions, lengths, strict=False))

    @property
    def schedule(self) -> SharingSchedule | None:
        """The layer that runs at each depth, or None without recursion, or with several."""
        return self.schedules[0] if len(self.schedules) == 1 else None

    def first(self, is_meant: Callable[[RecursionConfig], bool]) -> RecursionConfig | None:
        """The first recursion for which a condition holds."""
        return next(filter(is_meant, self.recursions), None)

    @property
    def is_spread(self) -> bool:
        """Whether recursion steps are virtual pipeline stages."""
        return self.pipeline_layout == "steps_as_stages"

    @cached_property
    def part_depths(self) -> tuple[int, ...]:
        """Unrolled layers of each part that a stage cannot split: single layers, whole recursions."""
        if not self.schedules:
            return (1,) * self.num_unrolled_layers
        depths = list[int]()
        for recursion, schedule in zip(self.recursions, self.schedules, strict=True):
            # A step of a cyclic recursion runs the whole block, so the block is one part. In a sequence
            # scheme each layer repeats by itself, so each is a part.
            blocks = [schedule.num_recursions * schedule.block_size // schedule.num_blocks]
            blocks *= schedule.num_blocks
            together = blocks_per_part(recursion, len(blocks))
            starts = range(0, len(blocks), together)
            parts = [sum(blocks[start : start + together]) for start in starts]
            depths += [1] * schedule.prelude + parts + [1] * schedule.coda
        return tuple(depths)

    @property
    def num_parts(self) -> int:
        """Number of parts that a stage cannot split."""
        return len(self.part_depths)

    @property
    def model_devices(self) -> int:
        """Number of devices of one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def copies(self) -> int:
        """Number of data-parallel copies of the model."""
        return self.devices // self.model_devices

    @property
    def microbatches(self) -> int:
        """Number of microbatches that each copy runs in an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.copies)

    @property
    def sequence_multiple(self) -> int:
        """The number that the sequence length must be a multiple of with context parallelism.

        Each rank has two chunks, and with sequence parallelism its tensor-parallel ranks split them.
        """
        rows = self.tensor if self.sequence_parallel else 1
        return math.lcm(2 * self.context, rows * self.context)


@dataclass(frozen=True)
class Names:
    """The user's names of the fields of an arrangement, for messages. Default: Megatron-Core's."""

    num_unrolled_layers: str = "num_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_query_groups"
    ffn_hidden_size: str = "ffn_hidden_size"
    expert_ffn_hidden_size: str = "moe_ffn_hidden_size"
    num_experts: str = "num_moe_experts"
    experts: str = "num_moe_experts"
    """The setting that enables experts."""
    recursion: str = "recursion"
    sharing: str = "sharing"
    num_recursions: str = "num_recursions"
    kv_policy: str = "kv_policy"
    sequence_length: str = "seq_length"
    tensor: str = "tensor_model_parallel_size"
    sequence_parallel: str = "sequence_parallel"
    pipeline: str = "pipeline_model_parallel_size"
    context: str = "context_parallel_size"
    expert: str = "expert_model_parallel_size"
    global_batch_size: str = "global_batch_size"
    micro_batch_size: str = "micro_batch_size"
    steps_as_stages: str = "recursion steps as virtual stages"
    one_stage: str = "recursion_block_spec"
    """The setting or function that keeps a recursion within one stage."""
    to_steps_as_stages: str = "recursion_pipeline_spec"
    """The setting or function that distributes its steps over stages instead."""


@dataclass(frozen=True)
class Rule:
    """A condition that every legal layout fulfils."""

    summary: str
    """Why a layout that breaks the rule is rejected, in a few words: the axis, then the reason."""
    is_broken: Callable[[Arrangement], bool]
    message: Callable[[Arrangement, Names], str]
    """The error message: what was given, what is allowed, and how to fix it."""


def broken_rule(arrangement: Arrangement, rules: Iterable[Rule]) -> Rule | None:
    """The first rule that the arrangement breaks, or None if it fulfils all."""
    return next((rule for rule in rules if rule.is_broken(arrangement)), None)


def require_rules(arrangement: Arrangement, rules: Iterable[Rule], names: Names) -> None:
    """Raise ValueError for the first rule that the arrangement breaks."""
    rule = broken_rule(arrangement, rules)
    if rule is not None:
        raise ValueError(rule.message(arrangement, names))


_WIDTHS = ("num_heads", "num_kv_heads", "ffn_hidden_size", "expert_ffn_hidden_size")


def _uneven_width(a: Arrangement) -> str | None:
    """The first width that is not divisible by the number of tensor-parallel ranks."""
    return next((name for name in _WIDTHS if (getattr(a, name) or 0) % a.tensor), None)


def _uneven_width_message(a: Arrangement, n: Names) -> str:
    name = _uneven_width(a)
    assert name is not None
    return f"{getattr(n, name)}={getattr(a, name)} must be a multiple of {n.tensor}={a.tensor}."


def _nothing_goes_round(a: Arrangement) -> bool:
    if a.only is None or a.schedule is None:
        return True
    return not a.schedule.is_cyclic or a.only.num_recursions == 1 or a.pipeline == 1


def _nothing_goes_round_message(a: Arrangement, n: Names) -> str:
    if a.only is None:
        return f"{n.steps_as_stages} needs a recursion. Set {n.recursion}, or use {n.one_stage}."
    if a.pipeline == 1:
        return (
            f"{n.steps_as_stages} has no effect with {n.pipeline}=1. Use {n.one_stage}, or set "
            f"{n.pipeline} to 2 or more."
        )
    if a.only.num_recursions == 1:
        return (
            f"{n.num_recursions}=1 cannot run with {n.steps_as_stages}: a single step is not "
            f"repeated. Use at least 2, or {n.one_stage}."
        )
    return (
        f"{n.sharing}={a.only.sharing!r} cannot run with {n.steps_as_stages}: its layers "
        "repeat one by one, so there are no steps of the whole block. Use 'cycle' or "
        f"'middle_cycle', or {n.one_stage}."
    )


def _uneven_block(a: Arrangement) -> bool:
    return a.schedule is not None and a.schedule.block_size % a.pipeline > 0


def _uneven_block_message(a: Arrangement, n: Names) -> str:
    assert a.schedule is not None
    size, stages, steps = a.schedule.block_size, a.pipeline, a.schedule.num_recursions
    below, ends = size - size % stages, a.schedule.prelude + a.schedule.coda
    fitting = " or ".join(str(k * steps + ends) for k in (below, below + stages) if k)
    return (
        f"{n.num_unrolled_layers}={a.num_unrolled_layers} cannot run with {n.steps_as_stages}: a "
        f"block of {size} layers cannot be split evenly over {stages} stages. Use "
        f"{n.num_unrolled_layers}={fitting}, or {n.one_stage}."
    )


STEPS_AS_STAGES_RULES = (
    Rule(
        "pipeline: the steps of several recursions",
        lambda a: a.is_spread and len(a.recursions) > 1,
        lambda a, n: (
            f"{n.recursion} has {len(a.recursions)} entries, but {n.steps_as_stages} turns the steps of "
            f"a single recursion into stages. Use {n.one_stage}, which keeps each in one stage."
        ),
    ),
    Rule(
        "pipeline: no repeated steps of a block",
        lambda a: a.is_spread and _nothing_goes_round(a),
        _nothing_goes_round_message,
    ),
    Rule(
        "pipeline: the block cannot be split evenly",
        lambda a: a.is_spread and _uneven_block(a),
        _uneven_block_message,
    ),
)
"""Rules for recursion steps as virtual pipeline stages."""


def _balances_depth(recursion: RecursionConfig) -> bool:
    return recursion.depth_balance is not None


def _learns_exits(recursion: RecursionConfig) -> bool:
    return recursion.router.learns_exits


def _ends_together(a: Arrangement) -> bool:
    """Whether the last stage holds all of the last recursion, if the parts are divided evenly."""
    if a.is_spread or a.pipeline > a.num_parts:
        return False
    coda = a.schedules[-1].coda
    return len(even_stages(a.part_depths, a.pipeline)[-1]) > coda


SEPARATE_LAYERS_RULES = (
    Rule(
        "pipeline: depth balance in one stage",
        lambda a: a.pipeline > 1 and a.first(_balances_depth) is not None,
        lambda a, n: (
            f"{n.recursion}.depth_balance={a.first(_balances_depth).depth_balance} cannot be used "
            f"with {n.pipeline}={a.pipeline}: layers tell the next which tokens they ran, but stages "
            f"send hidden states only. Use {n.pipeline}=1, or {n.one_stage}, which keeps layers up to "
            "an anchor on one stage."
        ),
    ),
)
"""Rules for layers that are laid out one by one, so that any two of them may be on different stages."""

TAUGHT_EXITS_RULES = (
    Rule(
        "pipeline: an exit gate is taught on the last stage",
        lambda a: a.pipeline > 1 and a.first(_learns_exits) is not None and not _ends_together(a),
        lambda a, n: (
            f"{n.recursion}.router={a.first(_learns_exits).router} cannot be taught with "
            f"{n.pipeline}={a.pipeline}"
            + (f" and {n.steps_as_stages}" if a.is_spread else "")
            + ": which read-outs are right is only known on the last stage, which has to hold the "
            "whole recursion, and nothing is sent back but gradients of hidden states. Use "
            f"{n.pipeline}={1 if a.is_spread or a.pipeline == 2 else 2} with {n.one_stage}, fewer "
            "layers after the recursion, or leave teaching out."
        ),
    ),
)
"""Rules for a router that learns from what is read out."""

LAYOUT_RULES = (
    Rule(
        "tensor: heads or widths do not divide",
        lambda a: _uneven_width(a) is not None,
        _uneven_width_message,
    ),
    Rule(
        "tensor: the sequence does not divide",
        lambda a: a.sequence_parallel and a.sequence_length % a.tensor > 0,
        lambda a, n: (
            f"{n.sequence_length}={a.sequence_length} must be a multiple of {n.tensor}={a.tensor}, "
            f"whose ranks split it with {n.sequence_parallel}."
        ),
    ),
    Rule(
        "context: the sequence does not divide",
        lambda a: a.context > 1 and a.sequence_length % a.sequence_multiple > 0,
        lambda a, n: (
            f"{n.sequence_length}={a.sequence_length} must be a multiple of {a.sequence_multiple}, "
            f"for two chunks on each of {n.context}={a.context} ranks"
            + (f", which {n.tensor}={a.tensor} ranks split." if a.sequence_parallel else ".")
        ),
    ),
    Rule(
        "expert: no experts",
        lambda a: a.expert > 1 and a.num_experts is None,
        lambda a, n: (
            f"{n.expert}={a.expert} has no effect without experts. Set it to 1, or set {n.experts}."
        ),
    ),
    Rule(
        "expert: experts do not divide",
        lambda a: (a.num_experts or 0) % a.expert > 0,
        lambda a, n: f"{n.expert}={a.expert} must divide {n.num_experts}={a.num_experts}.",
    ),
    Rule(
        "expert: TP needs SP",
        lambda a: a.num_experts is not None and a.tensor > 1 and not a.sequence_parallel,
        lambda a, n: (
            f"{n.experts} with {n.tensor}={a.tensor} needs {n.sequence_parallel}=True, because "
            "Megatron-Core requires it to train experts with tensor parallelism."
        ),
    ),
    *TAUGHT_EXITS_RULES,
    *STEPS_AS_STAGES_RULES,
    Rule(
        "pipeline: layers do not divide",
        lambda a: not a.recursions and a.num_unrolled_layers % a.pipeline > 0,
        lambda a, n: (
            f"{n.num_unrolled_layers}={a.num_unrolled_layers} must be a multiple of "
            f"{n.pipeline}={a.pipeline}."
        ),
    ),
    Rule(
        "pipeline: more stages than parts",
        lambda a: not a.is_spread and a.pipeline > a.num_parts,
        lambda a, n: (
            f"{n.pipeline}={a.pipeline} exceeds the {a.num_parts} parts of the model: a recursion "
            f"stays within one stage. Use {a.num_parts} or fewer, or {n.to_steps_as_stages}."
        ),
    ),
)
"""Rules that do not depend on the number of devices and the batch size."""

BATCH_RULES = (
    Rule(
        "devices: no whole copies of the model",
        lambda a: a.devices % a.model_devices > 0,
        lambda a, n: (
            f"{a.devices} processes cannot hold copies of {n.tensor}={a.tensor} × "
            f"{n.pipeline}={a.pipeline} × {n.context}={a.context} processes. Start a multiple of "
            f"{a.model_devices} (torchrun --nproc-per-node), or lower these settings."
        ),
    ),
    Rule(
        "expert: ranks of a stage do not divide",
        lambda a: a.devices // a.pipeline % a.expert > 0,
        lambda a, n: (
            f"{n.expert}={a.expert} must divide the {a.devices // a.pipeline} processes of a "
            f"pipeline stage ({a.devices} processes, {n.pipeline}={a.pipeline})."
        ),
    ),
    Rule(
        "batch: does not divide by replicas × micro-batch",
        lambda a: a.global_batch_size % (a.micro_batch_size * a.copies) > 0,
        lambda a, n: (
            f"{n.global_batch_size}={a.global_batch_size} is not a multiple of "
            f"{n.micro_batch_size}={a.micro_batch_size} × {a.copies} data-parallel copies. Use a "
            f"multiple of {a.micro_batch_size * a.copies}."
        ),
    ),
    Rule(
        "pipeline: micro-batches are not a multiple of the stages",
        lambda a: a.is_spread and a.microbatches % a.pipeline > 0,
        lambda a, n: (
            f"{n.global_batch_size}={a.global_batch_size} leaves {a.microbatches} micro-batches of "
            f"{a.micro_batch_size} to each of {a.copies} data-parallel copies, but they run through "
            f"{n.pipeline}={a.pipeline} stages in groups of {a.pipeline}. Use a multiple of "
            f"{a.micro_batch_size * a.copies * a.pipeline}, or a smaller {n.micro_batch_size}."
        ),
    ),
)
"""Rules for the number of devices and the batch size, given a layout that fulfils `LAYOUT_RULES`."""
