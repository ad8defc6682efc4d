"""The bridge between a model folder and a Megatron GPTModel with recursions."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.models.gpt import GPTModel
from torch import Tensor

import mor_huggingface  # noqa: F401 registers MoRConfig, with which AutoBridge reads the folder
from mor_bridge.mappings import mappings
from mor_bridge.numbering import number_outer_layers_only
from mor_bridge.provider import MoRModelProvider
from mor_layers.weights import MODEL_TYPE

_VOCABULARY = ("model.embedding.weight", "model.output.weight")


@MegatronModelBridge.register_bridge(
    # By name, because Megatron-Bridge looks for classes in transformers only.
    source="MoRForCausalLM",
    target=GPTModel,
    provider=MoRModelProvider,
    model_type=MODEL_TYPE,
)
class MoRBridge(MegatronModelBridge):
    """Converts a folder that `mor_layers.weights.save_model` wrote, and the model made from it.

    It is not used directly, but through `AutoBridge`:

        import mor_bridge
        from megatron.bridge import AutoBridge

        bridge = AutoBridge.from_hf_pretrained("model_folder")
        model = bridge.to_megatron_model(wrap_with_ddp=False)
        bridge.save_hf_pretrained(model, "exported")
    """

    ADDITIONAL_FILE_PATTERNS: ClassVar = ["config.json", "tokenizer*", "chat_template.jinja"]
    """Files that are copied instead of being written anew, which would add defaults to them."""

    def provider_bridge(self, hf_pretrained: Any) -> MoRModelProvider:
        """The provider for the model of a folder, with the data type of its weights.

        Raises:
            ValueError: Megatron does not support a setting.
        """
        config = hf_pretrained.config
        return MoRModelProvider.from_decoder(
            config.decoder_config,
            params_dtype=self.dtype_from_hf(config),
            seq_length=getattr(config, "max_position_embeddings", None),
        )

    def build_conversion_tasks(
        self,
        hf_pretrained: Any,
        megatron_model: list[Any],
        weight_dtype: torch.dtype | None = None,
    ) -> list[Any]:
        """What to convert. Megatron-Bridge itself only warns of what it leaves out.

        Raises:
            ValueError: a parameter has no place in the folder, or the folder lacks one of its tensors.
        """
        tasks = super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype)
        if any(task is None for task in tasks):
            raise ValueError(
                "the Megatron model has parameters that a model folder has no place for (see the "
                "warnings above), so they would stay random. Use only settings of a DecoderConfig."
            )
        if hasattr(hf_pretrained, "state"):
            held = set(hf_pretrained.state.source.get_all_keys())
            names = [task.mapping.hf_param for task in tasks]
            wanted = {
                n for name in names for n in ([name] if isinstance(name, str) else name.values())
            }
            if missing := sorted(wanted - held):
                raise ValueError(
                    f"{hf_pretrained.model_name_or_path} has no tensor {missing[0]!r} "
                    f"({len(missing)} are missing). Check that its config.json is that of these weights."
                )
        return tasks

    def maybe_modify_converted_hf_weight(
        self,
        task: Any,
        converted_weights_dict: dict[str, Tensor],
        hf_state_dict: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Cut the rows that pad the vocabulary."""
        assert self.hf_config is not None
        rows = self.hf_config.vocab_size
        return {
            name: tensor[:rows] if name in _VOCABULARY else tensor
            for name, tensor in converted_weights_dict.items()
        }

    def mapping_registry(self) -> MegatronMappingRegistry:
        """A mapping for each of Megatron's parameters, by its name."""
        assert self.hf_config is not None, "AutoBridge gives each bridge the config of its model"
        return MegatronMappingRegistry(*mappings(self.hf_config.decoder_config))


number_outer_layers_only()
