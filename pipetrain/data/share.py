"""Which rows of a mini-batch one replica of the pipeline has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """One replica's part of every mini-batch: as many micro-batches as each of the others has, one behind the other.

    Attributes:
        replica: which one, of `replicas`.
        num_microbatches: of the whole mini-batch, a multiple of `replicas`.
    """

    replica: int = 0
    replicas: int = 1
    num_microbatches: int = 1

    def microbatches(self, rows: int) -> int:
        """Micro-batches of each replica: fewer where there are fewer rows, and one even where not all have any."""
        return max(1, min(self.num_microbatches, rows) // self.replicas)

    def rows(self, rows: int) -> slice:
        """The replica's of a mini-batch of so many; none where it has fewer than replicas.

        Micro-batches differ by at most one row, larger ones first, through all replicas.

        >>> [Share(replica, 2, 4).rows(6) for replica in range(2)]
        [slice(0, 4, None), slice(4, 6, None)]
        """
        each = self.microbatches(rows)
        least, larger = divmod(rows, self.replicas * each)

        def before(replica: int) -> int:
            return replica * each * least + min(replica * each, larger)

        return slice(before(self.replica), before(self.replica + 1))


WHOLE = Share()
