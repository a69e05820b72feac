"""Ranks from torchrun's and Slurm's variables."""

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.topology.world import Launched, launched

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launched()),
        (TORCHRUN, Launched(3, 4, 1, "torchrun")),
        (SLURM, Launched(5, 8, 1, "Slurm")),
        ({**SLURM, **TORCHRUN}, Launched(3, 4, 1, "torchrun")),
        ({"SLURM_NTASKS": "8"}, Launched()),  # inside salloc, without srun: one process
    ],
)
def test_place_among_the_ranks(environ, expected):
    assert launched(environ) == expected


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launched({"RANK": "0", "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node[003-005,9],other", "node003"), ("a,b", "a"), ("gpu-[07,09]", "gpu-07")],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    from nemo_dist_conf.ranks.meeting import _first_host

    assert _first_host(nodes) == first
