"""A recursive decoder for vLLM's model runner. Only vLLM loads this module, see `plugin`.

Every layer of the block is built once and attends at each of its depths, see `mor_vllm.attention`.
Modules have the names of a MoRTransformer's, so that a folder's weights are found by name (except
for `gate` and `up`, which are one matrix here).

Legend: `t` tokens of a batch, from any requests; `h` hidden.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile  # type: ignore[import-not-found]
from vllm.config import VllmConfig  # type: ignore[import-not-found]
from vllm.distributed import get_tensor_model_parallel_world_size  # type: ignore[import-not-found]
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # type: ignore[import-not-found]
from vllm.model_executor.layers.vocab_parallel_embedding import (  # type: ignore[import-not-found]
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader  # type: ignore[import-not-found]

from mor_layers import DecoderConfig, RecursionBlock, RoutingDecision, Tokens
from mor_layers.generation.depth import turn_dial
from mor_layers.weights import weight_names
from mor_vllm.attention import KeysAndValues, ServedStep, norms
from mor_vllm.layers import StepLayers
from mor_vllm.plugin import FIRST_STEP, dial_of, hides_rows, require_servable
from mor_vllm.precision import in_fp32
from mor_vllm.projections import StepProjection, place_of_projection

HEADS = "prediction_heads."
"""Begins the names of tensors of multi-token prediction."""


class MaskedRecursion(RecursionBlock):
    """Runs every token through every step; a token that has exited keeps its state.

    Each token counts as a sequence of its own, and a decision keeps its only row, if necessary as
    padding. Therefore nothing is gathered, shapes are those of the batch whatever the router
    decides, and nothing synchronises with the device.
    """

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "t h"], tokens: Tokens
    ) -> Float[Tensor, "t h"]:
        rows = origin = self.begin(hidden[None])  # [t h] -> [1 t h], or [1 t nh] with streams
        decision = RoutingDecision.everything(tokens)
        first: KeysAndValues = {}
        for step in range(self.router.num_recursions):
            decision = self.route(rows, step, decision, causal=True, assess=False)
            kept = self.end(rows)[0] if self.kv_policy == "exit_state" else None
            context = ServedStep(step, decision.tokens, first, kept)
            output = self.run_layers(self.enter(step, rows, origin)[0], context)[None]
            rows = self.combine(step, rows, output, decision, origin)
        return self.end(rows)[0]


# All steps together are one graph, because no shape depends on a router.
@support_torch_compile(dynamic_arg_dims={"hidden": 0, "positions": 0})
class MoRModel(nn.Module):
    """The decoder, including its output matrix."""

    def __init__(self, *, config: DecoderConfig, vllm_config: Any) -> None:
        super().__init__()
        recursion, schedule = config.effective_recursion, config.schedule
        steps, size, before = recursion.num_recursions, schedule.block_size, schedule.prelude

        def block(depths: list[list[int]]) -> MaskedRecursion:
            with in_fp32():  # routers score in fp32, and their buffers must not be rounded
                router = recursion.router.build(config.hidden_size, steps)
            added = recursion.build_step_input(config.hidden_size, config.rms_norm_epsilon)
            layers = StepLayers(config, depths, vllm_config, config.moe is not None)
            return MaskedRecursion(
                layers,
                router,
                recursion.kv_policy,
                step_input=added,
                streams=recursion.build_streams(config.hidden_size),
            )

        if schedule.is_cyclic:
            runs = [[[before + r * size + j for r in range(steps)] for j in range(size)]]
        else:
            runs = [[[before + j * steps + r for r in range(steps)]] for j in range(size)]
        last = config.num_unrolled_layers
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        ends_have_experts = config.moe is not None and not config.dense_ends
        self.prelude = StepLayers(
            config, [[d] for d in range(before)], vllm_config, ends_have_experts
        )
        self.recursions = nn.ModuleList(block(depths) for depths in runs)
        coda = range(last - schedule.coda, last)
        self.coda = StepLayers(config, [[d] for d in coda], vllm_config, ends_have_experts)
        self.norm = norms(config, 1)
        head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.output = head.tie_weights(self.embedding) if config.tie_embeddings else head

    def forward(self, hidden: Float[Tensor, "t h"], positions: Int[Tensor, " t"]) -> Tensor:
        """The output of the last norm, `[t h]`."""
        tokens = Tokens(positions[None], 1)
        hidden = self.prelude(hidden, ServedStep(0, tokens))
        for recursion in self.recursions:
            hidden = recursion(hidden, tokens)
        return cast(Any, self.norm)[0](self.coda(hidden, ServedStep(0, tokens)))


class MoRForCausalLM(nn.Module):
    """The class that vLLM builds, loads and runs.

    Raises:
        ValueError: vLLM would compute something else for this model or layout; see
            `require_servable`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.quant_config is not None:
            raise ValueError("a quantized recursion has not been tested. Leave out quantization=.")
        self.vllm_config = vllm_config
        hf_config = vllm_config.model_config.hf_config
        self.decoder_config: DecoderConfig = hf_config.decoder_config
        require_servable(
            self.decoder_config,
            get_tensor_model_parallel_world_size(),
            vllm_config.parallel_config.enable_expert_parallel,
        )
        self.dial = dial_of(hf_config)
        self.model = MoRModel(config=self.decoder_config, vllm_config=vllm_config)
        self.logits_processor = LogitsProcessor(self.decoder_config.vocab_size)

    def embed_input_ids(self, input_ids: Int[Tensor, " t"]) -> Float[Tensor, "t h"]:
        return self.model.embedding(input_ids)

    def forward(
        self,
        input_ids: Int[Tensor, " t"] | None,
        positions: Int[Tensor, " t"],
        intermediate_tensors: Any = None,
        inputs_embeds: Float[Tensor, "t h"] | None = None,
    ) -> Float[Tensor, "t h"]:
        assert intermediate_tensors is None, (
            "vLLM refuses pipeline parallelism for models that do not declare support for it"
        )
        hidden = inputs_embeds
        if hidden is None:
            assert input_ids is not None
            hidden = self.embed_input_ids(input_ids)
        return self.model(hidden, positions)

    def compute_logits(self, hidden_states: Float[Tensor, "t h"]) -> Tensor | None:
        return self.logits_processor(self.model.output, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a folder's tensors, and return the names of the parameters and buffers that were
        set.

        Raises:
            ValueError: a tensor is not part of the model, one is missing, or the router is
                calibrated to leave tokens out of step 1.
        """
        places = dict(self.named_parameters()) | dict(self.named_buffers())
        seen, loaded = set(), set()
        for name, tensor in weights:
            if name.startswith(f"model.{HEADS}"):  # which only train, and draft for our own decoder
                continue
            place, part = place_of(name)
            if place not in places:
                raise ValueError(
                    f"the model has no tensor {name!r}. Check that config.json belongs to these "
                    "weights."
                )
            target = places[place]
            load = getattr(target, "weight_loader", default_weight_loader)
            load(target, tensor) if part is None else load(target, tensor, part)
            seen.add(name)
            loaded.add(place)
        wanted = [n for n in weight_names(self.decoder_config) if not n.startswith(HEADS)]
        missing = {f"model.{name}" for name in wanted} - seen
        if missing:
            raise ValueError(f"the folder lacks {', '.join(sorted(missing)[:3])}.")
        for module in self.modules():
            if isinstance(module, StepProjection):
                module.settle()
        self._check_bars()
        turn_dial(self.model, **self.dial)
        self._settle_routers()
        return loaded

    def _check_bars(self) -> None:
        policy = self.decoder_config.effective_recursion.kv_policy
        if hides_rows(self.decoder_config) or policy == "exit_state":
            return
        for recursion in self.model.recursions:
            for router in recursion.router.modules():  # one may wrap another
                bars = getattr(router, "bars", None)
                if bars is not None and torch.finfo(torch.float32).min < bars[0] < torch.inf:
                    raise ValueError(f"calibrated to bar={bars[0]:.3g}, {FIRST_STEP}")

    @torch.no_grad()
    def _settle_routers(self) -> None:
        """Let routers read their buffers on the host now, because a compiled graph cannot do it
        later.

        The graph then has their values as constants, so they must be part of the key under which
        vLLM keeps it: otherwise a model that is calibrated anew would be served by the earlier graph.
        """
        positions = torch.zeros(1, 1, dtype=torch.long, device=self.model.norm[0].weight.device)
        rows = self.model.norm[0].weight.new_zeros(1, 1, self.decoder_config.hidden_size)
        for recursion in self.model.recursions:
            decision, states = (
                RoutingDecision.everything(Tokens(positions, 1)),
                recursion.begin(rows),
            )
            for step in range(recursion.router.num_recursions):
                decision = recursion.route(states, step, decision, causal=True, assess=False)
        constants = hashlib.sha256(repr(sorted(self.dial.items())).encode())
        for recursion in self.model.recursions:
            for name, buffer in recursion.router.named_buffers():
                constants.update(f"{name}={buffer.tolist()}".encode())
        self.vllm_config.additional_config["mor_routers"] = constants.hexdigest()


def place_of(name: str) -> tuple[str, int | None]:
    """The name of a folder's tensor here, and which half of the fused matrix it is."""
    norm = re.sub(r"norm\.weights\.(\d+)$", r"norm.\1.weight", name)
    return place_of_projection(name) or (norm, None)
