"""The training that the script is asked for, as a hand-written loop around an unmodified GPTModel.

It runs on one rank of a worker pool. Nothing is taken from `megatron.training`.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
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
    documents: Path | None = None,
) -> Trained:
    """STEPS batches of the script's mock data, from the weights of its seed.

    Args:
        recursion: its settings.
        fields: of the configuration.
        updates: whether to update routers after each step.
        is_hybrid: take a HybridModel and not a GPTModel.
        documents: train on these, see `write_documents`, and keep them apart by a mask.
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
    data, losses, reports = _data(documents), [], []
    for step in range(STEPS):
        samples = [data[step * BATCH + i] for i in range(BATCH)]
        ids = torch.stack([sample["tokens"] for sample in samples])
        last = torch.stack([sample["labels"][-1:] for sample in samples])
        rows = torch.cat([ids, last], dim=1)
        if documents:
            rows = torch.cat([rows, torch.stack([_document_of_each_token(s) for s in samples])], 1)
        loss = setup.train_step(
            chunks, optimizer, rows, MICRO_BATCH, _masked_step if documents else None
        )
        losses.append(loss)
        if updates:
            update_routers(chunks)
        reports += routing_reports(chunks)
    return Trained(losses, reports)


def _document_of_each_token(sample: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.searchsorted(sample["cu_seqlens"], torch.arange(SEQUENCE_LENGTH), right=True)


def _masked_step(microbatches: Any, model: Any) -> Any:
    """As `setup.forward_step`, of rows that end with the document of each token."""
    rows = next(microbatches)
    tokens, documents = rows[:, : SEQUENCE_LENGTH + 1], rows[:, SEQUENCE_LENGTH + 1 :]
    is_other = documents[:, :, None] != documents[:, None]
    mask = (is_other | torch.ones_like(is_other).triu(1))[:, None]
    positions = torch.arange(SEQUENCE_LENGTH).expand(len(rows), -1)
    losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return losses, lambda losses: (losses.mean(), losses.detach().mean())


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


def write_documents(prefix: Path) -> None:
    """Writes documents of 3 to 40 tokens in Megatron's format."""
    lengths = torch.randint(3, 41, (4000,), generator=torch.Generator().manual_seed(SEED)).tolist()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for first, length in enumerate(lengths):
        builder.add_document((first + torch.arange(length)) % VOCAB_SIZE, [length])
    builder.finalize(f"{prefix}.idx")


def _data(documents: Path | None) -> Any:
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
        inter_document_masking=documents is not None,
        blend=None if documents is None else ([str(documents)], None),
        mid_level_dataset_surplus=0.005,
    )
    sizes = [STEPS * BATCH, 2 * BATCH, BATCH]
    kind = MockGPTDataset if documents is None else GPTDataset
    (data, *_) = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()
    return data
