"""The optimizer of a run and its learning rate: AdamW, or Muon for matrices beside AdamW."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mor_megatron import recursion_layers
from mor_tools.pretraining.settings import Settings

MUON_SCALE = 0.2
"""Root mean square of a Muon update of a matrix: about that of AdamW's updates, so that one learning
rate serves both (arXiv 2502.16982, section 2.2)."""


def build_optimizer(settings: Settings, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer over this process's part of the model."""
    training = settings.training
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": training.learning_rate,
        "min_lr": training.final_learning_rate,
        "weight_decay": training.weight_decay,
        "adam_beta2": training.adam_beta2,
        "clip_grad": training.gradient_clip,
        "bf16": training.precision == "bf16",
        "params_dtype": chunks[0].config.params_dtype,
        "use_distributed_optimizer": settings.parallel.distributed_optimizer,
    }
    if training.optimizer == "adamw":
        return get_megatron_optimizer(OptimizerConfig(**fields), chunks)
    fields |= {
        "optimizer": "muon",
        "muon_momentum": training.muon_momentum,
        "muon_nesterov": True,
        "muon_scale_mode": "spectral",
        "muon_extra_scale_factor": MUON_SCALE,
        # Every tensor-parallel rank orthogonalizes the whole matrix, so that the result does not depend
        # on the layout; by default, each would orthogonalize its own part.
        "muon_tp_mode": "duplicated",
        "muon_fp32_matmul_prec": "highest" if training.precision == "fp32" else "medium",
    }
    for layer in recursion_layers(chunks):
        for parameter in layer.recursion.router.parameters():
            # Like an output layer's, its rows give the logits of single choices. Megatron leaves such
            # parameters to AdamW.
            parameter.is_embedding_or_output_parameter = True
    return get_megatron_optimizer(OptimizerConfig(**fields), chunks)


def build_scheduler(settings: Settings, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warmup, constant learning rate, linear decay; all in steps."""
    training = settings.training
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.learning_rate,
        min_lr=training.final_learning_rate,
        lr_warmup_steps=training.warmup_steps,
        lr_decay_steps=training.steps,
        lr_decay_style="WSD",
        wsd_decay_steps=training.decay_steps,
        lr_wsd_decay_style="linear",
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.steps,
        wd_incr_style="constant",
        # The run's settings take precedence over the checkpoint's: they were checked already, and
        # an extended run decays later than its checkpoints say.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    scheduler.step(increment=1)  # the first step is already part of the warmup
    return scheduler
