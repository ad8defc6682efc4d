"""Layers shaped like Transformer Engine's, emulated: a norm fused into linear layers, its own core.

Transformer Engine's modules cannot be built without CUDA. What a recursion relies on can be tested:
which arguments its attention gets, and that layers it cannot look into give the same numbers.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from mor_layers.recursion import attend
from mor_megatron import Norm, default_layer_spec, recursion_block_spec
from mor_megatron.models import gpt as mor_specs
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool


class FusedNormLinear(ColumnParallelLinear):
    """As TELayerNormColumnParallelLinear: the norm before the product is inside."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight
        self.__dict__["norm"] = norm

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(self.norm(input_), *args, **kwargs)


class EngineCore(torch.nn.Module):
    """As TEDotProductAttention: [s b n d] in, [s b nd] out, its mask is True where barred."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None,
        packed_seq_params: Any,
    ) -> Tensor:
        assert attention_bias is None
        assert packed_seq_params is None
        if attn_mask_type == AttnMaskType.causal:
            assert attention_mask is None
            assert len(query) == len(key)
            return attend(query, key, value, None).flatten(2)
        assert attn_mask_type == AttnMaskType.arbitrary
        assert attention_mask is not None
        assert attention_mask.shape == (query.shape[1], 1, len(query), len(key))
        return attend(query, key, value, ~attention_mask).flatten(2)


def engine_layer(config: TransformerConfig) -> ModuleSpec:
    spec: Any = default_layer_spec(config)
    parts = spec.submodules
    attention = replace(
        parts.self_attention.submodules, linear_qkv=FusedNormLinear, core_attention=EngineCore
    )
    mlp = parts.mlp.keywords["submodules"]
    parts = replace(
        parts,
        input_layernorm=IdentityOp,
        pre_mlp_layernorm=IdentityOp,
        self_attention=replace(parts.self_attention, submodules=attention),
        mlp=type(parts.mlp)(
            MLP.as_mlp_submodule, submodules=replace(mlp, linear_fc1=FusedNormLinear)
        ),
    )
    return replace(spec, submodules=parts)


def outcome(recursion: RecursionConfig, emulated: bool) -> tuple[float, dict[str, Tensor]]:
    setup.initialize()

    def block(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        layer = engine_layer(config) if emulated else None
        return recursion_block_spec(config, recursion, layer, vp_stage)

    chunks = setup.data_parallel(setup.tiny_gpt(setup.tiny_config(num_layers=8), block))
    loss = setup.forward_backward(chunks, setup.random_tokens(4, 14), 2)
    return loss, setup.gather_gradients(chunks)


@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing", "sharing_with_update"])
@pytest.mark.parametrize(
    "router", [ExpertChoice(alpha=0.5), TokenChoice()], ids=["expert", "token"]
)
def test_fused_norms_and_a_core_of_its_own_give_the_same_numbers(
    pool: WorkerPool, router: Any, policy: Any
) -> None:
    recursion = RecursionConfig(3, router=router, kv_policy=policy, sandwich_norms=True)
    ((loss, grads),) = pool.run(outcome, recursion=recursion, emulated=False)
    ((engine_loss, engine_grads),) = pool.run(outcome, recursion=recursion, emulated=True)
    assert engine_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(engine_grads, grads, rtol=1e-4, atol=1e-6)


def refusal_of_norms_per_step() -> str:
    setup.initialize()
    config = setup.tiny_config(num_layers=8)
    recursion = RecursionConfig(3, share_norms=False)
    try:
        setup.tiny_gpt(config, lambda c, v: recursion_block_spec(c, recursion, engine_layer(c), v))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_norms_per_step_are_refused_where_norms_are_fused(pool: WorkerPool) -> None:
    (message,) = pool.run(refusal_of_norms_per_step)
    assert "share_norms=False" in message
    assert "share_norms=True" in message


def chosen_layers(has_cuda: bool, has_engine: bool, transformer_impl: str) -> str:
    """Which of Megatron's layer functions is asked, with stand-ins for the machine and for TE's."""
    setup.initialize()
    config = setup.tiny_config(num_layers=8, transformer_impl=transformer_impl)
    asked = []

    def record(**kwargs: Any) -> Any:
        asked.append(sorted(kwargs))
        return local(num_experts=None, normalization="RMSNorm")

    local = mor_specs.get_gpt_layer_local_submodules
    saved = (
        torch.cuda.is_available,
        mor_specs.has_transformer_engine,
        mor_specs.get_gpt_layer_with_transformer_engine_submodules,
    )
    try:
        torch.cuda.is_available = lambda: has_cuda
        mor_specs.has_transformer_engine = lambda: has_engine
        mor_specs.get_gpt_layer_with_transformer_engine_submodules = record  # type: ignore[assignment]
        default_layer_spec(config)
    finally:
        (
            torch.cuda.is_available,
            mor_specs.has_transformer_engine,
            mor_specs.get_gpt_layer_with_transformer_engine_submodules,
        ) = saved
    return "engine" if asked else "local"


def test_transformer_engine_is_chosen_where_it_can_run(pool: WorkerPool) -> None:
    engine = "transformer_engine"
    for has_cuda, has_engine, implementation, expected in (
        (True, True, engine, "engine"),
        (False, True, engine, "local"),
        (True, False, engine, "local"),
        (True, True, "local", "local"),
    ):
        (chosen,) = pool.run(
            chosen_layers,
            has_cuda=has_cuda,
            has_engine=has_engine,
            transformer_impl=implementation,
        )
        assert chosen == expected


def cores_under_context_parallelism() -> list[str]:
    setup.initialize(cp=2)
    config = setup.tiny_config(num_layers=8)
    recursion = RecursionConfig(3, router=ExpertChoice())
    spec = recursion_block_spec(config, recursion, engine_layer(config))
    (model,) = setup.tiny_gpt(config, lambda config, vp_stage: spec)
    layers = (model.decoder.layers[0], model.decoder.layers[1].recursion.layers[0])
    return [type(layer.self_attention.core_attention).__name__ for layer in layers]


def test_under_context_parallelism_only_ordinary_layers_keep_a_core_of_its_own(pool) -> None:
    cores = pool.run(cores_under_context_parallelism, 2)
    assert cores == [["EngineCore", "SDPACoreAttention"]] * 2
