"""Checks of layers on one GPU: against CPU arithmetic, and Transformer Engine's against local ones.

Every function runs on a rank, and on a CPU in a rehearsal.
"""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mor_layers import DecoderConfig, MoRTransformer, RecursionConfig
from mor_megatron import Norm, recursion_block_spec
from mor_megatron.checkpoints import load_tensors
from mor_megatron.checkpoints.weights import megatron_tensors
from mor_megatron.layers.sublayers.norms import FusedNorm
from tests.distributed import megatron_setup as setup
from tests.distributed.layers.host_waits import is_ours
from tests.distributed.platform import engine_models
from tests.distributed.platform.engine_models import local_layer

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
BATCH, LENGTH = 4, 16


def gpu_gives_what_the_core_gives_on_a_cpu(recursion: RecursionConfig) -> dict[str, Any]:
    """Logits of GPTModel in fp32, from a `MoRTransformer`'s weights."""
    setup.initialize()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    config = DecoderConfig(64, 32, 64, num_unrolled_layers=8, num_heads=4, recursion=recursion)
    ours = MoRTransformer(config).eval()
    theirs_config = setup.tiny_config(
        num_layers=8, num_query_groups=4, layernorm_epsilon=config.rms_norm_epsilon
    )
    (theirs,) = setup.tiny_gpt(
        theirs_config, lambda c, v: recursion_block_spec(c, recursion, local_layer(c))
    )
    load_tensors([theirs], megatron_tensors(ours.state_dict(), config))
    ids = torch.randint(64, (2, 24))
    with torch.no_grad():
        expected = ours(ids).logits
        found = logits(theirs.eval(), ids)
    difference = (found.cpu() - expected).abs().max().item()
    assert difference < 1e-4, f"logits differ by {difference:.2e}"
    return {"largest difference": difference}


def logits(model: GPTModel, ids: Tensor) -> Tensor:
    ids = ids.to(setup.device())
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return model(ids, positions, None)


def one_pass(
    recursion: RecursionConfig, engine: bool, bf16: bool = False, **settings: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss, and gradients in fp32, of a forward and backward pass."""
    precision = BF16 if bf16 else {}
    loss, gradients = engine_models.one_pass(
        recursion, engine, BATCH, LENGTH, **precision, **settings
    )
    return loss, {name: gradient.float() for name, gradient in gradients.items()}


def compared(
    expected: tuple[float, dict[str, Tensor]],
    found: tuple[float, dict[str, Tensor]],
    loss_within: float,
    cosine_above: float,
) -> dict[str, Any]:
    """Of losses and of the direction of all gradients together.

    Raises:
        AssertionError: they differ by more than they may.
    """
    assert expected[1].keys() == found[1].keys()
    ours, theirs = (torch.cat([x[1][k].flatten() for k in expected[1]]) for x in (expected, found))
    difference = abs(found[0] - expected[0])
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=0).item()
    assert difference <= loss_within, f"losses {expected[0]:.6f} and {found[0]:.6f}"
    assert cosine >= cosine_above, f"cosine of the gradients {cosine:.6f}, wanted {cosine_above}"
    return {"loss difference": difference, "1 - cosine of gradients": 1 - cosine}


def engine_equals_local(
    recursion: RecursionConfig,
    loss_within: float = 2e-3,
    cosine_above: float = 0.999,
    **settings: Any,
) -> dict[str, Any]:
    """Transformer Engine's layers against local ones with the same weights.

    By default as near as fp32 is where matrix products round to TF32.
    """
    setup.initialize()
    local, engine = (one_pass(recursion, is_engine, **settings) for is_engine in (False, True))
    return compared(local, engine, loss_within, cosine_above)


def settings_change_little(
    recursion: RecursionConfig, loss_within: float, cosine_above: float, change: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Transformer Engine's layers with and without a change of settings."""
    setup.initialize()
    plain = one_pass(recursion, True, **settings)
    changed = one_pass(recursion, True, **(settings | change))
    return compared(plain, changed, loss_within, cosine_above)


def signatures_are_those_recorded() -> dict[str, Any]:
    """The stand-in of the CPU tests takes what the installed Transformer Engine takes."""
    import json
    from pathlib import Path

    import transformer_engine
    import transformer_engine.pytorch as te

    stand_in = Path(__file__).parents[1] / "distributed/platform/te_stand_in/transformer_engine"
    record = json.loads((stand_in / "signatures.json").read_text("utf-8"))
    checked = 0
    for name, rows in record.items():
        if name == "version":
            continue
        target: Any = te
        if name == "apply_rotary_pos_emb":
            from transformer_engine.pytorch.attention import rope as target
        for part in name.split("."):
            target = getattr(target, part)
        installed = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD or p.kind is p.VAR_POSITIONAL for p in installed.values()):
            continue  # wrapped: its own names are hidden
        unknown = [r["name"] for r in rows if r["name"] not in installed and r["kind"][:3] != "VAR"]
        assert not unknown, f"{name} does not take {', '.join(unknown)}"
        checked += 1
    return {
        "installed": transformer_engine.__version__,
        "recorded": record["version"],
        "checked": checked,
    }


def nothing_waits_for_the_device(recursion: RecursionConfig) -> dict[str, Any]:
    """Of our code, by CUDA's own account."""
    setup.initialize()
    config = setup.tiny_config(num_layers=8)
    chunks = setup.data_parallel(
        setup.tiny_gpt(config, lambda c, v: recursion_block_spec(c, recursion, local_layer(c)))
    )
    tokens = setup.random_tokens(BATCH, LENGTH)
    setup.forward_backward(chunks, tokens, BATCH)  # the first pass reads settings that stay
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setup.forward_backward(chunks, tokens, BATCH)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    ours = [w for w in waits if is_ours(Path(w.filename))]
    assert not ours, "; ".join(f"{w.filename}:{w.lineno}" for w in ours)
    return {"waits of ours": 0, "of others": len(waits)}


def apex_norms_equal_ours() -> dict[str, Any]:
    """In bf16, forward and backward, both kinds."""
    setup.initialize()
    worst = 0.0
    for kind in ("RMSNorm", "LayerNorm"):
        config = setup.tiny_config(normalization=kind, **BF16)
        x = torch.randn(64, 32, device=setup.device(), dtype=torch.bfloat16)
        results = []
        for norm_class in (Norm, FusedNorm):
            norm, given = norm_class(config, 32).to(x.device), x.clone().requires_grad_()
            out = norm(given)
            out.float().square().sum().backward()
            results.append((out.float(), given.grad.float()))  # type: ignore[union-attr]
        for ours, theirs in zip(*results, strict=True):
            scale = ours.abs().max()
            worst = max(worst, ((ours - theirs).abs().max() / scale).item())
    assert worst < 0.02, f"relative difference {worst:.3g}"
    return {"largest relative difference": worst}
