"""The layer that takes the place of an MLP: route -> dispatch -> compute -> combine.

Legend: `b` batch, `k` tokens that run a step, `t` = `k · b`, `h` hidden.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor_layers.layers.moe.config import ExpertRouters, MoEConfig
from mor_layers.layers.moe.experts import Experts, SharedExpert
from mor_layers.layers.moe.router import ExpertRouter
from mor_layers.recursion import ExpertUse, Products


class MoE(nn.Module):
    """A mixture of experts that replaces an MLP. The other arguments are those of `ExpertRouter`.

    Args:
        ffn_hidden_size: width of an expert if the settings do not give it.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        config: MoEConfig,
        num_steps: int = 1,
        routers: ExpertRouters = "shared",
        mean_experts: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        width = config.ffn_hidden_size or ffn_hidden_size
        self.router = ExpertRouter(hidden_size, config, num_steps, routers, mean_experts)
        self.experts = Experts(config.num_experts, hidden_size, width)
        self.shared: SharedExpert | None = None
        if config.shared_ffn_hidden_size:
            self.shared = SharedExpert(hidden_size, config.shared_ffn_hidden_size)

    def forward(
        self,
        hidden: Float[Tensor, "k b h"],
        step: int | Int[Tensor, "k b"] = 0,
        is_padding: Bool[Tensor, "k b"] | None = None,
        products: Products | None = None,
        has_static_shapes: bool = False,
    ) -> tuple[Float[Tensor, "k b h"], ExpertUse]:
        """The layer's output. Experts of the router add nothing to padding, and to tokens that all of
        them dropped.

        Args:
            products: computes the experts in generation.
            has_static_shapes: whether shapes must not depend on the choice of experts, see
                `Experts.of_all`.
        """
        rows = hidden.flatten(0, 1)
        padding = None if is_padding is None else is_padding.flatten()
        step = step if isinstance(step, int) else step.expand(hidden.shape[:2]).flatten()
        assignment, use = self.router(rows, step, padding)
        if has_static_shapes:
            output = self.experts.of_all(rows, assignment, products)
        else:
            output = self.experts(rows, assignment, products)
        if self.shared is not None:
            output = output + self.shared(rows, products)
        return output.view_as(hidden), use
