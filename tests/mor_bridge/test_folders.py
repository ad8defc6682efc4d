"""AutoBridge takes a model folder into Megatron and gives it back, in every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    TokenChoice,
)
from mor_layers.weights import save_model
from mor_megatron.platform import bridge_on_cpu
from tests.distributed.checkpoints.test_weights import LAYOUTS, MODELS, WISE
from tests.distributed.pool import WorkerPool
from tests.mor_bridge.bridges import there_and_back

FURTHER: dict[str, dict[str, Any]] = {
    "recursive sharing": {"recursion": replace(WISE, kv_policy="recursive_sharing")},
    "sharing with update": {"recursion": replace(WISE, kv_policy="sharing_with_update")},
    "exit state": {"recursion": replace(WISE, kv_policy="exit_state")},
    "token choice": {"recursion": RecursionConfig(3, router=TokenChoice(balancing="loss_free"))},
    "tied embeddings": {"recursion": WISE, "tie_embeddings": True, "num_kv_heads": 2},
    "cycle": {"recursion": RecursionConfig(2, sharing="cycle", router=ExpertChoice())},
    "odd vocabulary": {"recursion": WISE, "vocab_size": 61},
    "another rope": {"recursion": WISE, "rope_base": 500000.0, "rms_norm_epsilon": 1e-3},
}


def is_refused(fields: dict[str, Any]) -> bool:
    """Whether the bridge refuses models with these settings."""
    moe = fields.get("moe")
    return (
        "latent_attention" in fields
        or "multi_token_prediction" in fields
        or isinstance(fields.get("recursion"), tuple)
        or (moe is not None and moe.beyond_plain != ())
    )


CASES = [
    (model, layout)
    for model, fields in (MODELS | FURTHER).items()
    if not is_refused(fields)
    for layout in LAYOUTS
    if (layout != "ep" or "moe" in fields) and (model, layout) != ("cycle", "pp")
]


def saved(model: str, folder: Path) -> Path:
    """A folder of a model with weights, norms and buffers that matter."""
    torch.manual_seed(0)
    fields = (MODELS | FURTHER)[model]
    sizes = {"vocab_size": 64, "num_unrolled_layers": 8, "num_heads": 4} | fields
    made = MoRTransformer(DecoderConfig(hidden_size=32, ffn_hidden_size=64, **sizes))
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point() and tensor.isfinite().all():
                tensor.add_(0.1 * torch.randn_like(tensor))
    save_model(made, folder / "model", tokenizer(folder), eos_token_id=3)
    return folder / "model"


def tokenizer(folder: Path) -> Path:
    """The file of a tokenizer that has one token for each of 64 bytes."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet())[:64])}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("model", [name for name, fields in MODELS.items() if is_refused(fields)])
def test_what_the_bridge_lacks_is_refused_by_name(
    pool: WorkerPool, tmp_path: Path, model: str
) -> None:
    folder = saved(model, tmp_path)
    refusal = "latent_att|recursion has 2 entries|multi_token_prediction|MoEConfig"
    with pytest.raises(AssertionError, match=rf"ValueError: ({refusal})"):
        pool.run(there_and_back, folder=folder, layout={}, sp=False)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_folder_goes_into_megatron_and_back(
    pool: WorkerPool, tmp_path: Path, model: str, layout: str
) -> None:
    ranks, parallel, sp = LAYOUTS[layout]
    folder = saved(model, tmp_path)
    found = pool.run(there_and_back, ranks, folder=folder, layout=parallel, sp=sp)
    assert [f.changed for f in found] == [[]] * ranks
    assert max(f.logits for f in found) < 1e-5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"moe": MoEConfig(4, 2, bias_update_rate=0.01)}, "bias_update_rate=0.01"),
        ({"moe": MoEConfig(4, 2, gate_scale=2.0)}, r"MoEConfig\.gate_scale=2\.0 is not converted"),
        (
            {
                "layout": {
                    "virtual_pipeline_model_parallel_size": 2,
                    "overlap_p2p_comm": True,
                    "batch_p2p_comm": False,
                }
            },
            "vp_stage=0",
        ),
        ({"layout": {"tp_comm_overlap": True}}, "tp_comm_overlap=True"),
    ],
)
def test_what_a_recursion_cannot_do_is_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    bridge_on_cpu.enable()
    from mor_bridge.provider import MoRModelProvider, recursive_layers

    layout = fields.pop("layout", {})
    decoder = DecoderConfig(
        64, 32, 64, num_unrolled_layers=8, num_heads=4, recursion=WISE, **fields
    )

    def build_layers() -> None:
        provider = MoRModelProvider.from_decoder(decoder)
        for name, value in layout.items():
            setattr(provider, name, value)
        provider.finalize()
        recursive_layers(provider, vp_stage=0)

    with pytest.raises(ValueError, match=reason):
        build_layers()
