"""Choosing: the next tokens of sequences inside of a graph, and which of them enter the next tick.

A sequence goes on without the host if its request needs nothing but draws (`sampling.draws`). The host
says so when it lets a token of it enter, and learns afterwards what was chosen.

Legend: `l` rows of sequences that leave, `s` slots, the last of which is spare, `v` vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.generation.sampling import Sampling, draws, has_distribution
from mor_layers.generation.scheduling import Span
from mor_layers.generation.tick.graph.rows import first_where
from mor_layers.generation.tick.graph.sizes import FEWEST

NOT_CHOSEN = -1
"""In place of a token: the host must choose it, or find out why there is none."""

NUM_STOP_IDS = 8
"""Stop ids of a sequence that goes on without the host, at most."""

HOST = 0
WAYS = MOST_LIKELY, DRAWN, LIMITED = 1, 2, 3
"""How the tokens of a slot are chosen, as `draws.sample` does, unless the host chooses them."""


class Chosen(NamedTuple):
    """The next tokens of sequences that leave."""

    tokens: Int[Tensor, " l"]
    """`NOT_CHOSEN` where the host chooses."""
    goes_on: Bool[Tensor, " l"]
    """Which of them enter the next tick without the host."""
    following: Int[Tensor, "4 l"]
    """These first: ids, slots (the spare one in columns that are left), positions, places."""


class Choosing:
    """Chooses tokens, from what it knows about the sequence in each slot.

    Args:
        num_slots: slots, of which the last one is spare.
        vocabulary: number of tokens.
        device: the graph's.
    """

    def __init__(self, num_slots: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary, self.device = vocabulary, device
        self.whole = torch.zeros(num_slots, 4 + NUM_STOP_IDS, dtype=torch.long, device=device)
        """By slot: how tokens are chosen, seed, `top_k`, number of tokens to generate, and stop ids."""
        self.real = torch.ones(num_slots, 3, dtype=torch.float64, device=device)
        """By slot: temperature, `min_p`, and `top_p`."""
        # What no request has set limits nothing, because rows that hold no sequence are computed too.
        self.whole[:, 2], self.real[:, 1] = vocabulary, 0.0
        self.num_generated = torch.zeros(num_slots, dtype=torch.long, device=device)
        self._nobody = torch.tensor([[0], [num_slots - 1], [0], [0]], device=device)
        self._ways: dict[int, int] = {}
        """How tokens are chosen, by slot, of sequences that go on without the host."""

    @property
    def counts(self) -> list[int]:
        """Number of sequences whose tokens are chosen in each of the `WAYS`."""
        counted = Counter(self._ways.values())
        return [counted[way] for way in WAYS]

    @property
    def num_continuing(self) -> int:
        """Number of sequences that go on without the host."""
        return len(self._ways)

    def note(self, spans: Sequence[Span]) -> None:
        """Take note of sequences a token of which the host lets enter."""
        slots, whole, real, num_generated = [], [], [], []
        for span in spans:
            if (own := span.continuation) is None:
                self.forget(span.slot)
                continue
            sampling, top_k = own.sampling, own.sampling.top_k_of(self.vocabulary)
            way = self._ways[span.slot] = _way_of(sampling)
            stop_ids = own.stop_ids + (NOT_CHOSEN,) * (NUM_STOP_IDS - len(own.stop_ids))
            slots.append(span.slot)
            whole.append((way, sampling.signed_seed, top_k, own.max_new_tokens, *stop_ids))
            real.append((sampling.temperature or 1.0, sampling.min_p, sampling.top_p))
            num_generated.append(own.num_generated)
        if slots:
            index = on_device(slots, torch.long, self.device)
            self.whole[index] = on_device(whole, torch.long, self.device)
            self.real[index] = on_device(real, torch.float64, self.device)
            self.num_generated[index] = on_device(num_generated, torch.long, self.device)

    def forget(self, slot: int) -> None:
        """Leave the next tokens of a slot to the host."""
        if self._ways.pop(slot, HOST) != HOST:
            self.whole[slot, 0] = HOST

    def __call__(
        self,
        logits: Float[Tensor, "l v"],
        slots: Int[Tensor, " l"],
        positions: Int[Tensor, " l"],
        ways: Tensor,
    ) -> Chosen:
        """Choose the next tokens. This is called inside of the graph.

        Args:
            slots: of the sequences; the spare one in rows that hold none.
            positions: of their last tokens.
            ways: see `Room.ways`.
        """
        state = self.whole, self.real, self.num_generated
        tokens = torch.ops.mor_layers.choose(logits, slots, *state, ways)
        is_chosen = tokens != NOT_CHOSEN
        self.num_generated.index_add_(0, slots, is_chosen.long())
        is_last = self.num_generated[slots] >= self.whole[slots, 3]
        is_last = is_last | (tokens[:, None] == self.whole[slots, 4:]).any(dim=1)
        goes_on = is_chosen & ~is_last
        index, is_any = first_where(goes_on, len(slots))
        entering = torch.stack([tokens, slots, positions + 1, torch.zeros_like(slots)])
        return Chosen(tokens, goes_on, torch.where(is_any, entering[:, index], self._nobody))

    def nothing(self, slots: Int[Tensor, " l"]) -> Chosen:
        """No tokens, for sequences whose logits are computed elsewhere."""
        tokens = torch.full_like(slots, NOT_CHOSEN)
        return Chosen(tokens, tokens != NOT_CHOSEN, self._nobody.expand(-1, len(slots)).clone())


def on_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values in a tensor on a device, which the host does not wait for."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":  # from other memory, a copy waits for what the device does
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _way_of(sampling: Sampling) -> int:
    """How the tokens of a request are chosen."""
    if sampling.temperature == 0:
        return MOST_LIKELY
    return LIMITED if sampling.is_limited else DRAWN


# The compiler leaves this operation as it is, so that tokens are exactly those of `sample`, and so that
# what no sequence in flight needs is left out.
_LIBRARY = torch.library.Library("mor_layers", "FRAGMENT")
_LIBRARY.define(
    "choose(Tensor logits, Tensor slots, Tensor whole, Tensor real, Tensor num_generated, "
    "Tensor ways) -> Tensor"
)


def _choose(
    logits: Float[Tensor, "l v"],
    slots: Int[Tensor, " l"],
    whole: Int[Tensor, "s n"],
    real: Float[Tensor, "s 3"],
    num_generated: Int[Tensor, " s"],
    ways: Tensor,
) -> Int[Tensor, " l"]:
    own_ways = whole[slots, 0]
    tokens = torch.full_like(slots, NOT_CHOSEN)
    for way, size in zip(WAYS, ways.shape, strict=False):
        is_own = own_ways == way
        if size - FEWEST >= len(slots):  # each row may be one of them
            chosen = _chosen(way, logits, slots, whole, real, num_generated)
            tokens = torch.where(is_own, chosen, tokens)
        elif size > FEWEST:
            rows, is_row = first_where(is_own, size - FEWEST)
            chosen = _chosen(way, logits[rows], slots[rows], whole, real, num_generated)
            # Entries without a row go behind the last one, and are cut off.
            target = rows.where(is_row, len(tokens))
            tokens = F.pad(tokens, (0, 1)).scatter(0, target, chosen)[:-1]
    return tokens.where(has_distribution(logits), NOT_CHOSEN)


def _chosen(
    way: int,
    logits: Float[Tensor, "k v"],
    slots: Int[Tensor, " k"],
    whole: Int[Tensor, "s n"],
    real: Float[Tensor, "s 3"],
    num_generated: Int[Tensor, " s"],
) -> Int[Tensor, " k"]:
    """Tokens that are all chosen in one way. Rows of other ways get any."""
    if way == MOST_LIKELY:
        return logits.argmax(dim=-1)
    temperature, min_p, top_p = real[slots].unbind(dim=1)
    _, seeds, top_k = whole[slots, :3].unbind(dim=1)
    draw = draws.uniform(draws.random_bits(seeds, num_generated[slots]))
    scaled = draws.scaled(logits, temperature, min_p)
    if way == DRAWN:
        return draws.drawn(scaled, draw)
    limits = top_k, top_p, draw, draws.NUM_CANDIDATES
    chosen, is_decided = draws.drawn_within_limits(scaled, *limits)
    return chosen.where(is_decided, NOT_CHOSEN)


_LIBRARY.impl("choose", _choose, "CompositeExplicitAutograd")
torch.library.register_fake("mor_layers::choose", lambda logits, slots, *given: slots.clone())
