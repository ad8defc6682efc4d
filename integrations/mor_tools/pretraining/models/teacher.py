"""The dense model that an uptraining run starts from and learns from.

Legend: `b` batch, `s` sequence, `v` rows of the vocabulary on this rank, padding included.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from tokenizers import Tokenizer
from torch import Tensor, nn

from mor_layers import DecoderConfig
from mor_layers.weights import StoredModel, recursive_weights
from mor_megatron.checkpoints import load_tensors, megatron_view
from mor_megatron.training import vocab_parallel_divergence
from mor_tools.formats import opened
from mor_tools.pretraining.data.text import TextTokenizer
from mor_tools.pretraining.models.build import build_teacher
from mor_tools.pretraining.models.decoder import decoder_config
from mor_tools.pretraining.settings import Settings, UptrainSettings


class Teacher:
    """A frozen dense model on the last pipeline stage, next to the end of the model being trained.

    Args:
        model: sharded over the same tensor-parallel ranks, so that the logits line up.
        settings: coefficients and temperature of the loss.
        vocab_size: tokens in the vocabulary, without padding.
    """

    def __init__(self, model: GPTModel, settings: UptrainSettings, vocab_size: int) -> None:
        self.model, self.settings, self.vocab_size = model, settings, vocab_size

    def compare(
        self, logits: Float[Tensor, "b s v"], labels: Int[Tensor, "b s"], *given: Tensor | None
    ) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b s"]]:
        """Language-model loss and divergence from the teacher for each token.

        Args:
            logits: of the model being trained; overwritten.
            given: token ids, positions and attention mask.
        """
        with torch.no_grad():
            targets = self.model(*given)
        group = parallel_state.get_tensor_model_parallel_group()
        divergences = vocab_parallel_divergence(
            logits, targets, self.vocab_size, group, self.settings.temperature
        )
        # Last, because Megatron's cross entropy works in place.
        return vocab_parallel_cross_entropy(logits, labels), divergences

    def combine(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """The loss that is minimised."""
        settings = self.settings
        weighted = settings.language_model_coefficient * loss
        return weighted + settings.distillation_coefficient * divergence


def open_dense(settings: Settings, tokenizer: TextTokenizer) -> StoredModel:
    """The settings and weights of the dense model; tensors are read on demand.

    Raises:
        ValueError: it is not dense, or its sizes or tokenizer differ from those of the run.
        FileNotFoundError: the folder does not exist.
    """
    assert settings.uptrain is not None
    folder = Path(settings.uptrain.teacher)
    dense = opened(folder)
    if dense.config.recursion is not None or dense.config.moe is not None:
        raise ValueError(
            f"uptrain.teacher={folder} has a recursion or experts, but only a dense model can be "
            "made recursive. Use the folder of a dense model."
        )
    _check_tokenizer(folder, dense.config, tokenizer)
    _check_sizes(folder, dense.config, settings)
    return dense


def load_recursive(chunks: list[nn.Module], settings: Settings, dense: StoredModel) -> None:
    """Initialise this process's part of the model from the dense model's weights."""
    uptrain, recursion = settings.uptrain, settings.recursion
    assert uptrain is not None and recursion is not None
    config, weights = recursive_weights(
        dense.weights, dense.config, recursion, uptrain.initialization, settings.training.seed
    )
    load_tensors(chunks, megatron_view(weights, config))


def build(settings: Settings, dense: StoredModel | None) -> Teacher | None:
    """The teacher on ranks of the last pipeline stage; None elsewhere."""
    assert settings.uptrain is not None and dense is not None
    vocab_size = dense.config.vocab_size
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    model = build_teacher(settings, vocab_size)
    load_tensors([model], megatron_view(dense.weights, dense.config))
    return Teacher(model, settings.uptrain, vocab_size)


def _check_tokenizer(folder: Path, dense: DecoderConfig, tokenizer: TextTokenizer) -> None:
    own = folder / "tokenizer.json"
    fix = f"Set data.tokenizer={own}." if own.is_file() else "Set data.tokenizer to the teacher's."
    if dense.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"uptrain.teacher={folder} has a vocabulary of {dense.vocab_size} tokens, but the "
            f"data's tokenizer {tokenizer.path} has {tokenizer.vocab_size}. {fix}"
        )
    if own.is_file():
        try:
            ids = Tokenizer.from_file(str(own)).get_vocab()
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"{own} is not a tokenizer: {str(error)[:200]}. Replace it by the model's own."
            ) from error
        if ids != tokenizer.tokenizer.get_vocab():
            raise ValueError(
                f"uptrain.teacher={folder} assigns other ids to its tokens than the data's "
                f"tokenizer {tokenizer.path}. {fix}"
            )


_SIZES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_unrolled_layers": "num_unrolled_layers",
    "num_heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_size": "head_dim",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "rms_norm_epsilon": "rms_norm_epsilon",
    "rope_base": "rope_base",
    "tie_embeddings": "tie_embeddings",
}
"""What the two models must have in common, and the setting under `model.` for it."""


def _check_sizes(folder: Path, dense: DecoderConfig, settings: Settings) -> None:
    wanted = decoder_config(settings, dense.vocab_size)
    for name in ("latent_attention", "rope_scaling"):
        theirs, ours = getattr(dense, name), getattr(wanted, name)
        if theirs != ours:
            raise ValueError(
                f"uptrain.teacher={folder} has {name}={theirs}, and the run's model {ours}. Set "
                f"model.{name} to the teacher's, or to null if it has none."
            )
    other = [name for name in _SIZES if getattr(dense, name) != getattr(wanted, name)]
    if other:
        overrides = " ".join(f"model.{_SIZES[n]}={_plain(getattr(dense, n))}" for n in other)
        raise ValueError(
            f"uptrain.teacher={folder} has other sizes than the run's model. Set {overrides}."
        )


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return int(value) if isinstance(value, float) and value.is_integer() else value
