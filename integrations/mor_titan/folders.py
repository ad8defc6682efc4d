"""torchtitan's checkpoints as model folders of ours."""

import warnings
from pathlib import Path

from torch.distributed.checkpoint.state_dict_loader import load

from mor_layers import DecoderConfig, MoRTransformer
from mor_layers.weights import save_model

_PREFIX = "model."  # the attribute of MoRModel that holds the MoRTransformer


def save_folder(
    checkpoint: Path, folder: Path, decoder: DecoderConfig, tokenizer: Path | None = None
) -> None:
    """Write the model of a checkpoint as a model folder. One process is enough, for any number of ranks.

    Args:
        checkpoint: the folder of a step, such as `outputs/checkpoint/step-100`.
        folder: the model folder. An existing one is replaced.
        decoder: the settings of the model.
        tokenizer: a tokenizer.json to copy into the folder.

    Raises:
        torch.distributed.checkpoint.CheckpointException: the checkpoint is of another model.
    """
    model = MoRTransformer(decoder)
    state = {f"{_PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        load(state, checkpoint_id=str(checkpoint), no_dist=True)
    save_model(model, folder, tokenizer)
