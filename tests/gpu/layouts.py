"""Checks of ranks over NCCL: a layout gives one rank's losses and gradients."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mor_layers import RecursionConfig
from mor_megatron import recursion_block_spec
from tests.distributed import megatron_setup as setup
from tests.gpu.layers import BATCH, LENGTH, compared, local_layer


def layout_equals_one_rank(
    recursion: RecursionConfig, layout: dict[str, int], **settings: Any
) -> dict[str, Any]:
    """Every rank first computes all of the batch by itself, then all of them together."""
    setup.initialize()
    tokens = setup.random_tokens(BATCH, LENGTH)
    spread = settings.pop("sequence_parallel", False)
    (alone,) = _model(recursion, settings)
    microbatches = tokens.split(1)
    reports = get_forward_backward_func()(
        forward_step_func=setup.forward_step,
        data_iterator=iter(microbatches),
        model=[alone],
        num_microbatches=len(microbatches),
        seq_length=LENGTH,
        micro_batch_size=1,
    )
    expected = (sum(reports) / len(reports)).item(), setup.gather_gradients([alone])
    parallel_state.destroy_model_parallel()
    setup.initialize(**layout)
    chunks = setup.data_parallel(_model(recursion, settings | {"sequence_parallel": spread}))
    loss = setup.forward_backward(chunks, tokens, 1)
    return compared(expected, (loss, setup.gather_gradients(chunks)), 1e-4, 0.99999)


def _model(recursion: RecursionConfig, settings: dict[str, Any]) -> list[GPTModel]:
    config = setup.tiny_config(num_layers=8, **settings)

    def block(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        return recursion_block_spec(config, recursion, local_layer(config), vp_stage)

    return setup.tiny_gpt(config, block)
