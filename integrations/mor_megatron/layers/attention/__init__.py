"""Attention of a recursion's steps: of Megatron's two kinds, over the selected tokens, and its core."""
