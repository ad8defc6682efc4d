"""Thresholds that keep a given share, and the dial that shifts them at inference.

A threshold follows the quantile of the values that it is compared with, over the global batch and
outside the forward pass. Each update moves it a fixed fraction of the whole distance. Slower
controllers cannot keep up with an optimizer that moves the values.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mor_layers.modules import PreciseBuffers

Dial = Literal["depth", "width"]
"""What thresholds decide, by the name of the argument of `turn_dial` that shifts them."""

NUM_BINS = 1024
_FINEST = 1e-4
"""Distance from the threshold up to which bins have equal width; beyond it, widths grow in
proportion."""
_REACH = 15.0
"""asinh(distance / _FINEST) of the outermost bin: a distance of about 160."""


class Thresholds(PreciseBuffers):
    """Thresholds, each of which is kept where a given share of values lies above it.

    Args:
        count: number of thresholds.
        dial: the argument of `turn_dial` that shifts them.
        rate: fraction of the distance to the quantile that an update moves. In (0, 1].
    """

    values: Float[Tensor, " count"]

    def __init__(self, count: int, dial: Dial, rate: float = 0.3) -> None:
        super().__init__()
        self.dial, self.rate = dial, rate
        self.shift = 0.0
        self.register_buffer("values", torch.zeros(count))

    def current(self) -> Float[Tensor, " count"]:
        """The thresholds to compare with; outside of training, shifted by the dial."""
        return self.values if self.training else self.values + self.shift

    @torch.no_grad()
    def histogram(
        self, index: int, values: Float[Tensor, "..."], is_counted: Bool[Tensor, "..."] | None
    ) -> Float[Tensor, " bins"]:
        """Counts of values around threshold `index`, to be summed over batches and ranks.

        The width of a bin is proportional to its distance from the threshold, so that any scale is
        resolved.
        """
        # In fp64, because the position among the bins is a large number: in fp32, values that
        # layouts round differently could fall into different bins.
        distance = torch.asinh((values.double() - self.values[index]) / _FINEST) / _REACH
        bins = ((distance + 1) / 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1).flatten()
        counts = torch.ones_like(bins, dtype=torch.float32)
        if is_counted is not None:
            counts = is_counted.flatten().float()
        return torch.zeros(NUM_BINS, device=bins.device).index_add(0, bins, counts)

    @torch.no_grad()
    def follow(
        self, histograms: Float[Tensor, "count bins"], shares: Float[Tensor, " count"]
    ) -> None:
        """Move thresholds towards the values that `shares` of the counted values exceed.

        A threshold without counted values stays. Call this outside the forward pass, with the
        histograms taken since the last call.
        """
        cumulative = histograms.double().cumsum(dim=1)
        total = cumulative[:, -1:]
        wanted = total * (1 - shares.to(total))[:, None]
        bins = torch.searchsorted(cumulative, wanted).clamp(max=NUM_BINS - 1)
        inside = histograms.double().gather(1, bins)
        below = cumulative.gather(1, bins) - inside
        place = bins + ((wanted - below) / inside.clamp(min=1)).clamp(0, 1)
        distance = torch.sinh((place / NUM_BINS * 2 - 1) * _REACH) * _FINEST
        move = torch.where(total > 0, self.rate * distance, 0)[:, 0]
        self.values += move.to(self.values)
