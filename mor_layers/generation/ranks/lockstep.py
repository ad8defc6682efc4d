"""One engine on every rank of a tensor-parallel group, driven by the first rank.

The first rank calls `submit`, `cancel` and `step` as with any engine. The others call `follow`, which
makes the same calls in the same order with the same times. The decisions of scheduler, routers and
sampler depend only on data that is equal on all ranks, so only the calls are sent.
"""

import time
from typing import Any

import torch
from torch.distributed import ProcessGroup

from mor_layers.generation.cache import CacheSettings
from mor_layers.generation.engine import DepthBatchingEngine, Event
from mor_layers.generation.scheduling import Request
from mor_layers.models import MoRTransformer


class LockstepEngine(DepthBatchingEngine):
    """A `DepthBatchingEngine` whose model is sharded over ranks; see `tensor_parallel.shard`.

    Args:
        group: the ranks. If `decode` or `sampler` is given, it must be given on every rank.
        options: those of `DepthBatchingEngine` except the clock, because all ranks use the first
            rank's.
    """

    def __init__(
        self, model: MoRTransformer, cache: CacheSettings, *, group: ProcessGroup, **options: Any
    ) -> None:
        self._group, self._now = group, time.monotonic()
        super().__init__(model, cache, clock=lambda: self._now, **options)

    @property
    def leads(self) -> bool:
        """Whether this rank accepts requests."""
        return self._group.rank() == 0

    def submit(self, request: Request) -> int:
        self._check_leads("submit")
        if request.constraint is not None:
            raise ValueError(
                "a constraint keeps state that cannot be sent to other ranks. Leave it out, or use an "
                "engine on one rank."
            )
        self._now = time.monotonic()
        number = super().submit(request)
        self._send("submit", request)  # a refused request is not sent
        return number

    def cancel(self, number: int) -> bool:
        self._check_leads("cancel")
        self._send("cancel", number)
        return super().cancel(number)

    def step(self) -> list[Event]:
        self._check_leads("step")
        self._now = time.monotonic()
        self._send("step")
        return super().step()

    def close(self) -> None:
        """Let the other ranks return from `follow`."""
        self._check_leads("close")
        self._send("close")

    def follow(self) -> None:
        """Repeat the calls of the first rank until it closes.

        Raises:
            ValueError: this is the first rank.
        """
        if self.leads:
            raise ValueError(
                "follow() was called on the first rank. Call submit() and step() there, and "
                "follow() on the other ranks."
            )
        while True:
            received: list[Any] = [None]
            torch.distributed.broadcast_object_list(received, group=self._group, group_src=0)
            call, value, self._now = received[0]
            if call == "close":
                return
            if call == "submit":
                super().submit(value)
            elif call == "cancel":
                super().cancel(value)
            else:
                super().step()

    def _check_leads(self, call: str) -> None:
        if not self.leads:
            raise ValueError(f"only the first rank may {call}. Call follow() on the others.")

    def _send(self, call: str, value: Any = None) -> None:
        message = [(call, value, self._now)]
        torch.distributed.broadcast_object_list(message, group=self._group, group_src=0)
