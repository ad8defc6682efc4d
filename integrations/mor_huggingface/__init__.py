"""Mixture-of-Recursions models in Hugging Face's transformers.

Importing this package lets AutoConfig and AutoModelForCausalLM load a folder of
`mor_layers.weights.folder`. `checkpoints` reads and writes those of published models.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from mor_huggingface.cache import MoRCache
from mor_huggingface.modeling import MoRConfig, MoRForCausalLM
from mor_huggingface.training import RouterUpdates
from mor_layers.moved import keep_old_modules

AutoConfig.register(MoRConfig.model_type, MoRConfig)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)

__all__ = ["MoRCache", "MoRConfig", "MoRForCausalLM", "RouterUpdates"]

# Import paths of version 0.1.
keep_old_modules(__name__, {"llama": ("checkpoints.llama",)})
