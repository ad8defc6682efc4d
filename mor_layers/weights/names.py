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
    "attention.query_norm.weights.{head_norm}": "self_attn.q_norm.weight",
    "attention.key_norm.weights.{head_norm}": "self_attn.k_norm.weight",
}
_OF_STEPS = {"weight": "weights", "bias": "biases"}


def layer_names(config: DecoderConfig, ours: str, theirs: str, step: int = 0) -> dict[str, str]:
    """The name in Llama (or Qwen) of each tensor of a dense layer, as it runs at one step."""
    recursion, own, norm, head_norm = config.effective_recursion, (), 0, 0
    if ours.startswith("recursions."):
        own = recursion.own_projections
        norm = 0 if recursion.share_norms else step
        head_norm = step if "query" in own else 0
    names = {}
    tensors = (
        _LAYER | (_BIASES if config.qkv_bias else {}) | (_HEAD_NORMS if config.qk_norm else {})
    )
    for tensor, their_tensor in tensors.items():
        module, _, kind = tensor.format(norm=norm, head_norm=head_norm).rpartition(".")
        if module.rpartition(".")[2] in own:
            kind = f"{_OF_STEPS[kind]}.{step}"
        names[f"{ours}.{module}.{kind}"] = f"{theirs}.{their_tensor}"
    return names


def unrolled_layers(config: DecoderConfig) -> list[tuple[str, int]]:
    """Name of the layer that runs at each depth, and the step that it runs."""
    recursion, schedule = config.effective_recursion, config.schedule
    steps, size = range(recursion.num_recursions), range(schedule.block_size)
    if schedule.is_cyclic:
        shared = [(f"recursions.0.layers.layers.{layer}", step) for step in steps for layer in size]
    else:
        shared = [(f"recursions.{layer}.layers.layers.0", step) for layer in size for step in steps]
    first = [(f"prelude.layers.{layer}", 0) for layer in range(schedule.prelude)]
    last = [(f"coda.layers.{layer}", 0) for layer in range(schedule.coda)]
    return first + shared + last
