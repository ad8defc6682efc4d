"""The samples that a process reads, and where it resumes."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchOrder:
    """The batches of one data-parallel rank. It can be a `batch_sampler` of PyTorch's DataLoader.

    Ranks take turns: batch `i` of the whole run starts at sample `first + i·size` and is read by rank
    `i % ranks`. Samples at the end that do not fill a batch are not read.

    Raises:
        ValueError: a number is out of range.
    """

    end: int
    """Number of samples. At least 0."""
    size: int
    """Number of samples in a batch. At least 1."""
    first: int = 0
    """Number of the first sample, where a run resumes. At least 0."""
    rank: int = 0
    """Data-parallel rank, from 0 to `ranks - 1`."""
    ranks: int = 1
    """Number of data-parallel ranks. At least 1."""

    def __post_init__(self) -> None:
        for name, minimum in (("end", 0), ("size", 1), ("first", 0), ("ranks", 1)):
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"BatchOrder: {name}={value} must be at least {minimum}.")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(
                f"BatchOrder: rank={self.rank} must be between 0 and ranks-1={self.ranks - 1}."
            )

    def __iter__(self) -> Iterator[range]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> range:
        """The sample numbers of batch `index` of this rank.

        Raises:
            IndexError: the rank has fewer batches.
        """
        start = self._starts[index]
        return range(start, start + self.size)

    @property
    def _starts(self) -> range:
        size = self.size
        return range(self.first + self.rank * size, self.end - size + 1, self.ranks * size)
