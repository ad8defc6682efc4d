"""MoRTransformer as a model of torchtitan.

Legend: `b` batch, `s` sequence, `v` vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import functional as F
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.config import CompileConfig
from torchtitan.protocols.model import BaseModel

from mor_layers import DecoderConfig, MoRTransformer, from_mapping, to_mapping
from mor_layers.costs import ModelShape, account
from mor_layers.weights import load_model
from mor_titan.tensor_parallel import require_divisible


class MoRModel(BaseModel):
    """A MoRTransformer with the interface that torchtitan's Trainer calls.

    Names of its tensors are those of a model folder. It returns the loss of the routers beside the
    logits, for `MoRLoss`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """The settings of the model."""

        decoder: dict[str, Any] = field(default_factory=dict)
        """`to_mapping` of a DecoderConfig."""
        seed: int = 0
        """Of the initial weights, which are the same for any number of ranks."""
        initial_weights: str | None = None
        """A model folder to take the weights from instead."""

        @classmethod
        def from_decoder(cls, decoder: DecoderConfig) -> "MoRModel.Config":
            """The settings of a model with this decoder."""
            return cls(decoder=to_mapping(decoder))

        @property
        def decoder_config(self) -> DecoderConfig:
            """The decoder."""
            return from_mapping(DecoderConfig, self.decoder, "decoder")

        def update_from_config(self, *, config: Any, **unused: Any) -> None:
            """Refuse settings of the run that the model does not support.

            Raises:
                ValueError: for the first such setting.
            """
            self.seed = config.debug.seed or 0
            if self.decoder_config.multi_token_prediction is not None:
                raise ValueError(
                    "multi_token_prediction is not trained by torchtitan, whose loss sees the logits of "
                    "the next token only. Leave it out, or train with the PyTorch or Megatron model."
                )
            if any(recursion.loop_loss for recursion in self.decoder_config.recursions):
                raise ValueError(
                    "loop_loss needs the labels inside the model, which torchtitan gives to the loss "
                    "function only. Leave it out, or train with Megatron or the Trainer."
                )
            require_supported(config)
            degree = config.parallelism.tensor_parallel_degree
            if degree > 1:
                require_divisible(self.decoder_config, degree)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and FLOPs of training per token.

            Where settings do not say how many tokens a router keeps, all of them count.
            """
            count = sum(parameter.numel() for parameter in model.parameters())
            shape = ModelShape.from_decoder(self.decoder_config)
            routed = [stack for stack in shape.stacks if stack.router]
            tokens = None
            if any(stack.router.capacity_factors is None for stack in routed):
                tokens = [seq_len] * sum(stack.num_recursions for stack in routed)
            return count, int(account(shape, seq_len, tokens).flops_per_token())

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = MoRTransformer(config.decoder_config)

    def verify_module_protocol(self) -> None:
        """Do nothing: the modules inside are those of mor_layers, which initialise themselves."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Fill parameters and buffers, which are empty until now, also if they are sharded."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.config.seed)
            folder = self.config.initial_weights
            made = (
                MoRTransformer(self.config.decoder_config) if folder is None else load_model(folder)
            )
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, made.state_dict(), options=whole)
        own = dict(self.model.named_buffers())
        for name, buffer in made.named_buffers():  # a state dict has only those that are saved
            own[name].copy_(buffer)

    def forward(
        self, ids: Int[Tensor, "b s"], positions: Int[Tensor, "b s"] | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        """Logits `[b s v]`, and the loss of the routers in training, a mean over tokens.

        Args:
            ids: token ids.
            positions: of each token in its document, as torchtitan's data loaders give them. Tokens
                attend to, and compete with, tokens of their own document only.
        """
        documents = None if positions is None else (positions == 0).cumsum(dim=1)
        output = self.model(ids, documents=documents)
        router_loss = output.logits.new_zeros(())
        for loss in output.losses.values() if self.training else ():
            router_loss = router_loss + loss
        return output.logits, router_loss


class MoRLoss(BaseLoss):
    """Cross-entropy, and the losses of routers over depth and over experts.

    A rank's router loss is a mean over its tokens, so it counts by the rank's share of the batch.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """There is nothing to set: routers have the coefficients of their losses."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.config = config

    def __call__(
        self,
        pred: tuple[Tensor, Tensor],
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, router_loss = pred
        count = (labels != IGNORE_INDEX).sum()
        total = F.cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            reduction="sum",
            ignore_index=IGNORE_INDEX,
        )
        total = total + router_loss * count
        # Validation asks for the sum, and divides by the tokens of all its batches.
        return total if global_valid_tokens is None else total / global_valid_tokens, {}


def require_supported(config: Any) -> None:
    """Raise ValueError if a setting of the run needs what this integration does not have."""
    parallelism = config.parallelism
    for name in ("pipeline", "context", "expert"):
        degree = getattr(parallelism, f"{name}_parallel_degree")
        if degree > 1:
            raise ValueError(
                f"parallelism.{name}_parallel_degree={degree} is not supported by mor_titan, which "
                "has FSDP2 and tensor parallelism. Set it to 1, or train with Megatron (mor_megatron)."
            )
    if parallelism.tensor_parallel_degree > 1 and parallelism.enable_sequence_parallel:
        raise ValueError(
            "parallelism.enable_sequence_parallel=True is not supported by mor_titan, in which states "
            "between layers are whole on every tensor-parallel rank. Set "
            "--parallelism.no-enable_sequence_parallel, or train with Megatron (mor_megatron)."
        )
    if parallelism.spmd_backend != "partial_dtensor":
        raise ValueError(
            f"parallelism.spmd_backend={parallelism.spmd_backend!r} needs annotations that the model "
            "does not have. Set it to 'partial_dtensor'."
        )
    if config.compile.enable:
        raise ValueError("compile.enable is not supported by mor_titan. Leave it out.")
    if not config.training.disable_cuda_graphs:
        raise ValueError(
            "CUDA graphs need fixed shapes, which a router does not give. Set "
            "training.disable_cuda_graphs."
        )
