"""The settings in a config.json of DeepSeek, and ours.

A checkpoint that uses an unsupported setting is rejected with an error that names the setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mor_huggingface.checkpoints.rope import read_rope, write_rope
from mor_layers import DecoderConfig, FixedDepth, MoEConfig, RecursionConfig
from mor_layers.models import LatentAttentionConfig
from mor_layers.settings.field_types import shown
from mor_layers.weights import CONFIG, require_supported

LATENT_EPSILON = 1e-6
"""Of the norms of latent rows, which is not a setting of theirs. Ours have that of the other norms."""
_BIAS_UPDATE_RATE = 0.001
"""Of V3's bias (section 4.2), which its config.json does not have."""
_INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
_EXPERT_INTEGERS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleave": True,
    "moe_layer_freq": 1,
    "rms_norm_eps": LATENT_EPSILON,
}
"""The only supported value of each of these fields, if the field is given."""


@dataclass(frozen=True)
class Family:
    """DeepSeek-V2 or DeepSeek-V3."""

    model_type: str
    """In config.json; also the name of the format."""
    architecture: str
    """Name of the model class in config.json."""
    scoring: str
    """How logits become scores of experts."""
    normalizes_gates: bool
    only: Mapping[str, Any]
    """The only supported value of each of these fields, if the field is given."""

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added to scores when experts are chosen."""
        return self.scoring == "sigmoid"


V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "softmax",
    False,
    {"scoring_func": "softmax", "norm_topk_prob": False},
)
V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "sigmoid",
    True,
    {"scoring_func": "sigmoid", "norm_topk_prob": True, "topk_method": "noaux_tc"},
)
FAMILIES = {family.model_type: family for family in (V2, V3)}


def config_from_deepseek(values: Mapping[str, Any], where: str = CONFIG) -> DecoderConfig:
    """Convert the settings in a config.json of DeepSeek to a DecoderConfig.

    Raises:
        ValueError: a setting is missing or not supported.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise ValueError(
            f"{where}: model_type={shown(values.get('model_type'))} is not supported. Use one of "
            f"{', '.join(FAMILIES)}."
        )
    base, scaling = read_rope(values, where)
    only = _ONLY | dict(family.only)
    heads = values.get("num_attention_heads")
    given = {name: value for name, value in values.items() if value is not None}
    require_supported(given, only | {"num_key_value_heads": heads}, where)
    sizes = _integers(values, _INTEGERS, where)
    queries = values.get("q_lora_rank")
    if not isinstance(queries, int | None):
        raise ValueError(f"{where}: q_lora_rank={shown(queries)} must be an integer, or null.")
    latent = LatentAttentionConfig(
        sizes["kv_lora_rank"],
        sizes["qk_nope_head_dim"],
        sizes["qk_rope_head_dim"],
        sizes["v_head_dim"],
        queries,
    )
    layers, recursion, moe = sizes["num_hidden_layers"], None, None
    dense = min(
        _integers(values, ("first_k_dense_replace",), where, 0)["first_k_dense_replace"], layers
    )
    if values.get("n_routed_experts") is not None and dense < layers:
        moe = _experts(family, values, where)
        recursion = RecursionConfig(1, prelude_layers=dense, coda_layers=0) if dense else None
    return DecoderConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_unrolled_layers=layers,
        num_heads=sizes["num_attention_heads"],
        rms_norm_epsilon=LATENT_EPSILON,
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        recursion=recursion,
        latent_attention=latent,
        moe=moe,
        dense_ends=recursion is not None,
    )


def deepseek_config(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """Convert a DecoderConfig to the settings of DeepSeek.

    Raises:
        ValueError: the model is not of this family.
    """
    latent, moe = config.latent_attention, config.moe
    if latent is None:
        _refuse(family, "latent_attention", None)
        raise AssertionError
    if config.rms_norm_epsilon != LATENT_EPSILON:
        _refuse(family, "rms_norm_epsilon", config.rms_norm_epsilon)
    _require_plain(family, config)
    layers = config.num_unrolled_layers
    values: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "kv_lora_rank": latent.kv_lora_rank,
        "q_lora_rank": latent.q_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": LATENT_EPSILON,
        **write_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
        "first_k_dense_replace": layers if moe is None else config.schedule.prelude,
    }
    if family is V3:
        further = config.multi_token_prediction
        heads = 0 if further is None else further.num_heads
        values |= {"rope_interleave": True, "num_nextn_predict_layers": heads}
    return values if moe is None else values | _expert_values(family, moe, config)


