"""The training that the script is asked for, as a hand-written loop around an unmodified GPTModel.

It runs on one rank of a worker pool. Nothing is taken from `megatron.training`.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tokenizers import MegatronTokenizer

from mor_layers import RecursionConfig
from mor_megatron import RoutingReport, recursion_block_spec, routing_reports, update_routers
from mor_megatron.models.hybrid import recursion_hybrid_spec
from mor_megatron.models.hybrid_pattern import HybridPattern
from tests.distributed import megatron_setup as setup

SEED, VOCAB_SIZE, SEQUENCE_LENGTH = 1234, 128, 32
BATCH, MICRO_BATCH, STEPS = 8, 2, 6
LEARNING_RATE = 0.01
NUM_LAYERS, NUM_HEADS = 8, 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_sequence_length": SEQUENCE_LENGTH,
    "position_embedding_type": "rope",
}
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_token_dispatcher_type": "alltoall",
    "moe_aux_loss_coeff": 0.01,
}


@dataclass(frozen=True)
class Trained:
    """What the loop saw in each batch."""

    losses: list[float]
    reports: list[RoutingReport]


def train(
    recursion: RecursionConfig,
    fields: dict[str, Any],
    updates: bool = True,
    is_hybrid: bool = False,
) -> Trained:
    """STEPS batches of the script's mock data, from the weights of its seed.

    Args:
        recursion: its settings.
        fields: of the configuration.
        updates: whether to update routers after each step.
        is_hybrid: take a HybridModel and not a GPTModel.
    """
    setup.initialize(seed=SEED)
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    model = _hybrid(recursion, fields) if is_hybrid else _gpt(recursion, fields)
    chunks = setup.data_parallel([model])
    optimizer = setup.build_optimizer(chunks, lr=LEARNING_RATE)
    for group in optimizer.param_groups:  # as Megatron's scheduler does: norms do not decay
        group["weight_decay"] *= group["wd_mult"]
    data, losses, reports = _mock_data(), [], []
    for step in range(STEPS):
        samples = [data[step * BATCH + i] for i in range(BATCH)]
        ids = torch.stack([sample["tokens"] for sample in samples])
        last = torch.stack([sample["labels"][-1:] for sample in samples])
        losses.append(
            setup.train_step(chunks, optimizer, torch.cat([ids, last], dim=1), MICRO_BATCH)
        )
        if updates:
            update_routers(chunks)
        reports += routing_reports(chunks)
    return Trained(losses, reports)


def _gpt(recursion: RecursionConfig, fields: dict[str, Any]) -> GPTModel:
    config = setup.tiny_config(num_layers=NUM_LAYERS, num_query_groups=NUM_HEADS, **fields)
    return GPTModel(config, recursion_block_spec(config, recursion), **SIZES)


def _hybrid(recursion: RecursionConfig, fields: dict[str, Any]) -> HybridModel:
    pattern = HybridPattern.parse("*-[*-*-]x3*-")
    layers = {
        "num_layers": pattern.num_layers,
        "num_query_groups": NUM_HEADS,
        "is_hybrid_model": True,
    }
    config = setup.tiny_config(**layers, **fields)
    spec = recursion_hybrid_spec(config, pattern, recursion)
    return HybridModel(config, spec, hybrid_layer_pattern=pattern.unrolled, **SIZES)


def _mock_data() -> Any:
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=VOCAB_SIZE
    )
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        split="969, 30, 1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    sizes = [STEPS * BATCH, 2 * BATCH, BATCH]
    (data, *_) = BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()
    return data
