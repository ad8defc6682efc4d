"""AbsorbedLayer: an entry that keeps Megatron's numbers of layers right beside a recursion."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor


class AbsorbedLayer(TransformerLayer):
    """An entry in the list of layers whose work is done by the RecursionLayer before it.

    Megatron counts the layers, and derives stages and checkpoint keys from their numbers. With one
    entry per unrolled layer, all of these numbers are right without further changes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        GraphableMegatronModule.__init__(self, config=config, vp_stage=vp_stage)
        pp_group = None if pg_collection is None else pg_collection.pp
        offset = get_transformer_layer_offset(config, vp_stage, get_pg_rank(pp_group))
        self.layer_number = layer_number + offset
        self.is_mtp_layer = self.is_moe_layer = False

    def create_mcore_cudagraph_manager(self, config: TransformerConfig) -> None:
        """Nothing: there is nothing to capture."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return hidden_states, context

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: this layer has no parameters."""
        return {}
