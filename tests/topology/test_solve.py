"""Sizes and a world size become a mesh, exactly, or every reason why not."""

import itertools
from math import prod

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.strategies import STRATEGIES, find_strategy
from nemo_dist_conf.topology.solve import solve
from nemo_dist_conf.wording import Spelling

FSDP2, MEGATRON, DDP = (find_strategy(name).axes for name in ("fsdp2", "megatron_fsdp", "ddp"))


def sizes(**changed):
    base = dict(dp_size=None, dp_replicate_size=None, tp_size=1, pp_size=1, cp_size=1, ep_size=1)
    return base | changed


def test_every_solved_mesh_covers_the_world_and_every_refusal_is_right():
    """All sizes up to 4 on all worlds up to 16, against the definition written out independently."""
    solved = 0
    for world, tp, pp, cp, replicate in itertools.product(range(1, 17), (1, 2, 3, 4), (1, 2), (1, 2), (1, 2, 4)):
        wanted = sizes(tp_size=tp, pp_size=pp, cp_size=cp, dp_replicate_size=replicate)
        dp, rest = divmod(world, tp * pp * cp)
        possible = rest == 0 and dp > 0 and (replicate == 1 or (dp % replicate == 0 and replicate < dp))
        try:
            mesh = solve(wanted, world, FSDP2)
        except ConfigError:
            assert not possible, (world, wanted)
            continue
        assert possible, (world, wanted)
        solved += 1
        assert prod(mesh.shape) == world
        assert mesh.axes == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        assert mesh.shape == (pp, replicate, dp // replicate, cp, tp)
        assert mesh.size("dp") == dp and mesh.size("dp_shard_cp") == dp // replicate * cp
        assert mesh.size("dp_cp") == dp * cp
    assert solved >= 100


@pytest.mark.parametrize("world", [1, 2, 6, 64, 131072])
def test_an_explicit_dp_size_must_make_the_product_exact(world):
    assert solve(sizes(dp_size=world), world, FSDP2).size("dp") == world
    with pytest.raises(ConfigError, match="ranks, but there are"):
        solve(sizes(dp_size=world + 1), world, FSDP2)


def test_experts_get_a_mesh_over_the_ranks_of_a_stage():
    mesh = solve(sizes(ep_size=4, tp_size=2), 8, FSDP2)
    assert (mesh.moe_axes, mesh.moe_shape) == (("ep_shard", "ep"), (2, 4))
    mesh = solve(sizes(ep_size=2, pp_size=2), 8, FSDP2)
    assert (mesh.moe_axes, mesh.moe_shape) == (("pp", "ep_shard", "ep"), (2, 2, 2))
    assert mesh.size("ep") == 2
    with pytest.raises(ConfigError, match="does not divide the 6 ranks"):
        solve(sizes(ep_size=4), 6, FSDP2)


def test_megatron_fsdp_and_ddp_have_meshes_of_their_own():
    mesh = solve(sizes(tp_size=2, cp_size=2), 8, MEGATRON)
    assert (mesh.axes, mesh.shape, mesh.size("dp_cp")) == (("dp", "cp", "tp"), (2, 2, 2), 4)
    assert solve(sizes(), 4, DDP).shape == (4,)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_each_axis_a_strategy_lacks_is_refused_with_the_reason(strategy):
    fields = {"dp_replicate": "dp_replicate_size", "tp": "tp_size", "pp": "pp_size", "cp": "cp_size", "ep": "ep_size"}
    for axis, field in fields.items():
        if axis in strategy.axes.allowed:
            continue
        with pytest.raises(ConfigError) as caught:
            solve(sizes(**{field: 2}), 4, strategy.axes)
        assert f"strategy={strategy.name}" in caught.value.asked
        assert field in caught.value.what and strategy.name in caught.value.allowed
        solve(sizes(**{field: 1}), 4, strategy.axes)


@pytest.mark.parametrize("value", [0, -1, 2.5, "2", True, None])
def test_a_size_that_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(ConfigError) as caught:
        solve(sizes(tp_size=value), 4, FSDP2)
    assert caught.value.type == "parallelism.tp_size=1"


def test_all_wrong_sizes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        solve(sizes(tp_size=0, pp_size=-3, dp_size=0), 4, FSDP2)
    assert len(caught.value.problems) == 3


def test_words_are_relocated_below_a_package():
    with pytest.raises(ConfigError) as caught:
        solve(sizes(tp_size=2), 2, DDP, Spelling("dist"))
    assert caught.value.type == "strategy@dist.strategy=fsdp2 dist.parallelism.tp_size=2"


def test_one_process_is_told_how_to_start_more():
    with pytest.raises(ConfigError) as caught:
        solve(sizes(tp_size=4, dp_size=2), 1, FSDP2, launch="torchrun --nproc-per-node {n} mine.py {asked}")
    words = "parallelism.dp_size=2 parallelism.tp_size=4"
    assert caught.value.type == f"torchrun --nproc-per-node 8 mine.py {words}"
