"""Damped loops round a pretrained model, against loops by hand over its own layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    MoRTransformer,
    RecursionConfig,
    load_model,
    save_model,
)
from mor_layers.generation import Request
from mor_layers.models.rotary import Rotary
from mor_layers.recursion import Sharing, StepContext
from mor_layers.routers import DampedLoops
from mor_layers.selection import Tokens
from mor_layers.weights import looped_weights
from mor_tools.commands import main
from tests.mor_layers.generation.served import assert_exact, prompt, serve
from tests.mor_layers.small_models import random_ids, small_config, small_model

PLAIN = replace(small_config(FixedDepth(), 6, "cycle"), recursion=None)
LOOPED = range(2, 5)
"""The layers of six that repeat."""


def by_hand(
    plain: MoRTransformer, ids: Tensor, loops: int, damping: float, one_by_one: bool = False
) -> Tensor:
    """Logits of the plain model, whose middle layers run `loops` times, each time part of the way.

    Args:
        one_by_one: whether each layer repeats before the next one runs.
    """
    tokens = Tokens.whole_sequence(*ids.T.shape)
    config, context = plain.config, StepContext(0, tokens)
    rotary = Rotary.at(tokens.positions, config.rotary_size, config.rope_base, torch.float32)
    layers = list(plain.recursions[0].layers.layers)

    def run(hidden: Tensor, numbers: range) -> Tensor:
        for number in numbers:
            hidden = layers[number](hidden, context, rotary)
        return hidden

    hidden = run(plain.embedding(ids.T), range(LOOPED.start))
    blocks = [range(number, number + 1) for number in LOOPED] if one_by_one else [LOOPED]
    for block in blocks:
        for _ in range(loops):
            hidden = hidden + damping * (run(hidden, block) - hidden)
    hidden = run(hidden, range(LOOPED.stop, len(layers)))
    return plain.output(plain.norm(hidden)).transpose(0, 1)


def looped(
    plain: MoRTransformer, router: DampedLoops, loops: int, sharing: Sharing = "middle_cycle"
) -> MoRTransformer:
    ends = {"prelude_layers": LOOPED.start, "coda_layers": 6 - LOOPED.stop}
    config, weights = looped_weights(
        plain.state_dict(), plain.config, RecursionConfig(loops, sharing, router, **ends)
    )
    model = MoRTransformer(config)
    model.load_state_dict(dict(weights))
    return model.eval()


@pytest.mark.parametrize("moe", [None, MoEConfig(4)], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("loops", "given", "damping"),
    [(2, None, 1 / 2), (3, None, 1 / 3), (3, 0.7, 0.7), (2, 1.0, 1.0)],
)
def test_the_layers_between_the_ends_repeat_in_damped_steps(moe, loops, given, damping):
    plain, ids = small_model(replace(PLAIN, moe=moe)).eval(), random_ids(2, 9)
    model = looped(plain, DampedLoops(given), loops)
    assert model.config.num_unrolled_layers == 3 + 3 * loops
    with torch.no_grad():
        expected = by_hand(plain, ids, loops, damping)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moe", [None, MoEConfig(4)], ids=["dense", "experts"])
def test_layers_repeat_one_by_one_in_damped_steps(moe):
    plain, ids = small_model(replace(PLAIN, moe=moe)).eval(), random_ids(2, 9)
    model = looped(plain, DampedLoops(0.6), 3, "sequence")
    assert model.config.num_unrolled_layers == 3 + 3 * 3
    with torch.no_grad():
        expected = by_hand(plain, ids, 3, 0.6, one_by_one=True)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    request = Request(prompt(5), 6)
    assert_exact(model, request, serve(model, [request])[0])


def test_a_whole_step_is_fixed_depth() -> None:
    damped = small_config(DampedLoops(1.0))
    ids = random_ids(2, 9)
    found, expected = (small_model(c)(ids).logits for c in (damped, small_config(FixedDepth())))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", ["recursion_wise", "recursive_sharing"])
def test_generation_is_a_full_forward_pass(policy) -> None:
    model = small_model(small_config(DampedLoops(), kv_policy=policy, block_size=2))
    requests = [Request(prompt(5), 6), Request(prompt(3, seed=1), 4)]
    for request, served in zip(requests, serve(model, requests), strict=True):
        assert_exact(model, request, served)


def test_mor_convert_loops_a_folder(tmp_path: Path, capsys) -> None:
    plain = small_model(PLAIN).eval()
    save_model(plain, tmp_path / "plain")
    loop = ["--recursions", "2", "--repeat", "--prelude", "2", "--coda", "1"]
    source, target = str(tmp_path / "plain"), str(tmp_path / "looped")
    main(["convert", source, target, *loop, "--damping", "0.6"])
    model, ids = load_model(target).eval(), random_ids(2, 9)
    assert model.config.recursion is not None
    assert model.config.recursion.router == DampedLoops(0.6)
    with torch.no_grad():
        expected = by_hand(plain, ids, 2, 0.6)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    by_layer = str(tmp_path / "by_layer")
    main(["convert", source, by_layer, *loop, "--sharing", "sequence"])
    with torch.no_grad():
        found, expected = load_model(by_layer).eval()(ids).logits, by_hand(plain, ids, 2, 0.5, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for options, message in (
        ([*loop, "--init", "average"], "--init has no effect with --repeat"),
        (["--recursions", "3", "--damping", "0.5"], "--damping has no effect without --repeat"),
        ([*loop, "--to", "llama"], "router=DampedLoops"),
        ([*loop, "--coda", "4"], "leave no layer to repeat"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", source, str(tmp_path / "other"), *options])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("plain", "recursion", "reason"),
    [
        (small_config(), RecursionConfig(2, router=DampedLoops()), "only a plain model"),
        (PLAIN, RecursionConfig(2, router=ExpertChoice()), "has no counterpart"),
    ],
)
def test_what_cannot_be_looped_is_refused(plain: DecoderConfig, recursion, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        looped_weights(small_model(plain).state_dict(), plain, recursion)


def test_settings_out_of_range_are_refused() -> None:
    for damping in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"damping=.* must lie in"):
            DampedLoops(damping)
    with pytest.raises(ValueError, match="DampedLoops needs several steps"):
        RecursionConfig(1, router=DampedLoops())
