"""Optimizer steps, validation losses and the state between them, built on Megatron-Core."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from mor_layers import DecoderConfig
from mor_layers.routers import Router
from mor_megatron import (
    RoutingReport,
    causal_routing,
    recursion_forward_backward,
    routing_reports,
    update_routers,
)
from mor_megatron.checkpoints import describe, runs
from mor_megatron.checkpoints.background import BackgroundSaves
from mor_tools.formats import RUN_CHECKPOINTS
from mor_tools.pretraining import distributed
from mor_tools.pretraining.data.datasets import batches
from mor_tools.pretraining.models.teacher import Teacher
from mor_tools.pretraining.optimizer import build_optimizer, build_scheduler
from mor_tools.pretraining.settings import Settings
from mor_tools.pretraining.watch import Watch

Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """The results of one optimizer step over the global batch."""

    loss: float
    """Language-model loss in nats per token, before the step."""
    divergence: float | None
    """Divergence from the teacher in nats per token, before the step; None without a teacher."""
    learning_rate: float
    """Learning rate of this step."""
    gradient_norm: float
    """Norm of the gradient before clipping."""
    routing: list[RoutingReport]
    """What each recursion did."""


class Trainer:
    """The model, optimizer and schedule of a run.

    Args:
        settings: the run's settings.
        chunks: this process's part of the model (see `build_model`).
        decoder: the model's configuration, saved in its checkpoints.
        watch: notified of every micro-batch, so that it can report which rank hangs.
        teacher: what the model learns from besides the text; only on last pipeline stages.
    """

    def __init__(
        self,
        settings: Settings,
        chunks: list[GPTModel],
        decoder: DecoderConfig,
        watch: Watch,
        teacher: Teacher | None = None,
    ) -> None:
        self.settings, self.decoder, self.teacher = settings, decoder, teacher
        self.step = 0
        """Number of optimizer steps taken."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint known to be valid; None if there is none."""
        self.watch = watch
        self._background = BackgroundSaves() if settings.training.checkpoint_in_background else None
        self._begun_step: int | None = None
        """Step of the checkpoint that is being written in the background."""
        self._losses_not_finite: str | None = None
        self.chunks = _data_parallel(settings, chunks)
        self.optimizer = build_optimizer(settings, self.chunks)
        self.scheduler = build_scheduler(settings, self.optimizer)
        self.checkpoints = Path(settings.output) / RUN_CHECKPOINTS
        copies = parallel_state.get_data_parallel_world_size()
        training = settings.training
        self.microbatches = training.global_batch_size // (training.micro_batch_size * copies)
        config = chunks[0].config
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if settings.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def train_step(self, data: Batches) -> StepResult:
        """Take one optimizer step.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; raised on every rank.
        """
        distributed.seed(self.settings.training.seed, self.step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, divergence = self._run(data, self.microbatches, forward_only=False)
        for what, value in (("the loss", loss), ("the divergence from the teacher", divergence)):
            if not math.isfinite(value):
                raise self._not_finite(f"{what} is {value}", self._losses_not_finite)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        # # Megatron declares no result for it.
        succeeded, norm, _ = cast(tuple[bool, float | None, int | None], self.optimizer.step())
        if not (succeeded and math.isfinite(norm or 0.0)):
            raise self._not_finite(
                f"the gradient's norm is {norm}", _gradients_not_finite(self.chunks)
            )
        self.scheduler.step(increment=1)
        update_routers(self.chunks)
        get_moe_metrics_tracker().clear()
        self.step += 1
        return StepResult(
            loss,
            divergence if self.settings.is_distilled else None,
            float(learning_rate),
            norm or 0.0,
            routing_reports(self.chunks),
        )

    def router_has_gradient(self) -> bool | None:
        """Whether any router parameter got a gradient in the last step; None if there are none.

        A router whose scores enter neither the output nor a loss never learns. Every rank must call
        it.
        """
        routers = [m for chunk in self.chunks for m in chunk.modules() if isinstance(m, Router)]
        parameters = [p for router in routers for p in router.parameters() if p.requires_grad]
        gradients = [getattr(parameter, "main_grad", None) for parameter in parameters]
        found = [float(len(parameters)), float(any(g is not None and g.any() for g in gradients))]
        together = torch.tensor(found, device=distributed.device())
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
        number, has_gradient = together.tolist()
        return bool(has_gradient) if number else None

    def evaluate(self, held_out: Any, causal: bool = False) -> tuple[float, list[RoutingReport]]:
        """Mean loss on the held-out split in nats per token, and what the recursions did.

        Args:
            causal: route as in generation, where no token's depth may depend on later tokens.
        """
        for chunk in self.chunks:
            chunk.eval()
        number = self.settings.evaluation.batches * self.microbatches
        with causal_routing(self.chunks) if causal else nullcontext():
            loss, _ = self._run(batches(held_out, self.settings), number, forward_only=True)
        return loss, routing_reports(self.chunks)

    def save(self) -> None:
        """Write a checkpoint of the current step, unless there is one already.

        In the background, this waits for the checkpoint before, and only begins to write this one.

        Raises:
            OSError: a checkpoint could not be written, possibly the one before; raised on every rank.
        """
        self.finish_save(waits=self.step != self._begun_step)
        if self.step in (self.saved_step, self._begun_step):
            return
        self.watch.beat(f"step {self.step}: writing a checkpoint")
        state = self.chunks, self.optimizer, self.scheduler, describe(self.decoder)
        if self._background is not None:
            self._background.begin(self.checkpoints, self.step, *state)
            self._begun_step = self.step
        else:
            runs.save(self.checkpoints, self.step, *state)
            self.saved_step = self.step

    def finish_save(self, waits: bool = False) -> None:
        """Publish the checkpoint that is written in the background, if all ranks have written it.

        Call it after each step, and wait before the program ends.

        Raises:
            OSError: it could not be written; raised on every rank.
        """
        if self._background is None or self._begun_step is None:
            return
        if waits:
            self.watch.beat(f"step {self._begun_step}: writing a checkpoint")
        try:
            if self._background.finish(waits) is not None:
                self.saved_step, self._begun_step = self._begun_step, None
        except OSError:
            self._begun_step = None
            raise

    @property
    def saved_folder(self) -> Path | None:
        """The newest checkpoint known to be good; None before there is one."""
        return (
            None if self.saved_step is None else runs.folder_of(self.checkpoints, self.saved_step)
        )

    def resume(self) -> tuple[str, ...]:
        """Resume from the newest valid checkpoint, if there is one; returns messages about it."""
        if runs.latest_step(self.checkpoints) is not None:
            restored = runs.load(self.checkpoints, self.chunks, self.optimizer, self.scheduler)
            self.step = self.saved_step = restored.step
            notes = [f"{damaged}. It is skipped." for damaged in restored.refused]
            if restored.unsealed is not None:
                notes.append(
                    f"warning: {restored.unsealed} has no manifest.json with checksums, which "
                    "every checkpoint of this program has. It is unknown whether its tensors are "
                    "what was written."
                )
            return tuple(notes)
        return ()

    def _run(self, data: Batches, microbatches: int, forward_only: bool) -> tuple[float, float]:
        """Mean loss and mean divergence from the teacher over the micro-batches of all ranks."""
        is_virtual = self.settings.virtual_stages is not None
        run = recursion_forward_backward if is_virtual else get_forward_backward_func()
        teacher = None if forward_only else self.teacher
        reports: list[Tensor] = run(
            forward_step_func=partial(_forward_step, teacher=teacher),
            data_iterator=list(tee(self._watched(data), len(self.chunks))),
            model=self.chunks,
            num_microbatches=microbatches,
            micro_batch_size=self.settings.training.micro_batch_size,
            seq_length=self.settings.data.sequence_length,
            forward_only=forward_only,
        )
        # Only last pipeline stages have losses; the others add zero.
        total = torch.zeros(3, device=distributed.device())
        self._losses_not_finite = None
        if reports:
            total[:2], total[2] = torch.stack(reports).sum(dim=0), len(reports)
            if not total.isfinite().all():
                self._losses_not_finite = "a micro-batch's loss"
        torch.distributed.all_reduce(total)
        # Each context-parallel rank has its part of a mean.
        loss, divergence = (total[:2] / total[2] * self.settings.parallel.context).tolist()
        return loss, divergence

    def _watched(self, data: Batches) -> Batches:
        """Yield the micro-batches unchanged, notifying the watch of each."""
        while True:
            self.watch.beat(f"step {self.step + 1}: reading text")
            batch = next(data, None)
            if batch is None:
                return
            self.watch.beat(f"step {self.step + 1}: computing")
            yield batch

    def _not_finite(self, what: str, here: str | None) -> FloatingPointError:
        """An error that says where non-finite values first appeared. Every rank must call it."""
        gathered: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, here)
        where = [f"rank {rank} ({found})" for rank, found in enumerate(gathered) if found]
        with suppress(OSError):  # what this run failed of comes first
            self.finish_save(waits=True)
        kept = "There is no checkpoint yet, so running again starts over."
        if self.saved_step is not None:
            kept = f"The last valid checkpoint is {self.saved_folder}; run again to resume from it."
        rate = self.settings.training.learning_rate
        return FloatingPointError(
            f"step {self.step + 1}: {what}, on {', '.join(where) or 'no single rank'}. Nothing of "
            f"this step was written. Lower training.learning_rate={rate}, or look at the text of "
            f"this step. {kept}"
        )


