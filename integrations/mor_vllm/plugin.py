"""vLLM's plugin: `pip install ".[hf]"` next to vLLM, then `vllm serve model/`.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). A folder
of `mor_layers.weights.folder` is served unchanged; `require_servable` says which models are
supported.
"""

import math
from typing import Any

from mor_layers import DecoderConfig
from mor_layers.routers import Deepened, RouterConfig

ARCHITECTURE = "MoRForCausalLM"
"""The entry of `architectures` in a folder's config.json."""
FIRST_STEP = (
    "step 1 leaves tokens out, whose keys later steps would see. Heads have room to hide them "
    "only if the router's capacity_factors say so. Calibrate step 1 to all tokens, or use "
    "DepthBatchingEngine."
)
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that vLLM's kernels for CPUs support; those for GPUs support most of them, too."""


OLDEST, NEWEST = (0, 26), (0, 32)
"""The releases of vLLM that were run, see docs/pages/vllm.md."""


def register() -> None:
    """Register the configuration and the model class of our folders with vLLM.

    With a vLLM that was not run, other models are served as ever, and reading the configuration of
    one of ours is an error.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry, __version__  # type: ignore[import-not-found]

    from mor_huggingface import MoRConfig  # AutoConfig then knows the folders

    if (refusal := refused_version(__version__)) is not None:

        class RefusedConfig(MoRConfig):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                raise ValueError(refusal)

        AutoConfig.register(MoRConfig.model_type, RefusedConfig, exist_ok=True)
        return
    # By name, because importing the module would initialise the device before vLLM forks its
    # workers.
    ModelRegistry.register_model(ARCHITECTURE, f"mor_vllm.model:{ARCHITECTURE}")


def refused_version(version: str) -> str | None:
    """Why this version of vLLM is not used; None if it is, as are builds of a working tree."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) < 2 or OLDEST <= numbers <= NEWEST:
        return None
    oldest, newest, after = (
        ".".join(map(str, release)) for release in (OLDEST, NEWEST, (NEWEST[0], NEWEST[1] + 1))
    )
    return (
        f"vLLM {version} cannot serve models of mor_layers: the plugin was run with vLLM {oldest} to "
        f"{newest}, and vLLM changes what it uses between releases. pip install "
        f"'vllm>={oldest},<{after}', or look for a newer mor-layers."
    )


def dial_of(hf_config: Any) -> dict[str, float]:
    """The shifts of a model's thresholds, by the names of `turn_dial`'s arguments.

    They are `dial` in config.json or, for one server, `--hf-overrides '{"dial": {"depth": 0.5}}'`.

    Raises:
        ValueError: it is not a mapping from `depth` and `width` to numbers.
    """
    dial = getattr(hf_config, "dial", None) or {}
    if not isinstance(dial, dict) or any(
        name not in ("depth", "width")
        or not isinstance(shift, int | float)
        or not math.isfinite(shift)
        for name, shift in dial.items()
    ):
        raise ValueError(
            f"dial={dial!r} must be a mapping from depth, width or both to numbers, which are added "
            'to thresholds of the router: --hf-overrides \'{"dial": {"depth": 0.5}}\'.'
        )
    return {name: float(shift) for name, shift in dial.items()}


def hides_rows(config: DecoderConfig) -> bool:
    """Whether caches of the recursion have rows of exited tokens that must not be seen.

    Under `exit_state`, the rows of exited tokens are meant to be seen. If the rows of step 1 serve
    all steps, or stand in for those of exited tokens, there are rows to hide only if step 1 leaves
    tokens out.
    """
    recursion = config.effective_recursion
    router, policy = recursion.router, recursion.kv_policy
    if not router.lets_tokens_exit or policy == "exit_state":
        return False
    if policy == "recursion_wise":
        return True
    factors = router.capacity_factors_for(recursion.num_recursions)
    return not _is_ours(router) if factors is None else factors[0] < 1


def _is_ours(router: RouterConfig) -> bool:
    """Whether the router is one of this library. Of these, those without capacities run step 1 for
    every token; of others, nothing is known.
    """
    inner = router.router if isinstance(router, Deepened) else router
    return type(inner).__module__.startswith("mor_layers.")


