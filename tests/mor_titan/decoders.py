"""The models of `configs`, for processes that do not prepare torchtitan for CPUs."""

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoEConfig,
    RecursionConfig,
    TokenChoice,
)

DECODERS = {
    "expert_choice": DecoderConfig(
        vocab_size=2048,
        hidden_size=64,
        ffn_hidden_size=160,
        num_unrolled_layers=8,
        num_heads=4,
        recursion=RecursionConfig(3, router=ExpertChoice(warmup_steps=20)),
    ),
    "experts": DecoderConfig(
        vocab_size=2048,
        hidden_size=32,
        ffn_hidden_size=64,
        num_unrolled_layers=5,
        num_heads=4,
        tie_embeddings=True,
        recursion=RecursionConfig(3, router=TokenChoice(balancing="loss_free")),
        # Losses of experts are means over a rank's own tokens of a step, which are not one rank's.
        moe=MoEConfig(
            4,
            2,
            ffn_hidden_size=48,
            balance_coefficient=0.0,
            z_loss_coefficient=0.0,
            bias_update_rate=0.01,
        ),
    ),
}
