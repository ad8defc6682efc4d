"""Which samples a process reads, and where it resumes."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchOrder:
    """Batches of one data-parallel rank: also a `batch_sampler` of PyTorch's DataLoader.

    Ranks take turns: batch `i` of the whole run, samples `first + i·size` and on, is for rank
    `i % ranks`. What is left at the end and does not fill a batch is not read.

    Raises:
        ValueError: a number is out of its range.
    """

    end: int
    """Number of samples there are. At least 0."""
    size: int
    """Samples in a batch. At least 1."""
    first: int = 0
    """Number of the first sample: where a run resumes. At least 0."""
    rank: int = 0
    """Data-parallel rank. From 0 to `ranks - 1`."""
    ranks: int = 1
    """Data-parallel ranks. At least 1."""

    def __post_init__(self) -> None:
        for name, minimum in (("end", 0), ("size", 1), ("first", 0), ("ranks", 1)):
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"BatchOrder: {name}={value} must be at least {minimum}.")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(
                f"BatchOrder: rank={self.rank} must lie between 0 and ranks-1={self.ranks - 1}."
            )

    def __iter__(self) -> Iterator[range]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> range:
        """Sample numbers of this rank's batch `index`.

        Raises:
            IndexError: there is no such batch.
        """
        start = self._starts[index]
        return range(start, start + self.size)

    @property
    def _starts(self) -> range:
        size = self.size
        return range(self.first + self.rank * size, self.end - size + 1, self.ranks * size)
