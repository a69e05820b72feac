"""Which rows of a dataset each data rank reads, batch after batch, and where a run goes on after a stop.

Shapes: R rows of the dataset, B rows of a global batch, D data ranks; a rank reads B / D rows of each batch.
"""

from __future__ import annotations

import math
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.own_loop.row_order import RowOrder, mix_seed
from nemo_dist_conf.runtime.device_meshes import MeshContext

__all__ = ["GlobalBatches"]

#: Arguments of torch's DataLoader that say which rows there are, which is said here.
_OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")


class GlobalBatches:
    """Global batches of a dataset with a length, the same rows in each whatever the number of ranks.

    Every row comes once an epoch, in an order drawn from (seed, epoch). A batch at the end of an epoch is filled up
    from the next one, so all batches but the last have B rows. The state is how many rows have been handed out, which
    says nothing of ranks or of B: a run goes on with the next unseen row on any number of ranks. Ranks of tp, cp and
    pp read what their data rank reads.
    """

    def __init__(
        self,
        rows: int,
        size: int,
        mesh: MeshContext,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = 1,
        last: str = "pad",
    ) -> None:
        """rows: R, the dataset's length. size: B. mesh: ``setup.mesh_context``. epochs: None: without end.

        last: of a last batch with fewer rows than B; ``pad``: filled up with rows that come next in the order,
        which ``counted`` tells apart; ``drop``: left out.
        Raises ConfigError for a size that the data ranks do not divide and for what leaves no batch.
        """
        self.rows, self.size, self.mesh, self.epochs, self.last = rows, size, mesh, epochs, last
        ConfigError.raise_if(list(self._problems()))
        self._order = RowOrder(rows, seed, shuffle)
        self._taken = 0
        #: Which rows of this rank's part of the batch that was handed out last count, [B / D] bool; the others fill up.
        self.counted = torch.ones(size // mesh.data_size, dtype=torch.bool)

    def _problems(self) -> Iterator[Problem]:
        ranks, shown = self.mesh.data_size, f"GlobalBatches(rows={self.rows}, size={self.size}"
        for name, value in (("rows", self.rows), ("size", self.size), ("epochs", self.epochs)):
            if not (name == "epochs" and value is None) and (type(value) is not int or value < 1):
                what, allowed = f"{name}={value!r} is no number of {name}", "1 or more"
                yield Problem(what=what, asked=f"GlobalBatches({name}={value!r})", allowed=allowed, instead=f"{name}=1")
                return
        if self.last not in ("pad", "drop"):
            what, allowed = f"last={self.last!r} is nothing that is done with a last batch", "pad, drop"
            yield Problem(what=what, asked=f"GlobalBatches(last={self.last!r})", allowed=allowed, instead='last="pad"')
        if self.size % ranks:
            better = self.size // ranks * ranks or ranks
            what = f"a global batch of {self.size} rows does not split over {ranks} data ranks"
            yield Problem(what=what, asked=f"{shown})", allowed=f"multiples of {ranks}", instead=f"size={better}")
        elif self.last == "drop" and self.epochs is not None and self.rows * self.epochs < self.size:
            what = f"{self.rows * self.epochs} rows make no batch of {self.size}"
            yield Problem(what=what, asked=f'{shown}, last="drop")', allowed='last="pad"', instead='last="pad"')

    @property
    def taken(self) -> int:
        """Rows handed out so far, of all ranks together and over all epochs; without those that filled up."""
        return self._taken

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, of the next row."""
        return self._taken // self.rows

    @property
    def _end(self) -> int | None:
        return None if self.epochs is None else self.rows * self.epochs

    def __len__(self) -> int:
        """Batches that are left. Raises TypeError where there is no end."""
        if self._end is None:
            raise TypeError("GlobalBatches(epochs=None) has no end, so no length")
        return int(self.left(self._taken))

    def left(self, taken: int) -> float:
        """Batches after ``taken`` rows; inf without an end."""
        if self._end is None:
            return math.inf
        rows = self._end - taken
        return max(0, rows // self.size if self.last == "drop" else -(-rows // self.size))

    def hand_out(self) -> None:
        """Take note that the loop has the next batch; the loader does."""
        _, self.counted = self.ids(self._taken)
        self._taken += self.size
        if self._end is not None:
            self._taken = min(self._taken, self._end)

    def rewind(self) -> None:
        """Begin anew with the first row: for a validation set, which is read whole each time."""
        self._taken = 0

    def state_dict(self) -> dict[str, int]:
        """For ``objects`` of a checkpoint; the same on every rank."""
        return {"taken": self._taken, "rows": self.rows, "seed": self._order.seed, "shuffle": int(self._order.shuffle)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the next unseen row. Raises ConfigError for a state of other rows or of another order."""
        mine = self.state_dict()
        others = {key: int(state[key]) for key in mine if key != "taken" and int(state[key]) != mine[key]}
        if others:
            then, now = (", ".join(f"{key}={values[key]}" for key in others) for values in (state, mine))
            what = f"the rows that were seen are those of GlobalBatches({then}), not of GlobalBatches({now})"
            allowed = "the same dataset and order; or GlobalBatches that are not among the objects to restore"
            raise ConfigError(Problem(what=what, asked=f"GlobalBatches({now})", allowed=allowed, instead=then))
        self._taken = int(state["taken"])

    def ids(self, taken: int) -> tuple[Tensor, Tensor]:
        """Rows of this rank in the batch that begins after ``taken`` rows, and which of them count; both [B / D]."""
        part = self.size // self.mesh.data_size
        begin = taken + self.mesh.data_rank * part
        counted = torch.arange(begin, begin + part) < (self._end if self._end is not None else begin + part)
        return self._order.ids(begin, part), counted

    def loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """torch's DataLoader of this rank's rows, from the next unseen one on each time that it is iterated.

        options: DataLoader's own but for those that choose rows. What workers have fetched ahead counts as handed out
        only once the loop has it.
        Raises ConfigError for a dataset without a length or of another one.
        """
        asked = f"batches.loader({type(dataset).__name__}(...))"
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            what, allowed = "a dataset that is a stream has no rows to share out", "one with __len__ and __getitem__"
            raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="a dataset with __len__"))
        if len(dataset) != self.rows:
            what, instead = f"the dataset has {len(dataset)} rows, not {self.rows}", f"rows={len(dataset)}"
            raise ConfigError(Problem(what=what, asked=asked, allowed=f"{self.rows} rows", instead=instead))
        given = [name for name in _OURS if name in options]
        if given:
            what = f"{', '.join(given)}: which rows a batch has is said by GlobalBatches"
            words, allowed = ", ".join(f"{name}={options[name]!r}" for name in given), "DataLoader's other arguments"
            instead = "GlobalBatches(rows, size, mesh, shuffle=..., last=...)"
            raise ConfigError(Problem(what=what, asked=f"loader(..., {words})", allowed=allowed, instead=instead))
        # A generator of its own: torch would draw the workers' seeds from the one that dropout draws from.
        options.setdefault("generator", torch.Generator().manual_seed(mix_seed(self._order.seed, self.rows)))
        return _Loader(self, dataset, options)


class _Loader(DataLoader[Any]):
    """Counts a batch as handed out when the loop gets it."""

    def __init__(self, batches: GlobalBatches, dataset: Dataset[Any], options: dict[str, Any]) -> None:
        self._batches = batches
        super().__init__(dataset, batch_sampler=_Ahead(batches), **options)

    def __iter__(self) -> Any:
        batches = self._batches
        for batch in super().__iter__():
            batches.hand_out()
            yield batch


class _Ahead:
    """Lists of this rank's rows, as far ahead of the loop as workers fetch."""

    def __init__(self, batches: GlobalBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches, taken = self.batches, self.batches.taken
        while batches.left(taken) > 0:
            yield batches.ids(taken)[0].tolist()
            taken += batches.size
