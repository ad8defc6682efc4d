"""MoRTransformer as a whole: against loops, and what nothing may change."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mor_layers import DecoderConfig, ExpertChoice, FixedDepth, MoRTransformer, TokenChoice
from mor_layers.recursion import SHARING_SCHEMES
from tests.mor_layers.recursion.test_block import DOCUMENTS, PADDING, weighted_losses
from tests.mor_layers.small_models import (
    HIDDEN_SIZE,
    KV_POLICIES,
    ROUTERS,
    VOCAB_SIZE,
    differentiable,
    gradients,
    oracle_gradients,
    plain_config,
    random_ids,
    small_config,
    small_model,
)
from tests.oracles import loops as reference

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
ROUTED_SCHEMES = ("cycle", "middle_cycle")


def next_tokens(ids: Tensor) -> Tensor:
    """Labels `[b s]`: the id that follows; none for the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1)


def assert_equals_the_loops(config: DecoderConfig, causal: bool = False) -> None:
    """Logits, depths, every loss and every gradient, with padding and several documents."""
    model, ids = small_model(config), random_ids(3, 7)
    labels, where = next_tokens(ids), {"documents": DOCUMENTS.T, "is_padding": PADDING.T}
    output = model(ids, labels, **where, causal_routing=causal)
    weights = differentiable(model)
    logits, routed = reference.transformer(config, weights, ids, **where, causal_routing=causal)

    real = ~PADDING.T
    torch.testing.assert_close(output.logits[real], logits[real], **CLOSE)
    learnt = [
        F.cross_entropy(logits[i, j], labels[i, j])
        for i in range(3)
        for j in range(7)
        if real[i, j] and labels[i, j] >= 0
    ]
    lm_loss = torch.stack(learnt).mean()
    torch.testing.assert_close(output.lm_loss, lm_loss, **CLOSE)
    losses = {}
    if routed is not None and config.recursion is not None:
        assert torch.equal(output.depths, routed.depths.T)
        losses = weighted_losses(config.recursion.router, routed.losses)
    torch.testing.assert_close(output.losses, losses, **CLOSE)
    total = sum(losses.values(), lm_loss)
    torch.testing.assert_close(output.loss, total, **CLOSE)
    output.loss.backward()
    total.backward()
    torch.testing.assert_close(gradients(model), oracle_gradients(weights), **CLOSE)


@pytest.mark.parametrize("share_norms", [True, False])
@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
def test_every_sharing_scheme_equals_the_loops(sharing, share_norms):
    config = small_config(num_recursions=2, sharing=sharing, block_size=2, share_norms=share_norms)
    assert_equals_the_loops(config)


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("sharing", ROUTED_SCHEMES)
@pytest.mark.parametrize("router", ["expert_choice_first_step_too", "token_choice"])
def test_every_router_sharing_and_kv_policy_equals_the_loops(router, sharing, policy):
    assert_equals_the_loops(small_config(ROUTERS[router], 3, sharing, policy, share_norms=False))


def test_a_plain_decoder_equals_the_loops():
    assert_equals_the_loops(plain_config(2))


@pytest.mark.parametrize(
    ("router", "sharing", "ends"),
    [
        ("fixed_depth", "middle_sequence", (0, 2)),
        ("expert_choice", "middle_cycle", (2, 3)),
        ("token_choice", "cycle", (3, 0)),
    ],
)
def test_a_prelude_and_a_coda_of_any_length_equal_the_loops(router, sharing, ends):
    assert_equals_the_loops(small_config(ROUTERS[router], sharing=sharing, ends=ends))


@pytest.mark.parametrize("ends", [None, (2, 3)])
@pytest.mark.parametrize("share_norms", [True, False])
@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
def test_a_recursive_model_equals_the_plain_stack_of_its_unrolled_layers(
    sharing, share_norms, ends
):
    config = small_config(
        num_recursions=3, sharing=sharing, block_size=2, share_norms=share_norms, ends=ends
    )
    assert config.recursion is not None
    schedule, model = config.recursion.schedule(config.num_unrolled_layers), small_model(config)
    plain = MoRTransformer(plain_config(config.num_unrolled_layers))
    if ends is not None:
        assert (len(model.prelude.layers), len(model.coda.layers)) == ends
    unique = [*model.prelude.layers]
    for recursion in model.recursions:
        unique += recursion.layers.layers
    unique += model.coda.layers
    assert len(unique) == schedule.num_unique_layers
    times_run = [0] * len(unique)
    for layer, source in zip(plain.recursions[0].layers.layers, schedule.unrolled, strict=True):
        state = unique[source].state_dict()
        for norm in ("attention_norm", "mlp_norm"):
            own = f"{norm}.weights.{times_run[source]}"
            state[f"{norm}.weights.0"] = state.get(own, state[f"{norm}.weights.0"])
        layer.load_state_dict({name: state[name] for name in layer.state_dict()})
        times_run[source] += 1
    for name in ("embedding", "norm", "output"):
        getattr(plain, name).load_state_dict(getattr(model, name).state_dict())
    ids = random_ids(2, 6)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **CLOSE)
    for one in (model, plain):
        one(ids, next_tokens(ids)).loss.backward()
    # A shared weight's gradient is the sum of those of the layers it stands for.
    for place, layer in enumerate(unique):
        repeats = zip(plain.recursions[0].layers.layers, schedule.unrolled, strict=True)
        grads = [own.mlp.up.weight.grad for own, source in repeats if source == place]
        torch.testing.assert_close(layer.mlp.up.weight.grad, sum(grads), **CLOSE)


