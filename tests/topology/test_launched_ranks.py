"""Ranks from torchrun's and Slurm's variables."""

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.topology.launched_ranks import Launched, launched

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
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launched(0, 1, 1, "Slurm")),  # a step of one
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_ID": "2"}, Launched(5, 6, 1, "Slurm")),  # a part of the job
        ({**SLURM, "ENVIRONMENT": "BATCH"}, Launched()),  # a line of a batch script without srun
        ({**SLURM, "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}, Launched(5, 8, 1, "Slurm")),
    ],
)
def test_place_among_the_ranks(environ, expected):
    assert launched(environ) == expected


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launched({"RANK": "0", "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[003-005,9],other", "node003"),
        ("a,b", "a"),
        ("gpu-[07,09]", "gpu-07"),
        ("rack[1-2]node[01-16]", "rack1node01"),
        ("r[3,5-7]c[00-03]s[1-2]-ib,login", "r3c00s1-ib"),
        ("tux[0-2]x,tux[4]y", "tux0x"),
        ("[2-3]node", "2node"),
        ("node-1.cluster,node-2.cluster", "node-1.cluster"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    from nemo_dist_conf.composition.agreement.rendezvous import _first_host

    assert _first_host(nodes) == first
