"""Mixture-of-Recursions models in Hugging Face's transformers.

Importing this package lets AutoConfig and AutoModelForCausalLM load a folder of
`mor_layers.weights.folder`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from mor_huggingface.cache import MoRCache
from mor_huggingface.modeling import MoRConfig, MoRForCausalLM
from mor_huggingface.training import RouterUpdates

AutoConfig.register(MoRConfig.model_type, MoRConfig)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)

__all__ = ["MoRCache", "MoRConfig", "MoRForCausalLM", "RouterUpdates"]