@pytest.mark.parametrize("router", ["fixed_depth", "expert_choice", "token_choice"])
def test_one_recursion_with_nothing_left_out_has_the_plain_stacks_layers(router):
    config = small_config(ROUTERS[router], 1, "cycle", block_size=2)
    model = small_model(config)
    plain = MoRTransformer(plain_config(2))
    plain.load_state_dict(
        {name: model.state_dict()[name] for name in plain.state_dict()}, strict=True
    )
    ids = random_ids(2, 6)
    output = model(ids)
    assert (output.depths == 1).all()
    if router == "fixed_depth":
        assert torch.equal(output.logits, plain(ids).logits)


# Which routers a document's own tokens decide for, and nothing but them.
DETERMINISTIC = sorted(set(ROUTERS) - {"random_depth"})


@st.composite
def packed_documents(draw) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Documents, and a batch `[b s]` that holds them among padding: ids, numbers, is_padding.

    Padding stands before, between and after documents; inside one it would move positions apart.
    """
    rows, alone, token = [], [], st.integers(0, VOCAB_SIZE - 1)
    for _ in range(draw(st.integers(1, 2))):
        row: list[tuple[int, int, bool]] = []
        for number in range(draw(st.integers(1, 3))):
            row += [(draw(token), number, True)] * draw(st.integers(0, 2))
            # Equal tokens at its beginning have equal states, a tie that expert-choice may break
            # either way.
            document = draw(st.lists(token, min_size=1, max_size=5, unique=True))
            alone.append(torch.tensor([document]))
            row += [(value, number, False) for value in document]
        rows.append(row)
    width = max(map(len, rows)) + draw(st.integers(0, 1))
    for row in rows:
        row += [(0, row[-1][1], True)] * (width - len(row))
    ids, documents, is_padding = (torch.tensor([[t[i] for t in r] for r in rows]) for i in range(3))
    return alone, ids, documents, is_padding


@settings(max_examples=15)
@given(packed=packed_documents(), policy=st.sampled_from(KV_POLICIES), causal=st.booleans())
@pytest.mark.parametrize("router", DETERMINISTIC)
def test_a_document_among_others_and_padding_is_as_if_alone(router, packed, policy, causal):
    alone, ids, documents, is_padding = packed
    model = small_model(small_config(ROUTERS[router], kv_policy=policy))
    together = model(ids, documents=documents, is_padding=is_padding, causal_routing=causal)
    numbers = documents + 10 * torch.arange(len(ids))[:, None]
    numbers = numbers.masked_fill(is_padding, -1)
    for document, number in zip(alone, numbers[numbers >= 0].unique_consecutive(), strict=True):
        own = model(document, causal_routing=causal)
        where = numbers == number
        assert torch.equal(together.depths[where], own.depths[0])
        torch.testing.assert_close(together.logits[where], own.logits[0], rtol=1e-4, atol=5e-5)
    assert not together.depths[is_padding].any()


@pytest.mark.parametrize(("front", "back"), [(3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("router", DETERMINISTIC)
def test_padding_on_either_side_changes_nothing(router, causal, front, back):
    model, ids = small_model(small_config(ROUTERS[router])), random_ids(2, 6)
    padded = F.pad(ids, (front, back))
    is_padding = F.pad(torch.zeros_like(ids, dtype=torch.bool), (front, back), value=True)
    alone = model(ids, next_tokens(ids), causal_routing=causal)
    among = model(padded, next_tokens(padded), is_padding=is_padding, causal_routing=causal)
    assert torch.equal(among.depths[~is_padding], alone.depths.flatten())
    assert not among.depths[is_padding].any()
    torch.testing.assert_close(among.logits[~is_padding], alone.logits.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(among.losses, alone.losses, **CLOSE)


@settings(max_examples=10)
@given(packed=packed_documents(), policy=st.sampled_from(KV_POLICIES))
@pytest.mark.parametrize("router", DETERMINISTIC)
def test_changing_another_document_or_what_stands_in_padding_changes_nothing(
    router, packed, policy
):
    _, ids, documents, is_padding = packed
    model = small_model(small_config(ROUTERS[router], kv_policy=policy))
    first = (documents == documents[:, :1]) & ~is_padding
    changed = torch.where(first, ids, (ids + 5) % VOCAB_SIZE)
    before, after = (model(i, documents=documents, is_padding=is_padding) for i in (ids, changed))
    assert torch.equal(before.depths[first], after.depths[first])
    torch.testing.assert_close(before.logits[first], after.logits[first], **CLOSE)


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("sharing", ROUTED_SCHEMES)
@pytest.mark.parametrize("router", ROUTERS)
def test_causal_routing_lets_no_token_change_what_came_before(router, sharing, policy):
    model = small_model(small_config(ROUTERS[router], sharing=sharing, kv_policy=policy))
    ids = random_ids(2, 7)
    outputs = []
    for changed in range(8):  # the last changes nothing: the run to compare with
        other = ids.clone()
        other[:, changed:] = (other[:, changed:] + 1) % VOCAB_SIZE
        with torch.no_grad():
            outputs.append(model(other, causal_routing=True))
    for changed, output in enumerate(outputs[:-1]):
        before, after = outputs[-1], output
        assert torch.equal(before.depths[:, :changed], after.depths[:, :changed])
        torch.testing.assert_close(
            before.logits[:, :changed], after.logits[:, :changed], rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(before.logits[:, changed:], after.logits[:, changed:])


def test_expert_choice_looks_ahead_unless_told_not_to():
    model, ids = small_model(small_config(ROUTERS["expert_choice"])), random_ids(1, 9)
    logits = []
    for token in range(VOCAB_SIZE):
        changed = ids.clone()
        changed[:, -1] = token
        logits.append(model(changed).logits[:, :-1])
    assert any(not torch.allclose(logits[0], other, atol=1e-3) for other in logits[1:])


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_generating_equals_reading_what_was_generated(policy):
    model = small_model(small_config(ROUTERS["expert_choice"], kv_policy=policy))
    ids = random_ids(2, 3)
    tokens = torch.stack(list(model.generate(ids, 5)), dim=1)
    assert tokens.shape == (2, 5)
    logits = model(torch.cat([ids, tokens], dim=1), causal_routing=True).logits
    assert torch.equal(logits[:, 2:-1].argmax(dim=-1), tokens)


def test_sampling_follows_its_generator():
    model, ids = small_model(small_config()), random_ids(2, 3)
    drawn = [
        torch.stack(list(model.generate(ids, 6, 5.0, torch.Generator().manual_seed(seed))))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"max_new_tokens": 0}])
def test_generating_refuses_impossible_requests_at_once(options):
    with pytest.raises(ValueError, match=r"temperature=-?\d.* and max_new_tokens=\d"):
        small_model(small_config()).generate(random_ids(1, 2), **({"max_new_tokens": 1} | options))


@pytest.mark.parametrize(
    ("router", "norms"), [(FixedDepth(), 1), (ExpertChoice(), 1), (TokenChoice(), 3)]
)
@pytest.mark.parametrize("sharing", SHARING_SCHEMES)
def test_every_shared_weight_is_stored_once(router, norms, sharing):
    if sharing.endswith("sequence") and not isinstance(router, FixedDepth):
        router = FixedDepth()
    config = small_config(router, sharing=sharing, block_size=2, share_norms=norms == 1)
    model = MoRTransformer(config)
    state = model.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)
    queries = [name for name in state if name.endswith("attention.query.weight")]
    assert config.recursion is not None
    assert len(queries) == config.recursion.schedule(config.num_unrolled_layers).num_unique_layers
    own = [name for name in state if "recursions.0.layers.layers.0.mlp_norm" in name]
    assert len(own) == norms
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensor.numel() for name, tensor in state.items() if name in dict(model.named_parameters())
    )


def test_a_state_dict_makes_the_same_model():
    config = small_config(ROUTERS["token_choice"])
    model, other = small_model(config), small_model(config, seed=1)
    model.recursions[0].router.depth_bias.copy_(torch.tensor([0.1, 0.0, -0.1]))
    other.load_state_dict(model.state_dict())
    ids = random_ids(2, 5)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_tied_embeddings_are_one_weight():
    model = MoRTransformer(replace(small_config(), tie_embeddings=True))
    assert model.output.weight is model.embedding.weight
    assert "output.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_recomputing_activations_gives_the_same_losses_and_gradients(policy):
    results = []
    for recompute in (False, True):
        config = small_config(ROUTERS["expert_choice"], kv_policy=policy)
        model, ids = small_model(config, recompute=recompute), random_ids(2, 8)
        output = model(ids, next_tokens(ids))
        output.loss.backward()
        results.append((output.loss, output.losses, gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_advancing_counts_the_tokens_of_every_forward_pass():
    model = small_model(small_config(TokenChoice(balancing="loss_free")))
    outputs = [model(random_ids(2, 9, seed)) for seed in range(3)]
    depths = torch.cat([output.depths.flatten() for output in outputs]).tolist()
    model.advance(outputs)
    expected = reference.loss_free_update([0.0] * 3, [depth - 1 for depth in depths], 0.001)
    assert model.recursions[0].router.depth_bias.tolist() == pytest.approx(expected)


def test_advancing_moves_the_capacity_warm_up():
    model = MoRTransformer(small_config(ExpertChoice(warmup_steps=4)))
    kept = []
    for _ in range(6):
        output = model(random_ids(1, 12))
        (recursion,) = output.recursions
        kept.append([decision.tokens.shape[0] for decision in recursion.decisions])
        model.advance([output])
    assert kept[0] == [12, 12, 12]
    assert kept[4] == kept[5] == [12, 8, 4]
    assert kept == sorted(kept, reverse=True)


def test_ignored_labels_and_padding_are_not_learnt():
    model, ids = small_model(small_config()), random_ids(1, 6)
    labels = next_tokens(ids)
    labels[0, 1] = -100
    is_padding = torch.tensor([[False] * 4 + [True] * 2])
    logits = model(ids, is_padding=is_padding).logits
    expected = F.cross_entropy(logits[0, [0, 2, 3]], labels[0, [0, 2, 3]])
    torch.testing.assert_close(model(ids, labels, is_padding=is_padding).lm_loss, expected)


def test_without_labels_there_is_no_loss():
    output = small_model(small_config())(random_ids(1, 3))
    assert output.lm_loss is None
    with pytest.raises(ValueError, match=r"Call model\(ids, labels=...\)"):
        _ = output.loss


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0), (1, 2, 3)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"ids has shape .*; expected \[b s\]"):
        small_model(small_config())(torch.zeros(shape, dtype=torch.long))


def test_documents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"documents has shape \(5, 2\).*\(4, 2\)"):
        small_model(small_config())(random_ids(2, 4), documents=torch.zeros(2, 5, dtype=torch.long))


def test_half_precision_runs_and_keeps_router_losses_in_fp32():
    config = small_config(ROUTERS["expert_choice"])
    model, ids = small_model(config).bfloat16(), random_ids(2, 6)
    output = model(ids, next_tokens(ids))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert output.logits.shape == (2, 6, VOCAB_SIZE)
    assert model.embedding.weight.shape[1] == HIDDEN_SIZE


def test_importing_the_package_needs_nothing_but_torch_and_jaxtyping():
    script = """
