"""Settings of a mixture of experts."""

from dataclasses import dataclass
from typing import Literal, get_args

from mor_layers.settings import check_types, require_choice

ExpertRouters = Literal["shared", "per_step"]
DropPolicy = Literal["probability", "position"]
ExpertScores = Literal["softmax", "sigmoid"]

MOST_EXPERTS = 4096
"""Largest number of experts of a layer. Each is a module, so a larger number in a damaged file is
refused before they are built."""


@dataclass(frozen=True)
class MoEConfig:
    """Settings of a mixture of experts that replaces an MLP."""

    num_experts: int
    """Number of experts. At least 1."""
    experts_per_token: int = 2
    """Experts per token, or the largest number of them if the router over depth sets a mean."""
    ffn_hidden_size: int | None = None
    """Width of an expert. Default: that of the MLP it replaces."""
    balance_coefficient: float = 0.01
    """Weight of the balance loss. 0: none."""
    z_loss_coefficient: float = 0.001
    """Weight of the z-loss. 0: none."""
    bias_update_rate: float = 0.0
    """How far the loss-free bias of each cell moves after an optimizer step. 0: no bias."""
    capacity_factor: float | None = None
    """An expert takes at most this many times its even share of a step's assignments, rounded up, and
    the rest is dropped. None: nothing is dropped."""
    drop_policy: DropPolicy | None = None
    """Which tokens a full expert keeps: those with the largest `probability` (default), which depends
    on later tokens, or those with the earliest `position`."""
    scores: ExpertScores = "softmax"
    """How logits become the experts' scores: `softmax`, or `sigmoid`, as in DeepSeek-V3."""
    normalizes_gates: bool = True
    """Whether the gates of a token's experts are divided by their sum. A single expert's gate is not, as
    it would become a constant 1."""
    gate_scale: float = 1.0
    """What gates are multiplied by. Above 0."""
    num_groups: int = 1
    """Groups of equal size that consecutive experts form; divides `num_experts`. A token's experts come
    from the `groups_per_token` groups whose best expert has the largest score; with sigmoid scores,
    whose best two have the largest sum."""
    groups_per_token: int = 1
    """See `num_groups`. Together, these groups have at least `experts_per_token` experts."""
    shared_ffn_hidden_size: int = 0
    """Width of an expert that runs on every token in addition to those of the router. 0: none."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_experts > MOST_EXPERTS:
            raise ValueError(
                f"MoEConfig.num_experts={self.num_experts} must be at most {MOST_EXPERTS}."
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"MoEConfig.experts_per_token={self.experts_per_token} must lie in "
                f"1..num_experts={self.num_experts}."
            )
        for name in ("balance_coefficient", "z_loss_coefficient", "bias_update_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"MoEConfig.{name}={getattr(self, name)} must be 0 or more.")
        if self.ffn_hidden_size is not None and self.ffn_hidden_size < 1:
            raise ValueError(
                f"MoEConfig.ffn_hidden_size={self.ffn_hidden_size} must be at least 1."
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise ValueError(f"MoEConfig.capacity_factor={self.capacity_factor} must be above 0.")
        require_choice("MoEConfig", "scores", self.scores, get_args(ExpertScores))
        if not 0 < self.gate_scale < float("inf"):
            raise ValueError(f"MoEConfig.gate_scale={self.gate_scale} must be above 0, and finite.")
        if self.shared_ffn_hidden_size < 0:
            raise ValueError(
                f"MoEConfig.shared_ffn_hidden_size={self.shared_ffn_hidden_size} must be 0 or more."
            )
        self._check_groups()
        if self.drop_policy is None:
            return
        require_choice("MoEConfig", "drop_policy", self.drop_policy, get_args(DropPolicy))
        if self.capacity_factor is None:
            raise ValueError(
                f"MoEConfig.drop_policy={self.drop_policy!r} has no effect without "
                "capacity_factor. Leave it out, or set a capacity."
            )

    def _check_groups(self) -> None:
        """Raise ValueError if the groups cannot hold a token's experts."""
        groups, taken, experts = self.num_groups, self.groups_per_token, self.num_experts
        if groups < 1 or experts % groups:
            raise ValueError(
                f"MoEConfig.num_groups={groups} must be at least 1, and divide num_experts={experts}."
            )
        size = experts // groups
        if not 1 <= taken <= groups or taken * size < self.experts_per_token:
            raise ValueError(
                f"MoEConfig.groups_per_token={taken} must lie in 1..num_groups={groups}, and groups of "
                f"{size} experts must hold experts_per_token={self.experts_per_token}."
            )
        if groups > 1 and self.scores == "sigmoid" and size < 2:
            raise ValueError(
                f"MoEConfig.num_groups={groups} with sigmoid scores needs at least two experts in each "
                f"group. Use at most {experts // 2}, or 1."
            )

    @property
    def beyond_plain(self) -> tuple[str, ...]:
        """The settings in use that a plain softmax over experts, without any other, does not have."""
        used = {
            "scores": self.scores != "softmax",
            "normalizes_gates": not self.normalizes_gates,
            "gate_scale": self.gate_scale != 1,
            "num_groups": self.num_groups > 1,
            "shared_ffn_hidden_size": self.shared_ffn_hidden_size > 0,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    def shown_beyond_plain(self, owner: str = "MoEConfig.") -> str:
        """`beyond_plain` with their values, for messages."""
        return ", ".join(f"{owner}{name}={getattr(self, name)!r}" for name in self.beyond_plain)

    def check_mean(self, mean_experts: tuple[float, ...] | None) -> None:
        """Raise ValueError if a mean number of experts cannot be kept."""
        for mean in mean_experts or ():
            if not 1 <= mean <= self.experts_per_token or self.experts_per_token < 2:
                raise ValueError(
                    f"mean_experts={mean} must lie in 1..experts_per_token="
                    f"{self.experts_per_token}, which must be 2 or more."
                )
