"""Largest sizes of a model. Settings beyond them are taken for mistakes and refused at once."""

MOST_LAYERS = 4096
"""Largest number of layers, and of recursions, of a model. Layers are modules, which take time to
build even without tensors, so larger numbers are taken for a mistake and refused at once."""
MOST_NUMBERS = 2**24
"""Largest width of a layer. Up to it, the number of elements of any tensor fits into 64 bits."""
MOST_TOKENS = 2**31 - 1
"""Largest vocabulary: ids are stored in 32 bits."""
