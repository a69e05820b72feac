"""The order in which rows of a dataset are visited: a function of a seed, the same on every rank and layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["RowOrder", "mix_seed"]


def mix_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RowOrder:
    """Every row once an epoch, epoch after epoch, each in an order drawn from (seed, epoch)."""

    def __init__(self, rows: int, seed: int, shuffle: bool = True) -> None:
        """rows: of the dataset. shuffle: false: each epoch is 0, 1, 2, ..."""
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self._drawn: dict[int, Tensor] = {}  # epoch -> permutation; the last two used

    def _of_epoch(self, epoch: int) -> Tensor:
        if not self.shuffle:
            epoch = 0
        if epoch not in self._drawn:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            while len(self._drawn) >= 2:
                self._drawn.pop(next(iter(self._drawn)))
            order = torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)
            self._drawn[epoch] = order
        return self._drawn[epoch]

    def ids(self, begin: int, count: int) -> Tensor:
        """Which rows are visited as number ``begin`` to ``begin + count - 1``, counted over epochs, [count] int64."""
        found: list[Tensor] = []
        while count > 0:
            epoch, offset = divmod(begin, self.rows)
            piece = self._of_epoch(epoch)[offset : offset + count]
            found.append(piece)
            begin += len(piece)
            count -= len(piece)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
