"""vLLM's plugin: `pip install ".[hf]"` next to vLLM, then `vllm serve model/`.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). A folder
of `mor_layers.weights.folder` is served unchanged; `require_servable` says which models are
supported.
"""

from mor_layers import DecoderConfig

ARCHITECTURE = "MoRForCausalLM"
"""The entry of `architectures` in a folder's config.json."""
FIRST_STEP = (
    "step 1 leaves tokens out, whose keys later steps would see. Heads have room to hide them "
    "only if the router's capacity_factors say so. Calibrate step 1 to all tokens, or use "
    "DepthBatchingEngine."
)
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that vLLM's kernels for CPUs support; those for GPUs support most of them, too."""


def register() -> None:
    """Register the configuration and the model class of our folders with vLLM."""
    from vllm import ModelRegistry  # type: ignore[import-not-found]

    import mor_huggingface  # noqa: F401 (AutoConfig then knows the folders)

    # By name, because importing the module would initialise the device before vLLM forks its
    # workers.
    ModelRegistry.register_model(ARCHITECTURE, f"mor_vllm.model:{ARCHITECTURE}")


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
    return (router.capacity_factors_for(recursion.num_recursions) or (1.0,))[0] < 1


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


def require_servable(config: DecoderConfig, tensor_parallel: int = 1) -> None:
    """Refuse models for which vLLM's model runner would compute something else than we do.

    The runner passes all tokens of a batch through every layer, and each attention layer stores a
    row for every token. A token that has exited is passed along and keeps its state. Its rows of
    later steps are not stored, hidden, or those that the KV policy requires. See
    `mor_vllm.attention`.

    Raises:
        ValueError: for the first such setting, with the reason and what to use instead.
    """
    recursion, moe = config.effective_recursion, config.moe
    if config.latent_attention is None:
        cached_head_size(config.head_size + hides_rows(config))
    sizes = {"num_heads": config.num_heads, "num_kv_heads": config.kv_heads}
    own_width = None if moe is None else moe.ffn_hidden_size
    if own_width is not None:
        sizes["moe.ffn_hidden_size"] = own_width
    if own_width is None or config.dense_ends:
        sizes["ffn_hidden_size"] = config.ffn_hidden_size
    rules = (
        (
            moe is not None and moe.capacity_factor is not None,
            f"moe.capacity_factor={moe and moe.capacity_factor}",
            "requests would push each other's tokens out of the experts. Set capacity_factor to "
            "null in config.json, so that no token is dropped.",
        ),
        (
            config.latent_attention is not None,
            f"latent_attention={config.latent_attention}",
            "the plugin's layers cache keys and values, not latent rows. Use DepthBatchingEngine, "
            "which caches latent rows.",
        ),
        (
            recursion.relaxation is not None,
            f"relaxation={recursion.relaxation}",
            "its linear layers do not know the step. `mor convert --to llama` merges deltas into "
            "a model without routing; otherwise use DepthBatchingEngine.",
        ),
        (
            recursion.residual_scale is not None,
            f"residual_scale={recursion.residual_scale}",
            "its layers add every branch unscaled. Use DepthBatchingEngine.",
        ),
        (
            bool(recursion.own_per_step),
            f"own_per_step={recursion.own_per_step}",
            "its layers have the same weights at every step. `mor convert --to llama` unrolls a model "
            "where nothing routes; else use DepthBatchingEngine.",
        ),
        (
            recursion.hyper_connections is not None,
            f"hyper_connections={recursion.hyper_connections}",
            "its layers hand on a single stream. Use DepthBatchingEngine.",
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
