"""Models small enough for the loops of `tests.oracles.loops`, and what else several tests need."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoRTransformer,
    RandomDepth,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_layers.recursion import KVPolicy, Sharing

VOCAB_SIZE = 17
HIDDEN_SIZE = 12

ROUTERS: dict[str, RouterConfig] = {
    "fixed_depth": FixedDepth(),
    "random_depth": RandomDepth(),
    "expert_choice": ExpertChoice(alpha=0.7, z_loss_coefficient=0.01),
    "expert_choice_first_step_too": ExpertChoice(
        activation="tanh", capacity_factors=(0.8, 0.5, 0.3), predictor="aux_router"
    ),
    "token_choice": TokenChoice(z_loss_coefficient=0.01),
}
KV_POLICIES: tuple[KVPolicy, ...] = ("recursion_wise", "recursive_sharing", "sharing_with_update")


def small_config(
    router: RouterConfig | None = None,
    num_recursions: int = 3,
    sharing: Sharing = "middle_cycle",
    kv_policy: KVPolicy = "recursion_wise",
    share_norms: bool = True,
    block_size: int = 1,
    ends: tuple[int, int] | None = None,
) -> DecoderConfig:
    """A decoder of `block_size` shared layers; `ends`: layers before and after the recursion."""
    before, after = ends or (None, None)
    num_ends = (2 if sharing.startswith("middle") else 0) if ends is None else sum(ends)
    return DecoderConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        ffn_hidden_size=10,
        num_unrolled_layers=block_size * num_recursions + num_ends,
        num_heads=2,
        num_kv_heads=1,
        recursion=RecursionConfig(
            num_recursions,
            sharing,
            router or FixedDepth(),
            kv_policy,
            share_norms,
            prelude_layers=before,
            coda_layers=after,
        ),
    )


def plain_config(num_layers: int) -> DecoderConfig:
    """The same decoder without recursion."""
    return replace(small_config(), num_unrolled_layers=num_layers, recursion=None)


def small_model(config: DecoderConfig, seed: int = 0, recompute: bool = False) -> MoRTransformer:
    """A model whose weights are large enough for every part of it to matter."""
    return randomized(MoRTransformer(config, recompute), seed)


def randomized[M: nn.Module](module: M, seed: int = 0) -> M:
    """The module with random weights of about unit gain; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1]
            parameter.copy_(values / fan_in**0.5 if parameter.dim() > 1 else 1 + 0.2 * values)
    return module


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids `[b s]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (batch, length), generator=generator)


def random_states(length: int, batch: int, hidden: int = HIDDEN_SIZE, seed: int = 0) -> Tensor:
    """Hidden states `[s b h]`, a leaf that wants gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, batch, hidden, generator=generator).requires_grad_()


def column(*values: int) -> Tensor:
    """`[s 1]`."""
    return torch.tensor(values)[:, None]


def columns(*sequences: Iterable[int]) -> Tensor:
    """`[s b]` from one list per sequence."""
    return torch.tensor([list(sequence) for sequence in sequences]).T


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradient of each parameter by name; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


def differentiable(module: nn.Module) -> dict[str, Tensor]:
    """The module's state as an oracle takes it: fresh leaves that want gradients, and buffers."""
    trained = {name for name, _ in module.named_parameters()}
    return {
        name: tensor.detach().clone().requires_grad_(name in trained)
        for name, tensor in module.state_dict().items()
    }


def oracle_gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of `differentiable` weights by name; zeros where there is none."""
    return {
        name: torch.zeros_like(w) if w.grad is None else w.grad
        for name, w in weights.items()
        if w.requires_grad
    }
