"""Context parallelism cuts a sequence into two equal chunks a rank, and what is offered can be cut so."""

import pytest

from nemo_dist_conf.topology.sequence_chunks import chunk_problem, splits_evenly
from nemo_dist_conf.wording import Spelling


@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 7, 12, 16, 100])
def test_what_does_not_split_is_refused_with_a_length_that_does(tokens, cp_size):
    problem = chunk_problem(tokens, cp_size)
    assert (problem is None) == splits_evenly(tokens, cp_size) == (cp_size == 1 or tokens % (2 * cp_size) == 0)
    if problem is not None:
        offered = int(problem.instead.removesuffix(" tokens"))
        assert chunk_problem(offered, cp_size) is None and 0 < abs(offered - tokens) < 2 * cp_size


def test_a_config_is_told_the_keys():
    problem = chunk_problem(10, 4, Spelling("dist"))
    assert problem is not None
    assert (problem.asked, problem.instead) == ("dist.parallelism.cp_size=4 data.seq_len=10", "data.seq_len=8")
