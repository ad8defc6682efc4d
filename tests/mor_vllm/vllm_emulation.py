"""As much of vLLM as `mor_vllm` uses, in plain PyTorch on one rank, so that the everyday suite needs no
vLLM.

It knows only the arguments that `mor_vllm` gives: whether vLLM takes them is shown by
tests/mor_vllm/real. A batch is what vLLM's model runner makes: the tokens of several requests one after
another, prompts and single tokens mixed, with rows in caches that are named by layer.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


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
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        cache_config: Any,
        prefix: str,
        kv_sharing_target_layer_name: str | None,
    ) -> None:
        super().__init__()
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
        self.sizes = num_heads, num_kv_heads, head_size
        self.scale = scale
        RUNNER.layers[prefix] = self

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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
    """The only number of a layer's name, by which vLLM orders layers."""
    (number,) = (int(part) for part in name.split(".") if part.isdigit())
    return number


def _loaded(*shape: int) -> nn.Parameter:
    """A parameter that is nan until it is loaded."""
    parameter = nn.Parameter(torch.full(shape, torch.nan))
    parameter.weight_loader = default_weight_loader  # type: ignore[attr-defined]
    return parameter


class _Linear(nn.Module):
    def __init__(
        self,
        into: int,
        out: int,
        bias: bool,
        skip_bias_add: bool,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.weight = _loaded(out, into)
        self.bias = _loaded(out) if bias else None
        self.skip_bias_add = skip_bias_add

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.skip_bias_add:
            return F.linear(input_, self.weight), self.bias
        return F.linear(input_, self.weight, self.bias), None


class MergedColumnParallelLinear(_Linear):
    def __init__(self, into: int, outs: list[int], bias: bool, skip_bias_add: bool) -> None:
        super().__init__(into, sum(outs), bias, skip_bias_add)
        self.outs = outs
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, parameter: Tensor, loaded: Tensor, part: int) -> None:
        parameter.data.split(self.outs)[part].copy_(loaded)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, _loaded(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x) * self.weight


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return F.silu(first) * second


class VocabParallelEmbedding(nn.Module):
    """Rows are filled up to a multiple of 64."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = _loaded(-(-num_embeddings // 64) * 64, embedding_dim)
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, parameter: Tensor, loaded: Tensor) -> None:
        parameter.data[: len(loaded)].copy_(loaded)

    def forward(self, input_: Tensor) -> Tensor:
        return F.embedding(input_, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> "ParallelLMHead":
        self.weight = embed_tokens.weight
        return self


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, lm_head: ParallelLMHead, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, lm_head.weight)[..., : self.vocab_size]


class RotaryEmbedding(nn.Module):
    def __init__(self, head_size: int, frequencies: Tensor, rows: int, factor: float) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(rows, dtype=torch.float), frequencies)
        self.head_size = head_size
        cache = torch.cat([angles.cos(), angles.sin()], dim=-1) * factor
        self.register_buffer("cos_sin_cache", cache, persistent=False)

    def forward(
        self, positions: Tensor, query: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, dim=-1)

        def turned(values: Tensor) -> Tensor:
            first, second = values.view(len(positions), -1, self.head_size).chunk(2, dim=-1)
            parts = [first * cos - second * sin, second * cos + first * sin]
            return torch.cat(parts, dim=-1).reshape(values.shape)

        return turned(query), None if key is None else turned(key)


def get_rope(head_size: int, max_position: int, rope_parameters: dict[str, Any]) -> RotaryEmbedding:
    kind, base = rope_parameters["rope_type"], rope_parameters["rope_theta"]
    if kind == "default":
        exponent = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
        return RotaryEmbedding(head_size, 1.0 / base**exponent, max_position, 1.0)
    config = LlamaConfig(head_dim=head_size, rope_parameters=dict(rope_parameters))
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, None)
    if kind == "yarn":  # whose table vLLM makes as long as the scaling reaches
        original = rope_parameters["original_max_position_embeddings"]
        max_position = int(original * rope_parameters["factor"])
    return RotaryEmbedding(head_size, frequencies, max_position, factor)


def default_weight_loader(parameter: Tensor, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)


def register_model(architecture: str, model_class: str) -> None:
    RUNNER.architectures[architecture] = model_class


_LAYERS = "vllm.model_executor.layers"
MODULES: dict[str, dict[str, Any]] = {
    "vllm": {
        "ModelRegistry": SimpleNamespace(register_model=register_model),
        "__version__": "0.32.0",
    },
    "vllm.compilation": {},
    "vllm.compilation.decorators": {
        "support_torch_compile": lambda *, dynamic_arg_dims: lambda kind: kind
    },
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
        "ColumnParallelLinear": _Linear,
        "MergedColumnParallelLinear": MergedColumnParallelLinear,
        "RowParallelLinear": _Linear,
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
    """A context in which `import vllm` finds this, and `mor_vllm` is imported anew."""
    made = {name: ModuleType(name) for name in MODULES}
    for name, module in made.items():
        vars(module).update(MODULES[name])
        module.__path__ = []  # type: ignore[attr-defined]
    ours = [
        f"mor_vllm.{name}" for name in ("attention", "experts", "layers", "model", "projections")
    ]
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


def vllm_config(hf_config: Any, expert_parallel: bool = False) -> SimpleNamespace:
    """`VllmConfig`, as far as a model reads it."""
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, max_model_len=32),
        parallel_config=SimpleNamespace(enable_expert_parallel=expert_parallel),
        cache_config=object(),
        quant_config=None,
        additional_config={},
    )
