"""Names of the tensors in a recursive model's layers, in our layout and in Llama's or DeepSeek's."""

from mor_layers.models import DecoderConfig, RecursionConfig

_HEADS = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
}
_QUERY_ROWS = {
    "attention.query_down.weight": "self_attn.q_a_proj.weight",
    "attention.query_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.query_up.weight": "self_attn.q_b_proj.weight",
}
_LATENT_ROWS = {
    "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
}
_LAYER = {
    "attention_norm.weights.{norm}": "input_layernorm.weight",
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
    """Map our names to those of Llama (or Qwen, or DeepSeek where attention is latent) for the tensors
    of a dense layer at one step."""
    own, norm, head_norm = (), 0, 0
    if ours.startswith("recursions."):
        recursion = recursion_of(config, ours)
        own = recursion.own_projections
        norm = 0 if recursion.share_norms else step
        head_norm = step if "query" in own else 0
    names = {}
    tensors = _attention_names(config) | _LAYER
    for tensor, their_tensor in tensors.items():
        module, _, kind = tensor.format(norm=norm, head_norm=head_norm).rpartition(".")
        if module.rpartition(".")[2] in own:
            kind = f"{_OF_STEPS[kind]}.{step}"
        names[f"{ours}.{module}.{kind}"] = f"{theirs}.{their_tensor}"
    return names


def _attention_names(config: DecoderConfig) -> dict[str, str]:
    latent = config.latent_attention
    if latent is None:
        norms = _HEAD_NORMS if config.qk_norm else {}
        return _HEADS | (_BIASES if config.qkv_bias else {}) | norms
    if latent.q_lora_rank is None:
        return {"attention.query_up.weight": "self_attn.q_proj.weight"} | _LATENT_ROWS
    return _QUERY_ROWS | _LATENT_ROWS


def recursion_of(config: DecoderConfig, name: str) -> RecursionConfig:
    """The recursion that the block of a tensor `recursions.<block>...` belongs to."""
    block = int(name.split(".")[1])
    for part in config.parts:
        if block < part.schedule.num_blocks:
            return part.effective_recursion
        block -= part.schedule.num_blocks
    raise ValueError(f"{name!r} names a block that the model does not have.")


def unrolled_layers(config: DecoderConfig) -> list[tuple[str, int]]:
    """The name of the layer that runs at each depth, and the step that it runs there."""
    schedules, layers, block = [part.schedule for part in config.parts], [], 0
    for index, schedule in enumerate(schedules):
        # Layers between two recursions are in one stack: the coda of one, the prelude of the next.
        before = f"between.{index - 1}" if index else "prelude"
        after = "coda" if index == len(schedules) - 1 else f"between.{index}"
        earlier = schedules[index - 1].coda if index else 0
        layers += [(f"{before}.layers.{earlier + i}", 0) for i in range(schedule.prelude)]
        steps, size = range(schedule.num_recursions), range(schedule.block_size)
        if schedule.is_cyclic:
            inner = f"recursions.{block}.layers.layers"
            layers += [(f"{inner}.{i}", step) for step in steps for i in size]
        else:
            inner = [f"recursions.{block + i}.layers.layers.0" for i in size]
            layers += [(name, step) for name in inner for step in steps]
        layers += [(f"{after}.layers.{i}", 0) for i in range(schedule.coda)]
        block += schedule.num_blocks
    return layers
