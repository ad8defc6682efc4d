"""Configurations for torchtitan's `--module mor_titan --config NAME`."""

import pydoc_data.topics
from typing import Any

from datasets import Dataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig
from mor_titan.model import MoRLoss, MoRModel
from mor_titan.parallelize import parallelize, update_routers_after_steps

DEBUG_MODEL = DecoderConfig(
    vocab_size=2048,
    hidden_size=64,
    ffn_hidden_size=160,
    num_unrolled_layers=8,
    num_heads=4,
    recursion=RecursionConfig(3, router=ExpertChoice(warmup_steps=20)),
)
MOR_360M = DecoderConfig(
    vocab_size=49152,
    hidden_size=960,
    ffn_hidden_size=2560,
    num_unrolled_layers=32,
    num_heads=15,
    num_kv_heads=5,
    tie_embeddings=True,
    recursion=RecursionConfig(3, router=ExpertChoice(warmup_steps=1000)),
)


def model_registry(flavor: str, decoder: DecoderConfig) -> ModelSpec:
    """What torchtitan needs to know of a model with these settings."""
    return ModelSpec(
        name="mor",
        flavor=flavor,
        model=MoRModel.Config.from_decoder(decoder),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=update_routers_after_steps,
        # Checkpoints become model folders through `mor_titan.folders.save_folder`.
        state_dict_adapter=None,
    )


def mor_debugmodel() -> Trainer.Config:
    """A tiny model on the documentation that ships with Python; its tokenizer is `hf_assets_path`."""
    return Trainer.Config(
        loss=MoRLoss.Config(),
        model_spec=model_registry("debugmodel", DEBUG_MODEL),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=4,
            seq_len=128,
            steps=20,
            disable_cuda_graphs=True,
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="python_topics"),
        metrics=MetricsProcessor.Config(log_freq=1),
        # The other values are refused; see `require_supported`.
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor", enable_sequence_parallel=False
        ),
        checkpoint=CheckpointManager.Config(interval=10),
        activation_checkpoint=None,
    )


def mor_360m() -> Trainer.Config:
    """A Mixture-of-Recursions with the layers of SmolLM-360M, on C4."""
    config = mor_debugmodel()
    config.model_spec = model_registry("360M", MOR_360M)
    config.lr_scheduler.warmup_steps = 500
    config.training.local_batch_size, config.training.seq_len = 16, 2048
    config.training.global_batch_size, config.training.steps = 1024, 10_000
    config.dataloader = HuggingFaceTextDataLoader.Config(dataset="c4")
    config.metrics.log_freq = 10
    config.checkpoint.interval = 1000
    return config


def _python_topics(path: str) -> Dataset:
    return Dataset.from_dict({"text": list(pydoc_data.topics.topics.values())})


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


DATASETS["python_topics"] = DatasetConfig(
    path="pydoc_data.topics", loader=_python_topics, sample_processor=_text
)
