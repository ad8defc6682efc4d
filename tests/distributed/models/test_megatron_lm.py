"""What `--spec` of Megatron-LM's script can name, used as the script uses it."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import Tensor

from mor_layers import ExpertChoice, RecursionConfig
from mor_megatron import Norm, recursion_block_spec, recursion_layers, token_depths
from mor_megatron.models.gpt import proposed_layout
from mor_megatron.models.megatron_lm import recursion_builder, recursion_spec
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

EXPERT = ExpertChoice(predictor_coefficient=0.1, z_loss_coefficient=0.01, alpha=0.5)
RECURSION = RecursionConfig(3, router=EXPERT)
SEQUENCE_LENGTH = 14


def gpt(config: Any, spec: Any) -> GPTModel:
    """As the script builds it: it calls what is no ModuleSpec, and hands over the rest."""
    return GPTModel(
        config,
        spec,
        vocab_size=setup.VOCAB_SIZE,
        max_sequence_length=setup.MAX_SEQUENCE_LENGTH,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def spec_like_pretrain_gpt(num_recursions: int) -> tuple[bool, int, int]:
    setup.initialize()
    config = setup.tiny_config(num_layers=8)
    model = gpt(config, recursion_spec(RecursionConfig(num_recursions, router=EXPERT)))
    (layer,) = recursion_layers(model)
    ids = setup.random_tokens(2, SEQUENCE_LENGTH - 1)
    loss = model(ids, torch.arange(SEQUENCE_LENGTH).expand(2, -1), None, labels=ids)
    loss.mean().backward()
    depths = token_depths(model)
    return bool(torch.isfinite(loss).all()), len(layer.recursion.layers), int(depths.max())


def test_a_spec_object_without_a_config_builds_the_recursion(pool: WorkerPool) -> None:
    assert pool.run(spec_like_pretrain_gpt, num_recursions=3) == [(True, 2, 3)]


def built_by_the_script(by_builder: bool) -> tuple[int, bool]:
    """Recursions of the model that megatron.training builds, and whether its final norm is ours."""
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    setup.initialize()
    named = recursion_builder(RECURSION) if by_builder else recursion_spec(RECURSION)
    settings = GPTModelConfig(
        transformer=setup.tiny_config(num_layers=8),
        transformer_layer_spec=named,
        vocab_size=setup.VOCAB_SIZE,
        seq_length=SEQUENCE_LENGTH,
        position_embedding_type="rope",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(settings).build_model(groups)
    return len(list(recursion_layers(model))), isinstance(model.decoder.final_layernorm, Norm)


@pytest.mark.parametrize("by_builder", [True, False])
def test_the_builder_of_megatron_training_takes_both(pool: WorkerPool, by_builder: bool) -> None:
    assert pool.run(built_by_the_script, by_builder=by_builder) == [(1, by_builder)]


def files_its_keys(layout: str, by_builder: bool) -> list[bool]:
    """Whether this stage holds a recursion; raises where stages name the same tensors unlike."""
    setup.initialize(pp=2)
    config = setup.tiny_config(num_layers=8, pipeline_model_parallel_layout=layout)
    spec = recursion_builder(RECURSION)(config) if by_builder else recursion_spec(RECURSION)
    model = gpt(config, spec)
    state = model.sharded_state_dict()
    apply_factories(state)
    validate_sharding_integrity(determine_global_metadata(state)[1])
    return [any(recursion_layers(model))]


@pytest.mark.parametrize("by_builder", [True, False])
def test_a_stage_without_a_recursion_files_its_keys_as_the_others(
    pool: WorkerPool, by_builder: bool
) -> None:
    run = partial(pool.run, files_its_keys, 2, layout="Et|t*6,tL")
    assert run(by_builder=by_builder) == [[False], [True]]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
def test_a_proposed_layout_is_whole_parts_in_as_many_stages(num_stages: int) -> None:
    for depths in product((1, 2, 6, 12), repeat=num_stages + 1):
        layout = proposed_layout(depths, num_stages)
        stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
        assert len(stages) == num_stages, layout
        assert stages[0][0] == LayerType.embedding
        assert stages[-1][-1] == LayerType.loss
        counts = [stage.count(LayerType.decoder) for stage in stages]
        assert sum(counts) == sum(depths), layout
        assert all(counts), layout
        borders = {sum(depths[:i]) for i in range(len(depths) + 1)}
        assert all(sum(counts[: i + 1]) in borders for i in range(num_stages)), layout


def refusal_of_stages() -> str:
    setup.initialize(pp=4)
    config = setup.tiny_config(num_layers=8)
    try:
        gpt(config, recursion_spec(RECURSION))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_more_stages_than_parts_are_told_how_many_there_can_be(pool: WorkerPool) -> None:
    for message in pool.run(refusal_of_stages, 4):
        assert "pipeline_model_parallel_layout: 3 stages at most." in message


def gradients(layout: dict[str, Any], config: dict[str, Any], kind: str) -> dict[str, Tensor] | str:
    """Of a model from recursion_block_spec, recursion_spec or recursion_builder."""
    setup.initialize(**layout)
    made = setup.tiny_config(num_layers=8, **config)
    try:
        spec = {
            "block": lambda: recursion_block_spec(made, RECURSION),
            "spec": lambda: recursion_spec(RECURSION),
            "builder": lambda: recursion_builder(RECURSION)(made, vp_stage=None),
        }[kind]()
        model = gpt(made, spec)
    except ValueError as error:
        return str(error)
    setup.fill_parameters([model])
    chunks = setup.data_parallel([model])
    setup.forward_backward(chunks, setup.random_tokens(4, SEQUENCE_LENGTH))
    return setup.gather_gradients(chunks)


SPREAD: dict[str, Any] = {"layout": {"tp": 2}, "config": {"sequence_parallel": True}}


@pytest.mark.parametrize(
    ("kind", "spread"),
    [("builder", SPREAD), ("builder", {"layout": {"pp": 2}, "config": {}})],
    ids=["TP2+SP", "PP2"],
)
def test_a_builder_makes_the_model_of_recursion_block_spec(
    pool: WorkerPool, kind: str, spread: dict[str, Any]
) -> None:
    (expected,) = pool.run(gradients, layout={}, config={}, kind="block")
    for other in pool.run(gradients, 2, kind=kind, **spread):
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-6)


def test_a_spec_object_that_would_spread_pytorchs_norm_names_the_builder(pool: WorkerPool) -> None:
    for message in pool.run(gradients, 2, kind="spec", **SPREAD):
        assert "Use recursion_builder instead of recursion_spec" in str(message)
