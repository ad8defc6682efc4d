"""Mixture-of-Recursions models in NVIDIA's Megatron-Bridge.

Importing this package registers the bridge of our model folders, so that `AutoBridge` turns a folder
into a Megatron GPTModel with recursions, and back.
"""

from mor_bridge.bridge import MoRBridge
from mor_bridge.provider import MoRModelProvider
from mor_bridge.uptraining import recursive_bridge

__all__ = ["MoRBridge", "MoRModelProvider", "recursive_bridge"]
