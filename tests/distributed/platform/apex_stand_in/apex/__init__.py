"""NVIDIA's apex as far as Megatron and this repository use it, on a CPU; for tests only.

Names, files, signatures and where the optimizer keeps its step count are those of NVIDIA's; the
arithmetic is plain PyTorch.
"""