def _gradients_not_finite(chunks: list[DistributedDataParallel]) -> str | None:
    """The first parameter on this rank whose gradient is not finite."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not gradient.isfinite().all():
                return name.removeprefix("module.")
    return None


def _forward_step(
    data: Batches, model: nn.Module, teacher: Teacher | None = None
) -> tuple[Tensor, Callable[..., Any]]:
    """Run one micro-batch through this stage; the loss is this context-parallel rank's part of the
    mean.
    """
    batch = {
        name: value.to(distributed.device(), non_blocking=True)
        for name, value in next(data).items()
    }
    tokens = batch["tokens"]
    batch["positions"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    attention_mask = _attention_mask(batch.pop("documents", None))
    number = batch["loss_mask"].sum().clamp(min=1)
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    given = batch["tokens"], batch["positions"], attention_mask
    # With labels the model returns the loss of each token, without labels its logits.
    output = model(*given, labels=batch["labels"] if teacher is None else None)

    def mean_loss(output: Tensor) -> tuple[Tensor, Tensor]:
        losses, divergences = output, None
        if teacher is not None:
            losses, divergences = teacher.compare(output, batch["labels"], *given)
        means = [
            torch.zeros_like(number) if values is None else (values.float() * mask).sum() / number
            for values in (losses, divergences)
        ]
        part = means[0] if teacher is None else teacher.combine(*means)
        return part, torch.stack(means).detach()

    mask = batch["loss_mask"]
    return output, mean_loss


def _attention_mask(documents: Tensor | None) -> Tensor | None:
    """Megatron's mask `[b 1 s s]`, True where attention is not allowed, from document numbers
    `[b s]`.

    None means plain causal attention.
    """
    if documents is None:
        return None
    is_same = documents[:, None, :, None] == documents[:, None, None, :]
    return is_same.tril().logical_not()


def _data_parallel(settings: Settings, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=settings.parallel.distributed_optimizer,
        overlap_grad_reduce=settings.parallel.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
    )
    return [
        DistributedDataParallel(
            chunk.config,
            config,
            Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk,
            disable_bucketing=index > 0,  # other chunks compute meanwhile
        )
        for index, chunk in enumerate(chunks)
    ]
