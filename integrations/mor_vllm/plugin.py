"""vLLM's plugin: `pip install ".[hf]"` beside vLLM, then `vllm serve model/`.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). A folder of
`mor_layers.weights.folder` is served as it is; what can be is said by `require_servable`.
"""

from mor_layers import DecoderConfig

ARCHITECTURE = "MoRForCausalLM"
"""Of a folder's config.json."""
FIRST_STEP = (
    "step 1 leaves tokens out, whose keys its caches would hold all the same. Let step 1 run for all "
    "tokens, or use DepthBatchingEngine."
)


def register() -> None:
    """Let vLLM load our folders: their configuration, and the model that reads their weights."""
    from vllm import ModelRegistry  # type: ignore[import-not-found]

    import mor_huggingface  # noqa: F401 (AutoConfig then knows the folders)

    # By name: the module initializes no device before vLLM has forked its workers.
    ModelRegistry.register_model(ARCHITECTURE, f"mor_vllm.model:{ARCHITECTURE}")


def require_servable(config: DecoderConfig, tensor_parallel: int = 1) -> None:
    """Refuse what vLLM's model runner would compute otherwise than we do.

    It runs all tokens of a batch through every layer, and each attention layer keeps a row of every
    token. With step 1's keys and values for all steps that is exact: a token that exited goes along and
    keeps its state, and no row of its later steps is kept or read. Where everyone runs every step it is
    exact under any policy: the policies then differ in nothing but what is kept.

    Raises:
        ValueError: for the first such setting: what it is, why not, and what to use.
    """
    recursion = config.effective_recursion
    router, policy = recursion.router, recursion.kv_policy
    routes = router.lets_tokens_exit
    heads = (config.num_heads, config.kv_heads, config.ffn_hidden_size)
    rules = (
        (
            config.moe is not None,
            "moe",
            "experts per step have no place in its fused kernels. Use DepthBatchingEngine.",
        ),
        (
            recursion.relaxation is not None,
            f"relaxation={recursion.relaxation}",
            "its linear layers know no step. `mor convert --to llama` merges deltas where nothing "
            "routes; else use DepthBatchingEngine.",
        ),
        (
            recursion.residual_scale is not None,
            f"residual_scale={recursion.residual_scale}",
            "its layers add every branch as it is. Use DepthBatchingEngine.",
        ),
        (
            routes and policy != "recursive_sharing",
            f"router={type(router).__name__} with kv_policy={policy!r}",
            "its caches would keep rows of tokens that had exited. Train with kv_policy="
            "'recursive_sharing', or use DepthBatchingEngine.",
        ),
        (
            routes and (router.capacity_factors_for(recursion.num_recursions) or (1.0,))[0] < 1,
            f"router={router}",
            FIRST_STEP,
        ),
        (
            any(size % tensor_parallel for size in heads),
            f"tensor_parallel_size={tensor_parallel}",
            f"it must divide num_heads={heads[0]}, num_kv_heads={heads[1]} and "
            f"ffn_hidden_size={heads[2]}. Use a smaller one.",
        ),
    )
    for is_wrong, given, reason in rules:
        if is_wrong:
            raise ValueError(f"{given} cannot be served by vLLM: {reason}")
