"""Token ids -> windows -> the batch of a step, a function of (seed, step) whatever the layout.

Shapes: N windows, B rows (sequences) of a batch, S tokens of a sequence.
"""

from __future__ import annotations

from typing import Any, Mapping, Protocol

from torch import Tensor

from nemo_dist_conf.errors import DataError
from nemo_dist_conf.own_loop.row_order import RowOrder
from nemo_dist_conf.recipe.value_checks import data_problems
from nemo_dist_conf.runtime.config_targets import build_target
from nemo_dist_conf.train.corpus import Corpus, data_error, load_corpus

__all__ = ["DataSource", "TextData", "build_data", "split_microbatches"]


class DataSource(Protocol):
    """What the training loop asks of data, ours or the user's own (``data._target_``)."""

    def batch(self, step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
        """Rows of part ``rank`` of ``size`` of the global batch of ``step`` (counted from 0).

        Returns input ids and labels, both [B / size, S], int64, on the CPU. Labels are the next tokens, already
        shifted; -100 marks a position that does not count.
        """


class TextData:
    """Batches of a text; the batch of a step depends on (seed, step, global_batch_size) and nothing else.

    The tokens are cut into N windows of seq_len + 1 that overlap by one token, so that every token but the first
    is predicted once. Each epoch visits all windows in an order drawn from (seed, epoch); a batch that reaches
    the end of an epoch goes on with the next, so nothing is dropped and every step has the same size.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, global_batch_size: int, seed: int) -> None:
        """Raises DataError where the text has no window of seq_len + 1 tokens."""
        tokens = corpus.tokens.numel()
        if tokens < seq_len + 1:
            what = f"data.seq_len={seq_len}: the text has {tokens:,} tokens, one sequence needs seq_len + 1"
            longer = "a longer text (data.path)"
            if tokens < 2:
                raise data_error(what, f"data.seq_len={seq_len}", longer, "data.path=null")
            allowed = f"1 to {tokens - 1}, or {longer}"
            raise data_error(what, f"data.seq_len={seq_len}", allowed, f"data.seq_len={tokens - 1}")
        self.corpus = corpus
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._shift = 0  # rows
        self._windows_NS = corpus.tokens.unfold(0, seq_len + 1, seq_len)  # a view: nothing is copied
        self._order = RowOrder(self.num_windows, seed)

    @property
    def num_windows(self) -> int:
        return self._windows_NS.size(0)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that the loss of a step counts, over all ranks."""
        return self.global_batch_size * self.seq_len

    def go_on(self, step: int, rows: int) -> None:
        """Let the batch of ``step`` begin after so many rows, where the steps before it had batches of other sizes."""
        self._shift = rows - step * self.global_batch_size

    def window_ids(self, step: int, rank: int = 0, size: int = 1) -> Tensor:
        """Which windows make up part ``rank`` of ``size`` of the global batch of ``step``, [B / size]."""
        assert 0 <= rank < size and self.global_batch_size % size == 0, (rank, size, self.global_batch_size)
        rows = self.global_batch_size // size
        begin = self._shift + step * self.global_batch_size + rank * rows
        return self._order.ids(begin, rows)

    def batch(self, step: int, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
        """Input ids and labels, both [B / size, S] int64: the contiguous rows of data rank ``rank`` of ``size``."""
        rows_BS = self._windows_NS[self.window_ids(step, rank, size)].long()
        return rows_BS[:, :-1].contiguous(), rows_BS[:, 1:].contiguous()


def split_microbatches(input_ids_BS: Tensor, labels_BS: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    """The local rows in equal pieces of ``rows``, in order."""
    assert input_ids_BS.size(0) % rows == 0, (input_ids_BS.shape, rows)
    return list(zip(input_ids_BS.split(rows), labels_BS.split(rows)))


def build_data(node: Any, *, global_batch_size: int, seed: int) -> DataSource:
    """The data of a run from the config node ``data``.

    Plain keys (path, tokenizer, seq_len, max_mb) make a TextData. With ``_target_`` the user's own object is built;
    it is given global_batch_size and seed as keyword arguments and must have ``batch(step, rank, size)``.
    Raises ConfigError or DataError with what to type instead.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(values, Mapping):
        raise data_error(
            f"data: expected a group of settings, got {values!r}",
            f"data={values}",
            "data=text, or a node with _target_",
            "data=text",
        )
    if "_target_" in values:
        sizes = {"global_batch_size": global_batch_size, "seed": seed}
        built = build_target(node, "data", instead="data=text", **sizes)
        if not callable(getattr(built, "batch", None)):
            raise data_error(
                f"data: {type(built).__name__} has no method batch(step, rank, size)",
                f"data._target_={values['_target_']}",
                "a class or function whose result has batch(step, rank, size) -> (input_ids, labels)",
                "data=text",
            )
        return built
    DataError.raise_if(data_problems(values))
    corpus = load_corpus(values.get("path"), values.get("tokenizer"), values.get("max_mb"))
    return TextData(corpus, seq_len=values["seq_len"], global_batch_size=global_batch_size, seed=seed)
