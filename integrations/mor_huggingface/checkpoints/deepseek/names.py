"""The names of a DeepSeek's tensors, and those of ours that stand for them."""

from mor_layers import DecoderConfig, MoEConfig
from mor_layers.weights import layer_names, unrolled_layers

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_HEAD = {
    "embedding_norm.weights.0": "enorm.weight",
    "state_norm.weights.0": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weights.0": "shared_head.norm.weight",
}


def deepseek_names(config: DecoderConfig) -> dict[str, str]:
    """The name in a checkpoint of each tensor, with one for the same projection of all experts."""
    names = {"embedding.weight": EMBEDDING}
    for depth, (ours, _) in enumerate(unrolled_layers(config)):
        is_dense = config.dense_ends and ours.startswith("prelude.")
        moe = None if is_dense else config.moe
        names |= _layer_names(config, moe, ours, f"model.layers.{depth}")
    for head, theirs in enumerate(_head_places(config)):
        ours = f"prediction_heads.{head}"
        names |= {f"{ours}.{own}": f"{theirs}.{other}" for own, other in _HEAD.items()}
        names |= _layer_names(config, config.head_config.moe, f"{ours}.layers.layers.0", theirs)
    names["norm.weights.0"] = "model.norm.weight"
    if not config.tie_embeddings:
        names["output.weight"] = OUTPUT
    return names


def copies_of(config: DecoderConfig) -> dict[str, str]:
    """The copies of other tensors that layers of multi-token prediction have."""
    output = EMBEDDING if config.tie_embeddings else OUTPUT
    copies = {}
    for place in _head_places(config):
        copies |= {f"{place}.embed_tokens.weight": EMBEDDING}
        copies |= {f"{place}.shared_head.head.weight": output}
    return copies


def is_single(name: str) -> bool:
    """Whether ours has a first dimension of size one: of the only shared expert, or the only step."""
    return ".shared_experts." in name or name.endswith(".e_score_correction_bias")


def _layer_names(
    config: DecoderConfig, moe: MoEConfig | None, ours: str, theirs: str
) -> dict[str, str]:
    """The names of the tensors of one layer, with the given experts."""
    names = layer_names(config, ours, theirs)
    if moe is None:
        return names
    names = {name: other for name, other in names.items() if ".mlp." not in name}
    return names | _expert_names(moe, f"{ours}.mlp", f"{theirs}.mlp")


def _head_places(config: DecoderConfig) -> list[str]:
    """Where a checkpoint has the layers of multi-token prediction."""
    further, first = config.multi_token_prediction, config.num_unrolled_layers
    heads = 0 if further is None else further.num_heads
    return [f"model.layers.{first + head}" for head in range(heads)]


def _expert_names(moe: MoEConfig, ours: str, theirs: str) -> dict[str, str]:
    names = {f"{ours}.router.weights.0": f"{theirs}.gate.weight"}
    if moe.bias_update_rate:
        names[f"{ours}.router.bias"] = f"{theirs}.gate.e_score_correction_bias"
    for projection in ("gate", "up", "down"):
        names[f"{ours}.experts.{projection}"] = f"{theirs}.experts.{projection}_proj"
        names[f"{ours}.shared.{projection}"] = f"{theirs}.shared_experts.{projection}_proj.weight"
    return names
