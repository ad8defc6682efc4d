"""Generation with a model that Megatron trained: a rank's part of it, for the engine."""

from megatron.core import parallel_state
from torch import nn

from mor_layers import DecoderConfig, MoRTransformer
from mor_layers.generation import shard
from mor_layers.weights import state_of
from mor_megatron.checkpoints.weights import decoder_tensors, whole_tensors


def tensor_parallel_decoder(chunks: list[nn.Module], config: DecoderConfig) -> MoRTransformer:
    """What this rank of the tensor-parallel group runs in a `LockstepEngine` over that group.

    Every rank calls it, and holds the whole weights for a moment.

    Args:
        chunks: of a model whose vocabulary has no padding, in any layout.
        config: the same model in plain PyTorch.

    Raises:
        ValueError: the weights are not those of `config`, or heads do not divide by the ranks.
    """
    tensors = whole_tensors(chunks, on_all_ranks=True)
    assert tensors is not None
    model = MoRTransformer(config)
    model.load_state_dict(state_of(config, decoder_tensors(tensors, config)))
    model.to(next(chunks[0].parameters()).device)
    group = parallel_state.get_tensor_model_parallel_group()
    return model if group.size() == 1 else shard(model, group)