def _integers(
    values: Mapping[str, Any], names: tuple[str, ...], where: str, default: int | None = None
) -> dict[str, int]:
    found = {}
    for name in names:
        value = default if values.get(name) is None else values[name]
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}: {name}={shown(value)} must be an integer.")
        found[name] = value
    return found


def _experts(family: Family, values: Mapping[str, Any], where: str) -> MoEConfig:
    sizes = _integers(values, _EXPERT_INTEGERS, where)
    shared = _integers(values, ("n_shared_experts",), where, 0)["n_shared_experts"]
    if shared < 1:
        raise ValueError(
            f"{where}: n_shared_experts={shown(values.get('n_shared_experts'))} is not supported: at "
            "least one is needed."
        )
    groups = _integers(values, ("n_group", "topk_group"), where, 1)
    if family is V2:
        method = values.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(
                f"{where}: topk_method={shown(method)} is not supported, only 'greedy' and "
                "'group_limited_greedy'."
            )
        if method == "greedy":
            groups = {"n_group": 1, "topk_group": 1}
    per_token, scale = sizes["num_experts_per_tok"], values.get("routed_scaling_factor", 1.0)
    if not isinstance(scale, int | float):
        raise ValueError(f"{where}: routed_scaling_factor={shown(scale)} must be a number.")
    if family.normalizes_gates and per_token == 1:
        raise ValueError(
            f"{where}: num_experts_per_tok=1 with norm_topk_prob=true is not supported: the gate would "
            "be a constant."
        )
    coefficient = values.get("aux_loss_alpha")
    return MoEConfig(
        sizes["n_routed_experts"],
        per_token,
        sizes["moe_intermediate_size"],
        balance_coefficient=float(coefficient) if isinstance(coefficient, int | float) else 0.0,
        z_loss_coefficient=0.0,
        bias_update_rate=_BIAS_UPDATE_RATE if family.has_bias else 0.0,
        scores="sigmoid" if family.scoring == "sigmoid" else "softmax",
        normalizes_gates=family.normalizes_gates,
        gate_scale=float(scale),
        num_groups=groups["n_group"],
        groups_per_token=groups["topk_group"],
        shared_ffn_hidden_size=shared * sizes["moe_intermediate_size"],
    )


def _expert_values(family: Family, moe: MoEConfig, config: DecoderConfig) -> dict[str, Any]:
    width = moe.ffn_hidden_size or config.ffn_hidden_size
    wanted = {
        "moe.scores": (moe.scores, family.scoring),
        "moe.normalizes_gates": (moe.normalizes_gates, family.normalizes_gates),
        "moe.bias_update_rate": (moe.bias_update_rate > 0, family.has_bias),
        "moe.capacity_factor": (moe.capacity_factor, None),
    }
    for name, (given, supported) in wanted.items():
        if given != supported:
            _refuse(family, name, getattr(moe, name.removeprefix("moe.")))
    shared = moe.shared_ffn_hidden_size
    if not shared or shared % width:
        _refuse(family, "moe.shared_ffn_hidden_size", shared)
    groups = {"n_group": moe.num_groups, "topk_group": moe.groups_per_token}
    method = "noaux_tc"
    if family is V2:
        method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return groups | {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "routed_scaling_factor": moe.gate_scale,
        "scoring_func": family.scoring,
        "norm_topk_prob": family.normalizes_gates,
        "topk_method": method,
        "aux_loss_alpha": moe.balance_coefficient,
    }


def _require_plain(family: Family, config: DecoderConfig) -> None:
    """Raise ValueError unless every layer runs once, with experts in all but the first ones."""
    for name in config.beyond_llama:
        if family is not V3 or name != "multi_token_prediction":
            _refuse(family, name, getattr(config, name))
    recursion, schedule = config.recursion, config.schedule
    if recursion is None:
        if config.dense_ends:
            _refuse(family, "dense_ends", True)
        return
    if recursion.num_recursions > 1 or not isinstance(recursion.router, FixedDepth):
        _refuse(family, "recursion", recursion)
    if recursion.beyond_published:
        name = recursion.beyond_published[0]
        _refuse(family, name, getattr(recursion, name))
    if config.moe is not None and (schedule.coda or not schedule.prelude or not config.dense_ends):
        _refuse(family, "coda_layers", recursion.coda_layers)


def _refuse(family: Family, name: str, value: object) -> None:
    raise ValueError(
        f"{name}={value} cannot be written as {family.model_type}. Keep the model in our format, which "
        "AutoModelForCausalLM loads after `import mor_huggingface`."
    )
