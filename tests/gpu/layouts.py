"""Checks of ranks over NCCL: a layout gives one rank's losses and gradients. And the speed of a step."""

import time
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mor_layers import RecursionConfig
from mor_megatron import recursion_block_spec
from mor_megatron.models import final_norm
from tests.distributed import megatron_setup as setup
from tests.distributed.platform.engine_models import engine_layer
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


def speed_of_a_step(
    recursion: RecursionConfig,
    engine: bool,
    hidden_size: int,
    length: int,
    num_layers: int,
    steps: int = 10,
    **settings: Any,
) -> dict[str, Any]:
    """Milliseconds of forward and backward passes in bf16, against the plain stack of equal depth."""
    setup.initialize()
    times = {}
    for name in ("plain", "recursive"):
        heads = max(4, hidden_size // 64)
        config = setup.tiny_config(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=heads,
            num_query_groups=heads,
            ffn_hidden_size=4 * hidden_size,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            **settings,
        )

        def block(config: Any, vp_stage: int | None, name: str = name) -> Any:
            layer = engine_layer(config) if engine else local_layer(config)
            if name == "recursive":
                return recursion_block_spec(config, recursion, layer, vp_stage)
            return TransformerBlockSubmodules([layer] * num_layers, final_norm(layer))

        chunks = setup.data_parallel(setup.tiny_gpt(config, block))
        tokens = setup.random_tokens(2, length)
        for step in range(steps + 3):
            if step == 3:  # warm by then
                _finish()
                begin = time.perf_counter()
            setup.forward_backward(chunks, tokens, 2)
        _finish()
        times[name] = 1000 * (time.perf_counter() - begin) / steps
        del chunks
    tokens_per_second = 2 * length / times["recursive"] * 1000
    return {
        "ms plain": times["plain"],
        "ms recursive": times["recursive"],
        "ratio": times["recursive"] / times["plain"],
        "tokens/s": tokens_per_second,
    }


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
