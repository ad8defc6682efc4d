"""A run of Megatron-Bridge's training loop on CPUs, started by torchrun.

    torchrun --nproc-per-node RANKS -m tests.mor_bridge.train SETTINGS

SETTINGS is JSON: `source`, a model folder or a dense checkpoint; `target`, a folder for the trained
model and losses.json; `is_dense`, which of both the source is; `fields` of the provider, such as its
layout.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from mor_megatron.platform import bridge_on_cpu

STEPS, BATCH, MICRO_BATCH, LENGTH = 4, 4, 2, 32


def main(source: str, target: str, is_dense: bool, fields: dict[str, Any]) -> None:
    bridge_on_cpu.enable_training()
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.callbacks import Callback, CallbackContext
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from mor_bridge import recursive_bridge
    from mor_bridge.recipes import pretrain_config
    from mor_bridge.training import RouterUpdates
    from mor_layers import ExpertChoice, RecursionConfig

    if is_dense:
        recursion = RecursionConfig(3, router=ExpertChoice(warmup_steps=8))
        bridge = recursive_bridge(source, recursion)
    else:
        bridge = AutoBridge.from_hf_pretrained(source)
    steps: list[dict[str, float]] = []

    class Record(Callback):
        def on_train_step_end(self, context: CallbackContext) -> None:
            assert context.loss_dict is not None
            steps.append({name: float(value) for name, value in context.loss_dict.items()})

        def on_train_end(self, context: CallbackContext) -> None:
            bridge.save_hf_pretrained(context.model, target)

    provider = bridge.to_megatron_provider()
    provider.seq_length = LENGTH
    for name, value in fields.items():
        setattr(provider, name, value)
    config = pretrain_config(provider)
    config.train.train_iters = STEPS
    config.train.global_batch_size, config.train.micro_batch_size = BATCH, MICRO_BATCH
    config.validation.eval_interval, config.validation.eval_iters = 2, 1
    config.optimizer.lr, config.scheduler.lr_warmup_iters = 1e-2, 0
    config.dataset.num_workers = 0
    config.checkpoint.save = config.checkpoint.load = None
    config.logger.log_interval = 1
    config.logger.tensorboard_dir = f"{target}_tensorboard"
    config.dist.distributed_backend = "gloo"
    pretrain(config, forward_step, callbacks=[RouterUpdates(), Record()])
    if int(os.environ["RANK"]) == 0:
        Path(target, "losses.json").write_text(json.dumps(steps))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
