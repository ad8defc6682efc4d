"""Names of the tensors in a recursive model's layers, in our layout and in Llama's."""

from mor_layers.models import DecoderConfig

_LAYER = {
    "attention_norm.weights.{norm}": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weights.{norm}": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attention.{n}.bias": f"self_attn.{n[0]}_proj.bias" for n in ("query", "key", "value")}
_HEAD_NORMS = {
    "attention.query_norm.weights.0": "self_attn.q_norm.weight",
    "attention.key_norm.weights.0": "self_attn.k_norm.weight",
}


def layer_names(config: DecoderConfig, ours: str, theirs: str, norm: int = 0) -> dict[str, str]:
    """Map our names to those of Llama (or Qwen) for the tensors of a dense layer, with one step's
    norms.
    """
    names = _LAYER | (_BIASES if config.qkv_bias else {}) | (_HEAD_NORMS if config.qk_norm else {})
    return {f"{ours}.{o.format(norm=norm)}": f"{theirs}.{t}" for o, t in names.items()}


def unrolled_layers(config: DecoderConfig) -> list[tuple[str, int]]:
    """The name of the layer that runs at each depth, and the index of its norms at that depth."""
    recursion, schedule = config.effective_recursion, config.schedule
    steps, size = range(recursion.num_recursions), range(schedule.block_size)
    if schedule.is_cyclic:
        shared = [(f"recursions.0.layers.layers.{layer}", step) for step in steps for layer in size]
    else:
        shared = [(f"recursions.{layer}.layers.layers.0", step) for layer in size for step in steps]
    if recursion.share_norms:
        shared = [(name, 0) for name, _ in shared]
    first = [(f"prelude.layers.{layer}", 0) for layer in range(schedule.prelude)]
    last = [(f"coda.layers.{layer}", 0) for layer in range(schedule.coda)]
    return first + shared + last
