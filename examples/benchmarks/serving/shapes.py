"""Models of the shapes that benchmarks of generation serve, with random weights."""

from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig
from mor_layers.recursion import KVPolicy

SHAPES = {  # hidden, query heads, key-value heads, MLP, layers that a plain model has
    "small": (192, 6, 2, 512, 18),
    "135M": (576, 9, 3, 1536, 30),
    "360M": (960, 15, 5, 2560, 34),
    "1.7B": (2048, 32, 32, 8192, 26),
}


def decoder_config(
    shape: str, vocabulary: int, steps: int, policy: KVPolicy, layers: int | None = None
) -> DecoderConfig:
    """A model of the shape.

    Args:
        steps: recursions; 1 for the plain model.
        layers: of the plain model, instead of those of the shape. A recursion gets as many more as its
            steps need to divide them.
    """
    hidden, heads, kv_heads, ffn, own_layers = SHAPES[shape]
    layers, recursion = layers or own_layers, None
    if steps > 1:
        recursion = RecursionConfig(steps, "middle_cycle", ExpertChoice(), policy)
        layers += -(layers - 2) % steps
    return DecoderConfig(vocabulary, hidden, ffn, layers, heads, kv_heads, recursion=recursion)
