"""The Megatron backend of the reference cases: an unmodified GPTModel with a RecursionLayer."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mor_layers import ExpertChoice, MoRTransformer, RecursionOutput
from mor_megatron import recursion_block_spec, recursion_layers
from mor_megatron.checkpoints import decoder_tensors, load_tensors
from mor_megatron.checkpoints.weights import megatron_tensors
from mor_tools.formats import config_from_published, load_published, published_names
from tests.distributed import megatron_setup as setup
from tests.reference_cases import ReferenceResult, labels_of, published_parameters


def run_case(
    case: dict[str, Any], tensors: dict[str, Tensor], tp: int, sequence_parallel: bool
) -> ReferenceResult:
    """The case on this rank of a tensor-parallel group; the whole result on every rank."""
    setup.initialize(tp=tp)
    decoder = config_from_published(case)
    # Without recursion, one step of a RecursionLayer does what ordinary layers do.
    decoder = replace(decoder, recursion=decoder.effective_recursion)
    torch_model = MoRTransformer(decoder)
    load_published(torch_model, published_parameters(tensors))
    (model,) = setup.data_parallel([_gpt(torch_model, sequence_parallel)])
    model.train(case["train_mode"])
    outputs: list[RecursionOutput] = []
    for layer in recursion_layers(model):
        router: Any = layer.recursion.router
        if decoder.recursion is not None and isinstance(decoder.recursion.router, ExpertChoice):
            # The published warm-up counts a pass before it runs, and is over in evaluation.
            warmup = decoder.recursion.router.warmup_steps
            router.training_steps.fill_(1 if case["train_mode"] else warmup)
        layer.recursion.register_forward_hook(lambda _, __, output: outputs.append(output))
    ids = tensors["input_ids"]
    logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    lm_loss = F.cross_entropy(logits.flatten(0, 1), labels_of(ids).flatten(), ignore_index=-1)
    total_loss, gradients = lm_loss.detach(), {}
    if case["train_mode"]:
        lm_loss.backward()
        finalize_model_grads([model])
        ours = decoder_tensors(_with_zeros(setup.gather_gradients([model]), torch_model), decoder)
        gradients = {
            published: ours[name]
            for name, published in published_names(decoder).items()
            if name in dict(torch_model.named_parameters())
        }
        predictor = getattr(getattr(decoder.recursion, "router", None), "predictor", None)
        for name, loss in (item for output in outputs for item in output.losses.items()):
            if (name, predictor) != ("sampling_loss", "aux_router"):
                total_loss = total_loss + loss.detach()
    losses: dict[str, Tensor] = {}
    for decision in (decision for output in outputs for decision in output.decisions):
        for name, value in decision.metrics.items():
            losses[name] = losses.get(name, torch.zeros(())) + value
    return ReferenceResult(
        logits=logits.detach(),
        lm_loss=lm_loss.detach(),
        total_loss=total_loss,
        gradients=gradients,
        router_losses=losses,
        depths=outputs[0].depths.T if case["mor"]["enable"] else None,
    )


def _gpt(torch_model: MoRTransformer, sequence_parallel: bool) -> GPTModel:
    decoder = torch_model.config
    config = setup.tiny_config(
        num_layers=decoder.num_unrolled_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_query_groups=decoder.kv_heads,
        ffn_hidden_size=decoder.ffn_hidden_size,
        layernorm_epsilon=decoder.rms_norm_epsilon,
        sequence_parallel=sequence_parallel,
    )
    model = GPTModel(
        config,
        recursion_block_spec(config, decoder.recursion),
        vocab_size=decoder.vocab_size,
        max_sequence_length=setup.MAX_SEQUENCE_LENGTH,
        position_embedding_type="rope",
        rotary_base=int(decoder.rope_base),
        parallel_output=False,
    )
    load_tensors([model], megatron_tensors(torch_model.state_dict(), decoder))
    return model


def _with_zeros(gradients: dict[str, Tensor], torch_model: MoRTransformer) -> dict[str, Tensor]:
    """Gradients, and zeros for tensors that have none."""
    whole = megatron_tensors(torch_model.state_dict(), torch_model.config)
    return {name: gradients.get(name, torch.zeros_like(tensor)) for name, tensor in whole.items()}
