"""Converts a model trained with Megatron to a tensor-parallel PyTorch model for generation."""

from megatron.core import parallel_state
from torch import nn

from mor_layers import DecoderConfig, MoRTransformer
from mor_layers.generation import shard
from mor_layers.weights import state_of
from mor_megatron.checkpoints.shards import whole_tensors
from mor_megatron.checkpoints.weights import decoder_tensors


def tensor_parallel_decoder(chunks: list[nn.Module], config: DecoderConfig) -> MoRTransformer:
    """This rank's part of the model, for a `LockstepEngine` over the tensor-parallel group.

    All ranks must call it. Each needs memory for the whole weights during the conversion.

    Args:
        chunks: chunks of a model in any layout. Its vocabulary must not be padded.
        config: settings of the same model in plain PyTorch.

    Raises:
        ValueError: the weights do not fit `config`, or the number of heads is not divisible by the
            number of ranks.
    """
    tensors = whole_tensors(chunks, on_all_ranks=True)
    assert tensors is not None
    model = MoRTransformer(config)
    model.load_state_dict(state_of(config, decoder_tensors(tensors, config)))
    model.to(next(chunks[0].parameters()).device)
    group = parallel_state.get_tensor_model_parallel_group()
    return model if group.size() == 1 else shard(model, group)
