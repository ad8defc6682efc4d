"""Recipes of mor_bridge describe the models that they name."""

from dataclasses import replace

from mor_layers import DecoderConfig
from mor_megatron.platform import bridge_on_cpu
from mor_tools.recipes import recipe


def test_the_360m_recipe_is_that_of_the_catalog() -> None:
    bridge_on_cpu.enable()
    from mor_bridge.provider import MoRModelProvider
    from mor_bridge.recipes import mor_360m_pretrain_config

    config, settings = mor_360m_pretrain_config(), recipe("mor_360m").settings
    provider, model = config.model, settings.model
    assert isinstance(provider, MoRModelProvider)
    assert provider.recursion_config == settings.recursion
    expected = MoRModelProvider.from_decoder(
        DecoderConfig(
            settings.data.vocabulary_size,
            model.hidden_size,
            model.ffn_hidden_size,
            model.num_unrolled_layers,
            model.num_heads,
            model.num_kv_heads,
            tie_embeddings=model.tie_embeddings,
            recursion=settings.recursion,
        ),
        provider.params_dtype,
        settings.data.sequence_length,
    )
    assert replace(provider) == replace(expected)
    training = settings.training
    assert (config.train.train_iters, config.train.global_batch_size) == (
        training.steps,
        training.global_batch_size,
    )
    assert config.optimizer.lr == training.learning_rate
    assert config.scheduler.lr_warmup_iters == training.warmup_steps
    assert config.tokenizer.vocab_size == settings.data.vocabulary_size - 1
