"""As much of vLLM as `mor_vllm.model` uses, in plain PyTorch on one rank.

Signatures are those of vLLM's sources (vllm-project/vllm, main in 2026): module by module, parameter by
parameter, defaults included, so that a call which they would refuse is refused here. What they compute
is written anew. A batch is what its model runner makes: the tokens of several requests one after
another, prompts and single tokens mixed, with rows in caches that are named by layer.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Runner:
    """The model runner's state."""

    layers: dict[str, "Attention"] = field(default_factory=dict)
    """vLLM's `static_forward_context`."""
    caches: dict[str, dict[tuple[int, int], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Rows by request and position, of layers that have a cache of their own."""
    slots: list[tuple[int, int]] = field(default_factory=list)
    """Request and position of each token of the batch."""
    architectures: dict[str, Any] = field(default_factory=dict)
    """vLLM's model registry."""


RUNNER = Runner()


class Attention(nn.Module):
    """vllm/model_executor/layers/attention/attention.py"""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        use_alibi_sqrt: bool | None = None,
        cache_config: Any = None,
        quant_config: Any = None,
        logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        attn_backend: Any = None,
        head_size_v: int | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__()
        assert not extra_impl_args, "reaches a backend, which would refuse it"
        if prefix in RUNNER.layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        target = kv_sharing_target_layer_name
        if target is not None:
            if target not in RUNNER.layers or place(target) >= place(prefix):
                raise ValueError(f"{target} is no earlier layer than {prefix}")
        else:
            RUNNER.caches[prefix] = {}
        self.kv_sharing_target_layer_name = target
        self.layer_name = prefix
        self.sizes = num_heads, num_kv_heads or num_heads, head_size
        self.scale = scale
        RUNNER.layers[prefix] = self

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None
    ) -> Tensor:
        heads, groups, size = self.sizes
        query = query.view(-1, heads, size)
        rows = zip(key.view(-1, groups, size), value.view(-1, groups, size), strict=True)
        name = self.kv_sharing_target_layer_name or self.layer_name
        cache = RUNNER.caches[name]
        if self.kv_sharing_target_layer_name is None:
            cache.update(zip(RUNNER.slots, rows, strict=True))
        outputs = []
        for own, (request, position) in zip(query, RUNNER.slots, strict=True):
            seen = [cache[request, earlier] for earlier in range(position + 1)]
            keys, values = (torch.stack(part, dim=1) for part in zip(*seen, strict=True))
            keys, values = (part.repeat_interleave(heads // groups, 0) for part in (keys, values))
            weights = (self.scale * torch.einsum("nd,nsd->ns", own, keys)).softmax(dim=-1)
            outputs.append(torch.einsum("ns,nsd->nd", weights, values).flatten())
        return torch.stack(outputs)


def place(name: str) -> int:
    """vllm/model_executor/models/utils.py, extract_layer_index: the only number of a name."""
    (number,) = (int(part) for part in name.split(".") if part.isdigit())
    return number


class ColumnParallelLinear(nn.Module):
    """vllm/model_executor/layers/linear.py"""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        tp_rank: int | None = None,
        tp_size: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((output_size, input_size), torch.nan))
        self.weight.weight_loader = self.weight_loader
        self.bias = nn.Parameter(torch.full((output_size,), torch.nan)) if bias else None
        if self.bias is not None:
            self.bias.weight_loader = self.weight_loader

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        assert param.data.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        return F.linear(input_, self.weight, self.bias), None


class MergedColumnParallelLinear(ColumnParallelLinear):
    """vllm/model_executor/layers/linear.py"""

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        super().__init__(input_size, sum(output_sizes), bias)
        self.output_sizes = output_sizes

    def weight_loader(  # type: ignore[override]
        self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: int | None = None
    ) -> None:
        assert loaded_shard_id is not None
        param.data.split(self.output_sizes)[loaded_shard_id].copy_(loaded_weight)


class RowParallelLinear(ColumnParallelLinear):
    """vllm/model_executor/layers/linear.py"""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        super().__init__(input_size, output_size, bias)


class RMSNorm(nn.Module):
    """vllm/model_executor/layers/layernorm.py"""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        var_hidden_size: int | None = None,
        has_weight: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.full((hidden_size,), torch.nan))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None, "gives two tensors back"
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x) * self.weight


class SiluAndMul(nn.Module):
    """vllm/model_executor/layers/activation.py"""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return F.silu(first) * second