import sys

blocked = [
    "megatron", "mor_megatron", "omegaconf", "rich", "safetensors", "tokenizers", "transformers",
    "yaml",
]
sys.modules.update(dict.fromkeys(blocked))  # importing one of them raises ModuleNotFoundError
import mor_layers, torch
config = mor_layers.from_mapping(mor_layers.DecoderConfig, dict(
    vocab_size=5, hidden_size=4, ffn_hidden_size=4, num_unrolled_layers=4, num_heads=1,
    recursion=dict(num_recursions=2, router=dict(type="expert_choice")),
))
print(mor_layers.MoRTransformer(config)(torch.zeros(1, 3, dtype=torch.long)).logits.shape)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "torch.Size([1, 3, 5])" in ran.stdout


@pytest.mark.parametrize("kv_policy", [*KV_POLICIES, "exit_state"])
def test_biases_and_norms_of_queries_and_keys_equal_the_loops(kv_policy):
    config = small_config(ROUTERS["expert_choice"], kv_policy=kv_policy)
    config = replace(config, head_dim=4, qkv_bias=True, qk_norm=True)
    if kv_policy != "exit_state":  # whose loops know of neither
        assert_equals_the_loops(config)
    model = small_model(config).eval()
    whole = model(random_ids(1, 9), causal_routing=True).logits
    assert len(model.recursions[0].layers.layers[0].attention.query.bias) == 2 * 4
    assert whole.isfinite().all()
