"""The engine of a served model, from options that can be sent to another process."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.generation.engine import Counters
from mor_layers.generation.ranks.lockstep import LockstepEngine
from mor_layers.generation.ranks.tensor_parallel import shard
from mor_tools.serving.loading import ServedModel, load


@dataclass(frozen=True)
class EngineOptions:
    """Which model to run, and how."""

    model: str | None
    """Model folder; None: a small model with random weights."""
    cache: CacheSettings
    """Of each process: with tensor parallelism, each has the keys and values of its own heads."""
    chunk_size: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    trust_remote_code: bool = False
    compiler: str | None = None
    """Backend of `torch.compile` for ticks as one graph; None: there are no graphs."""

    def load(self) -> ServedModel:
        """The model with its tokenizer; weights are read when they are first asked for.

        Raises:
            ValueError: the model folder is incomplete.
            FileNotFoundError: it does not exist.
        """
        return load(self.model, trust_remote_code=self.trust_remote_code)

    def engine(self, served: ServedModel, group: ProcessGroup | None = None) -> DepthBatchingEngine:
        """The engine of a process.

        Args:
            group: the ranks over which the model is sharded; None: this process has all of it.

        Raises:
            ValueError: the model cannot be sharded over the ranks, or compiled, or the cache is too
                small.
        """
        options: dict[str, Any] = {"decode": served.tokenizer.decode, "chunk_size": self.chunk_size}
        options["compiler"] = self.compiler
        if group is None:
            return self._warm(DepthBatchingEngine(self._placed(served), self.cache, **options))
        shard(served.model, group)
        return LockstepEngine(self._placed(served), self.cache, group=group, **options)

    def _placed(self, served: ServedModel) -> Any:
        return served.model.to(self.device, getattr(torch, self.dtype))

    def _warm(self, engine: DepthBatchingEngine) -> DepthBatchingEngine:
        """Compile now, so that the first request does not wait for it."""
        if self.compiler is not None:
            for _ in engine.stream(Request((0,), 1)):
                pass
            engine.counters = Counters()
        return engine
