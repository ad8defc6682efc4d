"""DALI's batches are those of Megatron-Core's datasets under PyTorch's DataLoader."""

import importlib.util
import pickle
from itertools import islice
from pathlib import Path
from typing import cast

import numpy
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from torch.utils.data import DataLoader

from mor_dali import BatchFields, BatchOrder, MegatronSamples, NumpyShards, Prefetch, token_batches
from mor_tools.pretraining.data.datasets import PackedDocuments
from mor_tools.pretraining.settings import DataSettings, Settings

LENGTH, VOCABULARY = 13, 40


class Tokenizer:
    """What Megatron's datasets ask of one."""

    vocab_size = VOCABULARY
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, eod: int) -> None:
        self.eod = eod


def write_pair(prefix: Path, eod: int) -> None:
    """Seventy documents of 1 to 30 tokens: samples lie within one and across several."""
    random = numpy.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCABULARY))
    for _ in range(70):
        ids = random.integers(0, VOCABULARY, random.integers(1, 30))
        ids[ids == eod] = (eod + 1) % VOCABULARY
        ids[-1] = eod
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def dataset(folder: Path, kind=GPTDataset, eod=3, held_out=False, **options) -> GPTDataset:
    """Training samples of three epochs and an end of document, or held-out ones."""
    write_pair(folder / "text", eod)
    given = {
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=LENGTH,
        blend=([str(folder / "text")], None),
        split="0.6,0.4,0",
        path_to_cache=str(folder / "order"),
        tokenizer=Tokenizer(eod),
        **(given | options),
    )
    builder = BlendedMegatronDatasetBuilder(kind, [150, None, 0], lambda: True, config)
    return cast(GPTDataset, builder.build()[held_out])


def megatron_batches(data: GPTDataset, size: int, first=0, rank=0, ranks=1):
    """What `integrations/mor_tools/pretraining/data/datasets.py` reads."""
    order = BatchOrder(first=first, end=len(data), size=size, rank=rank, ranks=ranks)
    return list(DataLoader(data, batch_sampler=order))


def dali_batches(data: GPTDataset, size: int, first=0, rank=0, ranks=1, **options):
    samples = MegatronSamples(data, numbers_documents=isinstance(data, PackedDocuments))
    order = BatchOrder(end=len(samples), size=size, first=first, rank=rank, ranks=ranks)
    return list(token_batches(samples, order, Prefetch(**options)))


def assert_same(batches, expected) -> None:
    assert len(batches) == len(expected) > 0
    for batch, of_megatron in zip(batches, expected, strict=True):
        assert set(batch) == set(of_megatron)
        for name, values in of_megatron.items():
            assert batch[name].dtype == values.dtype, name
            assert torch.equal(batch[name], values), name


FIELDS = [
    {},
    {"eod_mask_loss": True, "reset_position_ids": True},
    {"create_attention_mask": True},
    {"create_attention_mask": True, "reset_attention_mask": True},
]


@pytest.mark.parametrize("options", FIELDS, ids=["plain", "ends", "causal", "documents"])
def test_every_field_equals_that_of_megatron(tmp_path, options):
    data = dataset(tmp_path, **options)
    assert_same(dali_batches(data, size=4), megatron_batches(data, size=4))


@pytest.mark.parametrize("eod", [0, 3])
def test_documents_are_numbered_as_in_the_pretraining_script(tmp_path, eod):
    data = dataset(tmp_path, PackedDocuments, eod)
    batches = dali_batches(data, size=4)
    assert max(int(batch["documents"].max()) for batch in batches) > 2
    assert_same(batches, megatron_batches(data, size=4))


@pytest.mark.parametrize("eod", [0, 3])
def test_a_padded_sample_is_token_0_without_loss(tmp_path, eod):
    options = FIELDS[3] | {"drop_last_partial_validation_sequence": False}
    data = dataset(tmp_path, PackedDocuments, eod, held_out=True, **options)
    batches = dali_batches(data, size=1)
    padded = [(data.shuffle_index[i] + 1) == len(data) for i in range(len(data))].index(True)
    assert batches[padded]["loss_mask"][0, -1] == 0  # there is one
    assert batches[padded]["labels"][0, -1] == batches[padded]["tokens"][0, -1] == 0
    assert_same(batches, megatron_batches(data, size=1))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 28, 176])