def cached_head_size(size: int) -> int:
    """The smallest head size that vLLM's kernels support and that has room for `size` numbers.

    Raises:
        ValueError: there is none.
    """
    for allowed in HEAD_SIZES:
        if size <= allowed:
            return allowed
    raise ValueError(
        f"heads of {size} numbers cannot be served by vLLM, whose kernels support at most "
        f"{HEAD_SIZES[-1]}. Use DepthBatchingEngine."
    )


def require_servable(
    config: DecoderConfig, tensor_parallel: int = 1, expert_parallel: bool = False
) -> None:
    """Refuse models for which vLLM's model runner would compute something else than we do.

    The runner passes all tokens of a batch through every layer, and each attention layer stores a
    row for every token. A token that has exited is passed along and keeps its state. Its rows of
    later steps are not stored, hidden, or those that the KV policy requires. See
    `mor_vllm.attention`.

    Args:
        tensor_parallel: number of ranks that each have part of every layer.
        expert_parallel: whether each of these ranks has whole experts.

    Raises:
        ValueError: for the first such setting, with the reason and what to use instead.
    """
    config.only_recursion("mor_vllm")
    recursion, moe = config.effective_recursion, config.moe
    if config.latent_attention is None:
        cached_head_size(config.head_size + hides_rows(config))
    sizes = {"num_heads": config.num_heads, "num_kv_heads": config.kv_heads}
    if moe is None or config.dense_ends:
        sizes["ffn_hidden_size"] = config.ffn_hidden_size
    if moe is not None:
        width = "ffn_hidden_size" if moe.ffn_hidden_size is None else "moe.ffn_hidden_size"
        sizes |= (
            {"moe.num_experts": moe.num_experts}
            if expert_parallel
            else {width: moe.ffn_hidden_size or config.ffn_hidden_size}
        )
    rules = (
        (
            moe is not None and moe.capacity_factor is not None,
            f"moe.capacity_factor={moe and moe.capacity_factor}",
            "requests would push each other's tokens out of the experts. Set capacity_factor to "
            "null in config.json, so that no token is dropped.",
        ),
        (
            moe is not None and moe.beyond_plain != (),
            "" if moe is None else moe.shown_beyond_plain("moe."),
            "its experts take the best by softmax, and none runs on every token. Use "
            "DepthBatchingEngine.",
        ),
        (
            config.latent_attention is not None,
            f"latent_attention={config.latent_attention}",
            "the plugin's layers cache keys and values, not latent rows. Use DepthBatchingEngine, "
            "which caches latent rows.",
        ),
        (
            moe is not None and config.hidden_size % 8 > 0,
            f"hidden_size={config.hidden_size}",
            "grouped matrix products of experts need a multiple of 8. Use DepthBatchingEngine.",
        ),
        (
            recursion.router.has_loop_state,
            f"router={recursion.router}",
            "its layers hand on a single state. Use DepthBatchingEngine.",
        ),
        (
            recursion.routes_by_layer,
            f"sharing={recursion.sharing!r} with router={recursion.router}",
            "its layers do not route by themselves. Use MoRTransformer.generate.",
        ),
        *(
            (
                True,
                f"{name}={getattr(config, name)}",
                "its layers are a Llama's. Use DepthBatchingEngine.",
            )
            for name in config.beyond_llama
            if name != "multi_token_prediction"  # plain inference leaves the heads out
        ),
        (
            recursion.adapter is not None or recursion.exit_norm,
            f"adapter={recursion.adapter}, exit_norm={recursion.exit_norm}",
            "its steps take in no other state, and no norm follows them. Use DepthBatchingEngine.",
        ),
        (
            recursion.history is not None,
            f"history={recursion.history}",
            "its layers hand on no earlier states. Use DepthBatchingEngine.",
        ),
        (
            recursion.norm_modulation is not None,
            f"norm_modulation={recursion.norm_modulation}",
            "its norms do not know the step. Use DepthBatchingEngine.",
        ),
        (
            any(size % tensor_parallel for size in sizes.values()),
            f"tensor_parallel_size={tensor_parallel}",
            f"it must divide {', '.join(f'{name}={size}' for name, size in sizes.items())}. Use a "
            "smaller one.",
        ),
    )
    for is_wrong, given, reason in rules:
        if is_wrong:
            raise ValueError(f"{given} cannot be served by vLLM: {reason}")
