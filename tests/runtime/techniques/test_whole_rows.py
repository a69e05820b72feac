"""Which dims of what a module is given and returns are the tokens of a row."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.techniques.context.whole_rows import COUNT, FLAT, TokenDims, kept_tokens, token_dims

ROWS = 2


class Mixer(nn.Module):
    """gives: what it is given beside the hidden states, of a row of so many tokens; returns: what it makes of them."""

    def __init__(self, gives: Callable[[int], dict[str, Any]], returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.gives, self.inner = gives, _Inner(returns)

    def forward(self, x_BSH: Tensor) -> Any:
        return self.inner(x_BSH, **self.gives(x_BSH.size(1)))


class _Inner(nn.Module):
    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, x_BSH: Tensor, more: Any = None, **others: Any) -> Any:
        return self.returns(x_BSH)


def dims(
    gives: Callable[[int], Any] = lambda length: None, returns: Callable[[Tensor], Any] = torch.clone
) -> TokenDims:
    model = Mixer(lambda length: {"more": gives(length)}, returns)
    runs = {length: lambda length=length: model(torch.zeros(ROWS, length, 8)) for length in (16, 24)}
    return token_dims(model, _Inner, runs, ROWS)


@pytest.mark.parametrize(
    ("gives", "place", "wanted"),
    [
        (lambda length: torch.zeros(16), "more", ()),
        (lambda length: torch.zeros(16, length), "more", (1,)),
        (lambda length: torch.zeros(ROWS * length, 16), "more", FLAT),
        (lambda length: torch.zeros(ROWS, 1, length, length), "more", (2, 3)),
        (lambda length: (torch.zeros(1, length, 4), 3), "more.0", (1,)),
        (lambda length: {"window": 3}, "more.window", ()),
        (lambda length: [None, length], "more.1", COUNT),
    ],
)
def test_tokens_are_where_the_length_is(gives: Callable[[int], Any], place: str, wanted: tuple[int, ...]) -> None:
    assert dims(gives).given[place] == wanted


def test_of_queries_and_keys_that_are_returned_a_rank_has_its_queries() -> None:
    found = dims(returns=lambda x_BSH: (x_BSH, x_BSH @ x_BSH.mT, x_BSH.sum()))
    assert found.returned == {"0": (1,), "1": (1,), "2": ()}


@pytest.mark.parametrize(
    ("gives", "text"),
    [
        (lambda length: torch.zeros(length + 1), "more has the shape"),
        (lambda length: 2 * length, "more is 32 for 16 tokens"),
        (lambda length: torch.zeros((1,) * (length // 8)), "more is not the same"),
    ],
)
def test_what_is_no_row_is_told(gives: Callable[[int], Any], text: str) -> None:
    with pytest.raises(NotImplementedError, match=text):
        dims(gives)


def test_what_returns_nothing_for_each_token_is_told() -> None:
    with pytest.raises(NotImplementedError, match="returns nothing for each of a row's tokens"):
        dims(returns=lambda x_BSH: x_BSH.mean(1))


def test_one_token_is_taken_and_all_others_are_as_before() -> None:
    before, after = torch.zeros(ROWS, 4), torch.ones(ROWS, 4)
    flat = TokenDims({}, {"0": (1,), "1": FLAT, "2": ()})
    found = kept_tokens((after, after.view(8), after), (before, before.view(8), before), flat, ROWS, 4, 2)
    assert found[0].tolist() == [[0, 0, 1, 0]] * ROWS and found[1].tolist() == [0, 0, 1, 0] * ROWS
    assert found[2] is before
