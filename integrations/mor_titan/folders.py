"""torchtitan's checkpoints in the Hugging Face format as model folders of ours."""

import json
from pathlib import Path
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from mor_layers import DecoderConfig, to_mapping
from mor_layers.weights import CONFIG, MODEL_TYPE, SETTINGS, open_tensors, side_files


class MoRStateDictAdapter(StateDictAdapter):
    """Names in a model folder are those of the model, so nothing is converted; a tied head is left out."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        decoder = self.model_config.decoder_config  # type: ignore[attr-defined]
        left_out = {"model.output.weight"} if decoder.tie_embeddings else set()
        return {name: value for name, value in state_dict.items() if name not in left_out}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(hf_state_dict)
        decoder = self.model_config.decoder_config  # type: ignore[attr-defined]
        if decoder.tie_embeddings:
            state["model.output.weight"] = state["model.embedding.weight"]
        return state


def complete_folder(folder: Path, decoder: DecoderConfig, assets: Path | None = None) -> None:
    """Add what a model folder has beside tensors to a checkpoint saved with `last_save_in_hf`.

    Args:
        folder: the folder of the last step, such as `outputs/checkpoint/step-100`.
        decoder: the settings of the model.
        assets: the run's `hf_assets_path`, from which the tokenizer's files are copied.

    Raises:
        ValueError: the folder has no tensors.
    """
    dtype = str(open_tensors(folder)["model.embedding.weight"].dtype).removeprefix("torch.")
    values = {
        "model_type": MODEL_TYPE,
        "architectures": ["MoRForCausalLM"],
        "dtype": dtype,
        "tie_word_embeddings": decoder.tie_embeddings,
        SETTINGS: to_mapping(decoder),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for path in side_files(assets) if assets is not None else ():
        (folder / path.name).write_bytes(path.read_bytes())