class VocabParallelEmbedding(nn.Module):
    """vllm/model_executor/layers/vocab_parallel_embedding.py: rows are filled up to 64."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = 64,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        rows = -(-num_embeddings // padding_size) * padding_size
        self.weight = nn.Parameter(torch.full((rows, embedding_dim), torch.nan))
        self.weight.weight_loader = self.weight_loader

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        param.data[: len(loaded_weight)].copy_(loaded_weight)

    def forward(self, input_: Tensor) -> Tensor:
        return F.embedding(input_, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    """vllm/model_executor/layers/vocab_parallel_embedding.py"""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = 64,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, params_dtype)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> "ParallelLMHead":
        self.weight = embed_tokens.weight
        return self

    def forward(self, input_: Tensor) -> Tensor:
        raise RuntimeError("LMHead's weights should be used in the sampler.")


class LogitsProcessor(nn.Module):
    """vllm/model_executor/layers/logits_processor.py"""

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        logits_as_input: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(
        self, lm_head: ParallelLMHead, hidden_states: Tensor, embedding_bias: Tensor | None = None
    ) -> Tensor:
        return F.linear(hidden_states, lm_head.weight)[..., : self.vocab_size]


class RotaryEmbedding(nn.Module):
    """vllm/model_executor/layers/rotary_embedding/base.py"""

    def __init__(self, head_size: int, max_position: int, base: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
        angles = torch.outer(torch.arange(max_position, dtype=torch.float), 1.0 / base**exponent)
        self.head_size = head_size
        cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
        self.register_buffer("cos_sin_cache", cache, persistent=False)

    def forward(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, dim=-1)

        def turned(values: Tensor) -> Tensor:
            first, second = values.view(len(positions), -1, self.head_size).chunk(2, dim=-1)
            parts = [first * cos - second * sin, second * cos + first * sin]
            return torch.cat(parts, dim=-1).reshape(values.shape)

        return turned(query), None if key is None else turned(key)


def get_rope(
    head_size: int,
    max_position: int,
    is_neox_style: bool = True,
    rope_parameters: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    dual_chunk_attention_config: dict[str, Any] | None = None,
) -> RotaryEmbedding:
    """vllm/model_executor/layers/rotary_embedding/__init__.py"""
    assert is_neox_style and rope_parameters is not None
    assert rope_parameters["rope_type"] == "default"
    return RotaryEmbedding(head_size, max_position, rope_parameters["rope_theta"])


def default_weight_loader(param: Tensor, loaded_weight: Tensor) -> None:
    """vllm/model_executor/model_loader/weight_utils.py"""
    assert param.size() == loaded_weight.size()
    param.data.copy_(loaded_weight)


def support_torch_compile(*, dynamic_arg_dims: dict[str, int]) -> Any:
    """vllm/compilation/decorators.py: the class, whose constructor takes `vllm_config` by name."""

    def unchanged(kind: type[nn.Module]) -> type[nn.Module]:
        assert set(dynamic_arg_dims) <= set(signature(kind.forward).parameters)
        assert signature(kind.__init__).parameters["vllm_config"].kind is Parameter.KEYWORD_ONLY
        return kind

    return unchanged


class ModelRegistry:
    """vllm/model_executor/models/registry.py"""

    @staticmethod
    def register_model(model_arch: str, model_cls: type[nn.Module] | str) -> None:
        RUNNER.architectures[model_arch] = model_cls


_LAYERS = "vllm.model_executor.layers"
MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"ModelRegistry": ModelRegistry},
    "vllm.compilation": {},
    "vllm.compilation.decorators": {"support_torch_compile": support_torch_compile},
    "vllm.config": {"VllmConfig": SimpleNamespace},
    "vllm.distributed": {
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
        "tensor_model_parallel_all_reduce": lambda input_: input_,
    },
    "vllm.model_executor": {},
    _LAYERS: {},
    f"{_LAYERS}.activation": {"SiluAndMul": SiluAndMul},
    f"{_LAYERS}.attention": {"Attention": Attention},
    f"{_LAYERS}.layernorm": {"RMSNorm": RMSNorm},
    f"{_LAYERS}.linear": {
        kind.__name__: kind
        for kind in (ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear)
    },
    f"{_LAYERS}.logits_processor": {"LogitsProcessor": LogitsProcessor},
    f"{_LAYERS}.rotary_embedding": {"get_rope": get_rope},
    f"{_LAYERS}.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
    "vllm.model_executor.model_loader": {},
    "vllm.model_executor.model_loader.weight_utils": {
        "default_weight_loader": default_weight_loader
    },
}


@contextmanager
def emulated() -> Iterator[Runner]:
    """Within it, `import vllm` finds this."""
    made = {name: ModuleType(name) for name in MODULES}
    for name, module in made.items():
        vars(module).update(MODULES[name])
        module.__path__ = []  # type: ignore[attr-defined]
    ours = ("mor_vllm.attention", "mor_vllm.layers", "mor_vllm.model")
    before = {name: sys.modules.pop(name, None) for name in (*made, *ours)}
    sys.modules.update(made)
    try:
        yield RUNNER
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        RUNNER.__init__()


def vllm_config(hf_config: Any, enforce_eager: bool = True) -> SimpleNamespace:
    """vllm/config/vllm.py, VllmConfig, as far as a model reads it."""
    model_config = SimpleNamespace(
        hf_config=hf_config, max_model_len=32, enforce_eager=enforce_eager
    )
    return SimpleNamespace(model_config=model_config, cache_config=object(), quant_config=None)
