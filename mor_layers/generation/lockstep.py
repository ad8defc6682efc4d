"""One engine on every rank of a tensor-parallel group, driven from the first one.

The first rank calls `submit`, `cancel` and `step` like those of any engine; the others call `follow`,
which does the same things in the same order at the same times. Decisions of scheduler, routers and
sampler are functions of what all ranks have alike, so nothing but the calls is sent.
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
    """A `DepthBatchingEngine` whose model is spread over ranks, see `tensor_parallel.shard`.

    Args:
        group: the ranks. `decode` and `sampler`, if given, are so on each of them.
        options: as of `DepthBatchingEngine`, without the clock: the first rank's is everyone's.
    """

    def __init__(
        self, model: MoRTransformer, cache: CacheSettings, *, group: ProcessGroup, **options: Any
    ) -> None:
        self._group, self._now = group, time.monotonic()
        super().__init__(model, cache, clock=lambda: self._now, **options)

    @property
    def leads(self) -> bool:
        """Whether requests come from this rank."""
        return self._group.rank() == 0

    def submit(self, request: Request) -> int:
        self._check_leads("submit")
        self._now = time.monotonic()
        number = super().submit(request)
        self._send("submit", request)  # nothing is sent of a request that is refused
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
        """Do as the first rank does, until it closes.

        Raises:
            ValueError: this is the first rank.
        """
        if self.leads:
            raise ValueError("the first rank leads. Call submit and step there, follow elsewhere.")
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
