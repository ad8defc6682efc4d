"""Mixture-of-Recursions models in torchtitan: `--module mor_titan --config mor_debugmodel`.

Importing this package imports nothing, so that `mor_titan.on_cpu` can prepare torchtitan first.
"""
