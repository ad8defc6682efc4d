"""Each weight is read by one module, which ZeRO takes for granted.

ZeRO's third stage gathers a sharded weight for the module that runs when it is first read, and again
in the backward pass of that module only. Another module that read it too would find it gone there.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RecursionConfig,
    Relaxation,
    TokenChoice,
)
from mor_layers.recursion import HyperConnections
from tests.mor_layers.small_models import random_ids, small_config, small_model


class Noted(dict[str, Any]):
    """A module's parameters, as ZeRO replaces them; notes the innermost module that runs at a read."""

    def __init__(self, module: nn.Module, name: str, running: list[str], readers: Any) -> None:
        super().__init__(module._parameters)
        self.name, self.running, self.readers = name, running, readers

    def __getitem__(self, key: str) -> Any:
        if self.running:
            self.readers[f"{self.name}.{key}"].add(self.running[-1])
        return super().__getitem__(key)


def readers_of_weights(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, set[str]]:
    """For each parameter the modules that read it, by name."""
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []
    readers: dict[str, set[str]] = defaultdict(set)

    def begin(module: nn.Module, given: object) -> None:
        running.append(names[module])

    def end(module: nn.Module, given: object, output: object) -> None:
        running.pop()

    for module, name in names.items():
        module._parameters = Noted(module, name, running, readers)
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    model(*inputs, **options)
    return readers


def with_recursion(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    assert isinstance(config.recursion, RecursionConfig)
    return replace(config, recursion=replace(config.recursion, **changes))


CONFIGS: dict[str, DecoderConfig] = {
    "expert choice": small_config(ExpertChoice()),
    "norms of each step": small_config(ExpertChoice(), share_norms=False),
    "token choice": small_config(TokenChoice(), kv_policy="recursive_sharing", block_size=2),
    "exit state": small_config(ExpertChoice(), kv_policy="exit_state"),
    "deltas": with_recursion(small_config(ExpertChoice()), relaxation=Relaxation(2)),
    "streams": with_recursion(small_config(ExpertChoice()), hyper_connections=HyperConnections()),
    "experts": replace(small_config(ExpertChoice()), moe=MoEConfig(3, 2)),
    "layers one by one": small_config(FixedDepth(), sharing="middle_sequence"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_module_reads_each_weight(config: DecoderConfig) -> None:
    ids = random_ids(2, 9)
    readers = readers_of_weights(small_model(config), ids, labels=ids)
    assert len(readers) > 10
    assert {name: found for name, found in readers.items() if len(found) > 1} == {}
