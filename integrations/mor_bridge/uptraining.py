"""A dense Llama or Qwen, opened as the recursive model that its weights start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict
from torch import Tensor

from mor_huggingface import MoRConfig
from mor_huggingface.checkpoints.llama import open_llama
from mor_layers import RecursionConfig
from mor_layers.weights import SAFETENSORS, Initialization, dtype_name, recursive_weights


def recursive_bridge(
    folder: str | Path,
    recursion: RecursionConfig,
    initialization: Initialization = "stepwise",
    seed: int = 0,
) -> AutoBridge:
    """The bridge of a dense checkpoint, as if its folder held a recursive model made from it.

        bridge = recursive_bridge("SmolLM-360M", RecursionConfig(3, router=ExpertChoice()))
        model = bridge.to_megatron_model(wrap_with_ddp=False)
        bridge.save_hf_pretrained(model, "recursive")  # a model folder of ours

    Its tensors are made from those of the checkpoint one by one, as they are read.

    Args:
        folder: a Llama, Mistral, Qwen2 or Qwen3 checkpoint.
        recursion: the recursion that its layers are divided into.
        initialization: how shared layers are made from those that they replace.
        seed: of what is new, such as the router.

    Raises:
        ValueError: the checkpoint has a setting that is not supported, or its layers cannot be divided
            in this way.
        FileNotFoundError: the folder does not exist.
    """
    return AutoBridge(_RecursiveCausalLM(Path(folder), recursion, initialization, seed))


class _RecursiveCausalLM(PreTrainedCausalLM):
    """What Megatron-Bridge takes a folder's config, tensors and tokenizer from."""

    def __init__(
        self, folder: Path, recursion: RecursionConfig, initialization: Initialization, seed: int
    ) -> None:
        super().__init__(folder)
        dense = open_llama(folder)
        config, weights = recursive_weights(
            dense.weights, dense.config, recursion, initialization, seed
        )
        self.config = MoRConfig.from_decoder(
            config, architectures=["MoRForCausalLM"], dtype=dtype_name(dense), **dense.facts
        )
        self._state_dict_accessor = StateDict(_MadeTensors(folder, weights))

    def save_artifacts(
        self,
        save_directory: str | Path,
        original_source_path: str | Path | None = None,
        additional_files: list[str] | None = None,
    ) -> None:
        """Save config and tokenizer. The checkpoint's own config.json is not copied over the former."""
        others = [name for name in additional_files or () if name != "config.json"]
        super().save_artifacts(save_directory, original_source_path, others)


class _MadeTensors(SafeTensorsStateSource):
    """Tensors that are made when they are read, and saved into one file."""

    def __init__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        super().__init__(folder)
        self._weights = {f"model.{name}": name for name in weights}
        self._made = weights

    @property
    def key_to_filename_map(self) -> dict[str, str]:
        return dict.fromkeys(self._weights, SAFETENSORS)

    def get_all_keys(self) -> list[str]:
        return list(self._weights)

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, Any]:
        return {key: self._made[self._weights[key]] for key in keys_to_load}

    def has_glob(self, pattern: str) -> bool:
        return bool(StateDict(dict.fromkeys(self._weights))._match_keys(pattern))  # type: ignore[arg-type]
