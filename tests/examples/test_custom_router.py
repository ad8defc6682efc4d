"""The example of a router of one's own."""

import inspect
import sys

import torch

import custom_router
from mor_layers.routers import registered_routers


def test_the_router_takes_at_most_thirty_lines():
    parts = (custom_router.Halting, custom_router.HaltingRouter)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) <= 30
    assert registered_routers()["halting"] is custom_router.Halting


def test_training_lowers_the_loss_and_gives_tokens_different_depths():
    torch.manual_seed(0)
    outputs = list(custom_router.train(25))
    losses = [output.lm_loss.item() for output in outputs]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    assert all(set(output.losses) == {"halting_loss"} for output in outputs)
    shares = custom_router.shares(outputs[-1])
    assert shares[0] == 1.0
    assert 0.0 < shares[2] <= shares[1] < 1.0


def test_the_script_prints_loss_and_depth_shares(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["custom_router.py", "2"])
    custom_router.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step    1  loss 5.")
    assert line.split("tokens that ran each step ")[1].strip().startswith("100%")
