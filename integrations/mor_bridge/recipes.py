"""Recipes in the form of Megatron-Bridge: functions that return a ConfigContainer.

    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from mor_bridge.recipes import mor_360m_pretrain_config
    from mor_bridge.training import RouterUpdates

    config = mor_360m_pretrain_config()
    config.dataset.blend = (["/data/fineweb_text_document"], None)
    pretrain(config, forward_step, callbacks=[RouterUpdates()])

Without a blend they train on Megatron-Bridge's mock data, as its own recipes do.
"""

from pathlib import Path

import torch
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    GPTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.core.distributed import DistributedDataParallelConfig

from mor_bridge.provider import MoRModelProvider
from mor_bridge.uptraining import recursive_bridge
from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig
from mor_layers.weights import Initialization


def mor_360m_pretrain_config() -> ConfigContainer:
    """Pretraining of a Mixture-of-Recursions with the layers of SmolLM-360M: 2 + 10 · 3 of them.

    Three recursions of ten layers between one layer before and one after, and expert-choice routing
    (arXiv 2507.10524). 20 billion tokens in batches of 2M.
    """
    decoder = DecoderConfig(
        vocab_size=49152,
        hidden_size=960,
        ffn_hidden_size=2560,
        num_unrolled_layers=32,
        num_heads=15,
        num_kv_heads=5,
        tie_embeddings=True,
        recursion=RecursionConfig(3, router=ExpertChoice(warmup_steps=1000)),
    )
    config = pretrain_config(MoRModelProvider.from_decoder(decoder, torch.bfloat16, 2048))
    config.train.train_iters = 10_000
    config.train.global_batch_size = 1024
    config.train.micro_batch_size = 16
    config.optimizer.lr, config.optimizer.min_lr = 3e-3, 3e-4
    config.scheduler.lr_warmup_iters = 500
    return config


def uptrain_config(
    folder: str | Path,
    recursion: RecursionConfig,
    initialization: Initialization = "stepwise",
    sequence_length: int = 2048,
) -> ConfigContainer:
    """Training of a recursive model that starts from a dense Llama or Qwen.

    Args:
        folder: see `recursive_bridge`.
        recursion: see `recursive_bridge`.
        initialization: see `recursive_bridge`.
        sequence_length: of the training data.

    Raises:
        ValueError: see `recursive_bridge`.
        FileNotFoundError: the folder does not exist.
    """
    provider = recursive_bridge(folder, recursion, initialization).to_megatron_provider()
    provider.seq_length = sequence_length
    config = pretrain_config(provider)
    config.train.train_iters = 5_000
    config.train.global_batch_size = 256
    config.train.micro_batch_size = 4
    config.optimizer.lr, config.optimizer.min_lr = 2e-4, 2e-5
    config.scheduler.lr_warmup_iters = 200
    return config


def pretrain_config(provider: MoRModelProvider) -> ConfigContainer:
    """What recipes have in common: Adam, cosine decay, the distributed optimizer, mock data.

    Args:
        provider: the model. Its `seq_length` is that of the data, and its precision that of the run.
    """
    in_bf16 = provider.params_dtype == torch.bfloat16
    folder = Path.cwd() / "mor_experiments"
    return ConfigContainer(
        model=provider,
        train=TrainingConfig(
            train_iters=10_000,
            global_batch_size=32,
            micro_batch_size=2,
            manual_gc=True,
            manual_gc_interval=100,
        ),
        validation=ValidationConfig(eval_interval=500, eval_iters=32),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=3e-4,
            min_lr=3e-5,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
            bf16=in_bf16,
            params_dtype=provider.params_dtype,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=500,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            average_in_collective=True,
            use_distributed_optimizer=True,
        ),
        dataset=GPTDatasetConfig(
            random_seed=1234,
            seq_length=provider.seq_length,
            split="9999,8,2",
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            data_sharding=True,
            dataloader_type="single",
            skip_getting_attention_mask_from_dataset=True,
        ),
        logger=LoggerConfig(log_interval=10, tensorboard_dir=str(folder / "tensorboard")),
        tokenizer=TokenizerConfig(
            tokenizer_type="NullTokenizer",
            # A NullTokenizer has one id more than it is told, which ends documents.
            vocab_size=provider.vocab_size - 1 if provider.vocab_size else None,
        ),
        checkpoint=CheckpointConfig(
            save=str(folder / "checkpoints"),
            load=str(folder / "checkpoints"),
            save_interval=500,
            ckpt_format="torch_dist",
        ),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(),
        mixed_precision="bf16_mixed" if in_bf16 else None,
    )