def test_each_rank_reads_its_turn_and_resumes_in_the_middle(tmp_path, ranks, first):
    data = dataset(tmp_path, PackedDocuments)
    assert len(data) % (4 * ranks) != 0  # an odd end
    for rank in range(ranks):
        part = {"size": 4, "first": first, "rank": rank, "ranks": ranks}
        expected = megatron_batches(data, **part)
        if not expected:
            assert dali_batches(data, **part) == []
            continue
        assert_same(dali_batches(data, **part), expected)


def test_an_order_without_a_whole_batch_is_empty(tmp_path):
    data = dataset(tmp_path)
    assert dali_batches(data, size=len(data) + 1) == []
    assert len(dali_batches(data, size=len(data))) == 1


def test_batches_made_far_ahead_are_the_same(tmp_path):
    data = dataset(tmp_path, PackedDocuments)
    batches = dali_batches(data, size=5, batches=7, threads=2)
    assert_same(batches, megatron_batches(data, size=5))


def test_samples_travel_to_other_processes_with_their_indices_by_name(tmp_path):
    dataset(tmp_path)  # writes the indices, which the next one maps
    samples = MegatronSamples(dataset(tmp_path))
    sent = pickle.dumps(samples)
    assert b"shuffle_index" in sent and len(sent) < 4000
    again = pickle.loads(sent)
    assert all(numpy.array_equal(again[i], samples[i]) for i in range(len(samples)))


@pytest.mark.full
def test_processes_that_read_ahead_change_nothing(tmp_path):
    data = dataset(tmp_path, PackedDocuments)
    assert_same(dali_batches(data, size=5, workers=2), megatron_batches(data, size=5))


def test_numpy_shards_are_cut_and_drawn(tmp_path):
    rows = [numpy.arange(1, 34, dtype="uint16"), numpy.arange(100, 105), numpy.arange(200, 217)]
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, row in zip(paths, rows, strict=True):
        numpy.save(path, row)
    samples = NumpyShards(paths, 8, seed=1)  # four, none and two
    (batch,) = token_batches(samples, BatchOrder(end=len(samples), size=6))
    firsts = batch["tokens"][:, 0].tolist()
    assert sorted(firsts) == [1, 9, 17, 25, 200, 208] != firsts
    assert torch.equal(batch["labels"], batch["tokens"] + 1)
    assert [text.tolist() for text in pickle.loads(pickle.dumps(samples))] == [
        text.tolist() for text in samples
    ]
    with pytest.raises(ValueError, match=r"none of .* has the 51 tokens"):
        NumpyShards(paths, 50, seed=1)
    numpy.save(paths[1], numpy.ones((2, 9)))
    with pytest.raises(ValueError, match=r"1\.npy holds float64 of shape \(2, 9\)"):
        NumpyShards(paths, 8, seed=1)


def test_what_cannot_be_made_is_refused(tmp_path):
    data = dataset(tmp_path)
    samples = MegatronSamples(data)
    with pytest.raises(ValueError, match=r"beyond the \d+ samples"):
        token_batches(samples, BatchOrder(end=len(samples) + 1, size=1))
    with pytest.raises(ValueError, match="rank=2 must be between 0 and ranks-1=1"):
        BatchOrder(end=4, size=1, rank=2, ranks=2)
    with pytest.raises(ValueError, match="Pass end_of_document"):
        BatchFields(numbers_documents=True)
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        Prefetch(batches=0)
    for name, value in {
        "inter_document_masking": True,
        "add_extra_token_to_sequence": False,
    }.items():
        kept = getattr(data.config, name)
        setattr(data.config, name, value)
        with pytest.raises(ValueError, match=f"{name}={value}"):
            MegatronSamples(data)
        setattr(data.config, name, kept)


def test_without_dali_it_says_what_to_install(tmp_path, monkeypatch):
    samples = MegatronSamples(dataset(tmp_path))
    monkeypatch.setattr("mor_dali.pipeline.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Install mor-layers\[dali\]"):
        token_batches(samples, BatchOrder(end=1, size=1))
    with pytest.raises(ValueError, match=r"data\.loader='dali': NVIDIA DALI is not installed"):
        Settings(data=DataSettings(loader="dali")).require_installed()
    monkeypatch.setattr("mor_dali.pipeline.find_spec", importlib.util.find_spec)
    assert (
        next(islice(token_batches(samples, BatchOrder(end=1, size=1)), 1))["tokens"].shape[0] == 1
    )
