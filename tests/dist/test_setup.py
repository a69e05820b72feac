"""DistributedSetup.build and MeshContext on real ranks, and on the fake process group where ranks are many."""

import dataclasses
import itertools
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf import (
    ConfigError,
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    MeshContext,
    MoEParallelizerConfig,
    ParallelismSizes,
    PipelineConfig,
)
from tests import warm
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


def facts(context: MeshContext) -> dict:
    names = ("pp_size", "tp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size", "dp_shard_size")
    return {name: getattr(context, name) for name in (*names, "pp_enabled", "world_size", "data_rank", "data_size")}


def build(**sizes):
    """Facts of this rank's meshes, and the ranks that a sum over the data axes reaches."""
    strategy = sizes.pop("strategy", "fsdp2")
    setup = DistributedSetup.build(strategy, ParallelismSizes(**sizes))
    context = setup.mesh_context
    reached = torch.zeros(torch.distributed.get_world_size())
    reached[torch.distributed.get_rank()] = 1
    context.sum_over_data(reached)
    return facts(context), context.layout(), reached.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("sizes", "layout", "data_ranks", "reached_by_rank_0"),
    [
        (dict(strategy="ddp"), "dp 4", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(), "dp_shard 4", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(dp_replicate_size=2), "dp_replicate 2 x dp_shard 2", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(tp_size=2), "dp_shard 2 x tp 2", [0, 0, 1, 1], [0, 2]),
        (dict(tp_size=4), "tp 4", [0, 0, 0, 0], [0]),
        (dict(pp_size=2), "pp 2 x dp_shard 2", [0, 1, 0, 1], [0, 1]),
        (dict(cp_size=2), "dp_shard 2 x cp 2", [0, 0, 1, 1], [0, 1, 2, 3]),
        (dict(ep_size=2), "dp_shard 4 x ep 2", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(strategy="mfsdp", tp_size=2), "dp 2 x tp 2", [0, 0, 1, 1], [0, 2]),
    ],
    ids=str,
)
def test_meshes_of_four_ranks(sizes, layout, data_ranks, reached_by_rank_0):
    found = run_ranks(4, build, **sizes)
    assert [found[rank][1] for rank in range(4)] == [layout] * 4
    assert [found[rank][0]["data_rank"] for rank in range(4)] == data_ranks
    assert found[0][2] == reached_by_rank_0
    sizes.pop("strategy", None)
    for name, size in sizes.items():
        assert all(found[rank][0][name] == size for rank in range(4)), name
    assert all(found[rank][0]["world_size"] == 4 for rank in range(4))
    assert found[0][0]["data_size"] == found[0][0]["dp_size"] == max(data_ranks) + 1


def groups_by_axis(**sizes):
    """Of every axis its group's name and ranks, what a sum over it gives, and the same for torch's own mesh."""
    context = DistributedSetup.build("fsdp2", ParallelismSizes(**sizes)).mesh_context
    found = {}
    meshes: list[Any] = [mesh for mesh in (context.device_mesh, context.moe_mesh) if mesh is not None]
    for mesh in meshes:
        for axis in mesh.mesh_dim_names:
            group, ones = mesh.get_group(axis), torch.ones(1)
            dist.all_reduce(ones, group=group)
            usual = init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)
            assert mesh.get_coordinate() == usual.get_coordinate() and (mesh.mesh == usual.mesh).all()
            assert mesh[axis].get_group() is group
            assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(usual.get_group(axis))
            found[mesh, axis] = group.group_name, mesh.size(mesh.mesh_dim_names.index(axis)), ones.item()
    return {(names.ndim, axis): value for (names, axis), value in found.items()}


@pytest.mark.parametrize(
    "sizes", [dict(), dict(tp_size=2), dict(tp_size=4), dict(pp_size=2, ep_size=2), dict(cp_size=2, ep_size=4)], ids=str
)
def test_axes_of_one_rank_share_one_group_and_the_others_have_the_ranks_that_torch_gives_them(sizes):
    for found in run_ranks(4, groups_by_axis, **sizes):
        assert all(total == size for _, size, total in found.values())
        alone = {name for name, size, _ in found.values() if size == 1}
        wide = {name for name, size, _ in found.values() if size > 1}
        assert len(alone) <= 2 and not alone & wide  # the root mesh's and the experts'
        assert sum(size == 1 for _, size, _ in found.values()) > len(alone) or not alone


NAMES: dict[str, tuple[str, ...]] = {"dp": ("dp_replicate", "dp_shard"), "dp_shard_cp": ("dp_shard", "cp")}
NAMES["dp_cp"] = ("dp_replicate", "dp_shard", "cp")


def joined_axes(**sizes):
    """Ranks that ``device_mesh[name]`` reaches, on its own and as a group; and how many groups the meshes have."""
    warnings.simplefilter("ignore")  # torch's, of taking a flattened axis out of its root
    context = DistributedSetup.build("fsdp2", ParallelismSizes(**sizes)).mesh_context
    root: Any = context.device_mesh
    found = {}
    shape = dict(zip(root.mesh_dim_names, root.shape))
    for name, axes in NAMES.items():
        mesh, ones = root[name], torch.ones(1)
        dist.all_reduce(ones, group=mesh.get_group())
        wide = [axis for axis in axes if shape[axis] > 1]
        assert root.get_group(name) is mesh.get_group() and mesh.mesh_dim_names == (name,)
        assert mesh.size() == context.size(name) == ones.item()
        assert mesh.mesh.tolist() == dist.get_process_group_ranks(mesh.get_group())
        assert mesh.get_local_rank() == mesh.get_coordinate()[0]
        if len(wide) == 1:
            assert mesh.get_group() is root.get_group(wide[0])
        found[name] = mesh.mesh.tolist()
    assert root["dp_replicate", "dp_shard_cp"].shape == (shape["dp_replicate"], shape["dp_shard"] * shape["cp"])
    groups = [root.get_group(name) for name in (*root.mesh_dim_names, *NAMES)]
    shared = {tuple(dist.get_process_group_ranks(g)): g.group_name for g in groups if g.size() > 1}
    assert len({g.group_name for g in groups if g.size() > 1}) == len(shared)  # no two of the same ranks
    return found


@pytest.mark.parametrize(
    ("sizes", "of_rank_0"),
    [
        (dict(), {"dp": [0, 1, 2, 3], "dp_shard_cp": [0, 1, 2, 3], "dp_cp": [0, 1, 2, 3]}),
        (dict(tp_size=4), {"dp": [0], "dp_shard_cp": [0], "dp_cp": [0]}),
        (dict(cp_size=4), {"dp": [0], "dp_shard_cp": [0, 1, 2, 3], "dp_cp": [0, 1, 2, 3]}),
        (dict(cp_size=2), {"dp": [0, 2], "dp_shard_cp": [0, 1, 2, 3], "dp_cp": [0, 1, 2, 3]}),
        (dict(dp_replicate_size=2), {"dp": [0, 1, 2, 3], "dp_shard_cp": [0, 1], "dp_cp": [0, 1, 2, 3]}),
        (dict(pp_size=2, ep_size=2), {"dp": [0, 1], "dp_shard_cp": [0, 1], "dp_cp": [0, 1]}),
    ],
    ids=str,
)
def test_names_of_several_axes_answer_whatever_the_sizes(sizes, of_rank_0):
    assert run_ranks(4, joined_axes, **sizes)[0] == of_rank_0


def one_rank_names():
    warnings.simplefilter("ignore")
    mesh: Any = DistributedSetup.build("fsdp2").mesh_context.device_mesh
    megatron: Any = DistributedSetup.build("megatron_fsdp").mesh_context.device_mesh
    return [mesh[name].size() for name in NAMES] + [megatron["dp"].size(), megatron["dp_cp"].size()]


def test_one_rank_has_all_names_too():
    assert run_ranks(1, one_rank_names) == [[1] * 5]


def timeouts():
    from nemo_dist_conf.runtime.process_group import host_group

    found = set()
    for sizes in (dict(cp_size=2), dict(dp_replicate_size=2), dict(pp_size=2, ep_size=2)):
        context = DistributedSetup.build("fsdp2", ParallelismSizes(**sizes)).mesh_context
        meshes: list[Any] = [context.device_mesh, *([context.moe_mesh] if context.moe_mesh else [])]
        groups = itertools.chain(*(mesh.get_all_groups() for mesh in meshes))
        for group in [*groups, *(meshes[0].get_group(name) for name in NAMES), host_group(apart=True)]:
            found.add(group._get_backend(torch.device("cpu")).options._timeout)
    world: Any = dist.group.WORLD
    default = world._get_backend(torch.device("cpu")).options._timeout
    return found, default


def test_every_group_of_the_meshes_has_the_timeout_of_the_process_group():
    """torch gives groups that are made later its own half hour."""
    for found, default in run_ranks(4, timeouts):
        assert found == {default} and default != dist.default_pg_timeout


def started_with_a_timeout():
    from nemo_dist_conf import initialize_distributed

    dist.destroy_process_group()
    initialize_distributed(timeout_minutes=7)
    return timeouts_of_one_rank()


def timeouts_of_one_rank():
    mesh: Any = DistributedSetup.build("fsdp2").mesh_context.device_mesh
    return {group._get_backend(torch.device("cpu")).options._timeout for group in mesh.get_all_groups()}


def test_the_timeout_that_one_asks_for_is_what_the_meshes_get(monkeypatch):
    assert run_ranks(1, started_with_a_timeout) == [{timedelta(minutes=7)}]


def around_meshes():
    warnings.simplefilter("ignore")
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    root = init_device_mesh("cpu", (1, 1, 2, 2, 1), mesh_dim_names=names)
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_shard", "ep"))
    context = MeshContext.from_meshes(root, experts)
    assert context.device_mesh is root and context.moe_mesh is experts
    other = MeshContext.from_meshes(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    try:
        MeshContext.from_meshes(init_device_mesh("cpu", (4,), mesh_dim_names=("rows",)))
    except ConfigError as error:
        refusal = error.what
    return facts(context), [root[name].size() for name in NAMES], facts(other), refusal


def test_a_context_around_meshes_that_somebody_else_has_built():
    found, joined, other, refusal = run_ranks(4, around_meshes)[3]
    assert (found["dp_size"], found["cp_size"], found["ep_size"], found["data_rank"]) == (2, 2, 2, 1)
    assert joined == [2, 4, 4]
    assert (other["dp_size"], other["tp_size"], other["data_rank"], other["data_size"]) == (2, 2, 1, 2)
    assert "unknown name: rows" in refusal
    assert MeshContext.from_meshes(None) == MeshContext()


def flattened_sizes():
    mesh: Any = DistributedSetup.build("fsdp2", ParallelismSizes(cp_size=2)).mesh_context.device_mesh
    from nemo_dist_conf.runtime.device_meshes import fsdp_mesh

    hsdp: Any = DistributedSetup.build("fsdp2", ParallelismSizes(dp_replicate_size=2)).mesh_context.device_mesh
    return fsdp_mesh(mesh).size(), fsdp_mesh(mesh).ndim, fsdp_mesh(hsdp).mesh_dim_names


def test_parameters_are_sharded_over_context_ranks_too_and_two_axes_mean_hsdp():
    assert run_ranks(4, flattened_sizes) == [(4, 1, ("dp_replicate", "dp_shard"))] * 4


def policies():
    made = DistributedSetup.build(
        FSDP2Config(sequence_parallel=True),
        ParallelismSizes(pp_size=2, ep_size=2),
        {"pp_schedule": "gpipe"},
        {"wrap_outer_model": False},
        activation_checkpointing="selective",
        world_size=4,
    )
    bare = DistributedSetup.build("fsdp2", ParallelismSizes(pp_size=2, ep_size=2))
    return made.pipeline_config, made.moe_parallel_config, made.strategy_config, bare.pipeline_config


def test_configs_are_resolved_and_filled_where_an_axis_needs_them():
    pipeline, moe, strategy, bare = run_ranks(4, policies)[0]
    assert pipeline == PipelineConfig(pp_schedule="gpipe")
    assert moe == MoEParallelizerConfig(wrap_outer_model=False)
    assert strategy.sequence_parallel and strategy.activation_checkpointing == "selective"
    assert bare == PipelineConfig()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(strategy="fdsp2"), "no strategy 'fdsp2'"),
        (dict(parallelism_sizes=ParallelismSizes(tp_size=3), world_size=4), "world size 4"),
        (dict(strategy="ddp", parallelism_sizes=ParallelismSizes(tp_size=2), world_size=2), "strategy=ddp"),
        (dict(pipeline_config=PipelineConfig()), "pp_size is 1"),
        (dict(moe_parallel_config={}), "ep_size is 1"),
        (dict(pipeline_config={"schedule": "gpipe"}, parallelism_sizes=ParallelismSizes(pp_size=2)), "schedule"),
        (dict(activation_checkpointing="some"), "not a mode"),
        (dict(strategy="mfsdp", activation_checkpointing="selective"), "not a mode of strategy=megatron_fsdp"),
        (
            dict(strategy=FSDP2Config(activation_checkpointing=True), activation_checkpointing="selective"),
            "two different answers",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_a_process_group_is_started(kwargs, words):
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match=words):
        DistributedSetup.build(**kwargs)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "wrong", [None, {}, "fsdp2", FSDP2Config, 3, object()], ids=["none", "dict", "text", "class", "number", "object"]
)
def test_a_mesh_context_of_what_is_no_config_is_refused(wrong):
    with pytest.raises(ConfigError, match="is no config of a strategy") as caught:
        MeshContext.build(wrong, ParallelismSizes(), world_size=1)
    assert caught.value.type == "MeshContext.build(FSDP2Config(), ...)"
    with pytest.raises(ConfigError, match="parallelism is 3"):
        MeshContext.build(FSDP2Config(), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        # world_size by its name only, as on the page
        MeshContext.build(FSDP2Config(), ParallelismSizes(), 1)  # type: ignore[call-arg]


def test_activation_checkpointing_of_a_setup_is_what_was_given():
    own, off = DDPConfig(activation_checkpointing=True), DDPConfig()
    ways: list[Any] = [False, True, "full"]
    for given in ways:
        setup = DistributedSetup.build(own, activation_checkpointing=given)
        assert setup.activation_checkpointing is given
        assert setup.strategy_config is own
    setup = DistributedSetup.build(off, activation_checkpointing="selective")
    assert setup.activation_checkpointing == "selective" and off.activation_checkpointing is False
    selective: Any = "selective"
    assert setup.strategy_config == DDPConfig(activation_checkpointing=selective)  # what managers go by


def test_ddp_needs_no_process_group_until_the_model_is_wrapped(monkeypatch):
    setup = DistributedSetup.build("ddp")
    assert not dist.is_initialized() and setup.mesh_context.device_mesh is None
    one = dict(dp_size=1, data_size=1, data_rank=0, world_size=1)
    assert {name: facts(setup.mesh_context)[name] for name in one} == one
    assert setup.mesh_context.layout() == "1 rank" and setup.mesh_context.is_main
    assert facts(DistributedSetup.build("ddp", world_size=4).mesh_context)["dp_size"] == 4
    for name, value in dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="2").items():
        monkeypatch.setenv(name, value)
    context = DistributedSetup.build("ddp", ParallelismSizes(dp_size=4)).mesh_context
    assert (context.data_rank, context.data_size, context.gradient_size, context.is_main) == (2, 4, 4, False)
    assert context.layout() == "dp 4"
    with pytest.raises(ConfigError, match="4 ranks were started"):
        DistributedSetup.build("ddp", world_size=2)
    with pytest.raises(ConfigError, match="tp 1 = 3 ranks, but there are 4"):
        DistributedSetup.build("ddp", ParallelismSizes(dp_size=3))
    assert not dist.is_initialized()


def ddp_before_its_group():
    from nemo_dist_conf.strategies.ddp import DDPManager

    dist.destroy_process_group()
    setup = DistributedSetup.build("ddp")
    assert not dist.is_initialized()
    config: Any = setup.strategy_config
    model = DDPManager(config, setup.mesh_context.device_mesh).parallelize(torch.nn.Linear(2, 1))
    DistributedSetup.build("fsdp2")
    wrong = DistributedSetup.build("ddp").mesh_context
    reached = setup.mesh_context.sum_over_data(torch.ones(1))
    later = dataclasses.replace(setup.mesh_context, ranks_without_mesh=(0, 4))
    try:
        later.data_size
    except ConfigError as error:
        refusal = error.what
    return dist.get_world_size(), type(model).__name__, reached.item(), wrong.device_mesh is not None, refusal


def test_wrapping_starts_the_group_that_ddp_was_built_without():
    world, kind, reached, has_mesh, refusal = run_ranks(1, ddp_before_its_group)[0]
    assert (world, kind, reached, has_mesh) == (1, "OneRankDDP", 1.0, True)
    assert refusal == "world_size=4 was given, but the process group has 1 ranks"


def wrong_world():
    try:
        DistributedSetup.build("fsdp2", world_size=4)
    except ConfigError as error:
        return str(error)


def test_a_world_size_that_is_not_the_groups_is_refused():
    assert "but the process group has 2 ranks" in run_ranks(2, wrong_world)[0]


def test_without_meshes_sizes_are_one_and_dp_size_is_none():
    assert facts(MeshContext()) == dict(
        pp_size=1,
        tp_size=1,
        cp_size=1,
        ep_size=1,
        dp_size=None,
        dp_replicate_size=None,
        dp_shard_size=1,
        pp_enabled=False,
        world_size=1,
        data_rank=0,
        data_size=1,
    )
    assert dataclasses.is_dataclass(MeshContext)


def fake_ranks(world_size: int, rank: int, sizes: dict) -> dict:
    """Facts of one rank of many, on torch's fake process group: real DeviceMeshes, no other process."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        return facts(DistributedSetup.build("fsdp2", ParallelismSizes(**sizes)).mesh_context)
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_thousand_ranks_are_placed_by_the_closed_form():
    sizes = dict(pp_size=4, dp_replicate_size=2, tp_size=8, cp_size=2, ep_size=16)
    for rank in (0, 7, 8, 16, 517, 1023):
        found = run_ranks(1, fake_ranks, 1024, rank, sizes)[0]
        # Outermost first: pp 4, dp_replicate 2, dp_shard 8, cp 2, tp 8.
        dp = 1024 // (4 * 2 * 8)
        assert found["data_rank"] == rank // (2 * 8) % dp
        assert (found["dp_size"], found["dp_shard_size"], found["world_size"]) == (dp, dp // 2, 1024)
        assert all(found[name] == size for name, size in sizes.items())


DDP_APP = """
import os, torch, torch.distributed as dist
from nemo_dist_conf import DistributedSetup
from nemo_dist_conf.strategies.ddp import DDPManager

setup = DistributedSetup.build("ddp")
mesh = setup.mesh_context
assert not dist.is_initialized() and mesh.layout() == "dp 2", mesh
torch.manual_seed(mesh.data_rank)
model = DDPManager(setup.strategy_config, mesh.device_mesh).parallelize(torch.nn.Linear(3, 1))
rows = torch.arange(12.0).view(4, 3).chunk(mesh.data_size)[mesh.data_rank]
model(rows).square().mean().backward()
gradient = next(model.parameters()).grad
both = [torch.empty_like(gradient) for _ in range(2)]
dist.all_gather(both, gradient)
assert torch.equal(*both) and mesh.sum_over_data(torch.ones(1)).item() == 2
line = f"rank {dist.get_rank()} of {mesh.world_size} {mesh.is_main}\\n"
os.write(1, line.encode())  # in one piece: ranks share the pipe
dist.destroy_process_group()
"""


def test_ddp_on_two_ranks_of_a_launcher_starts_its_group_when_the_model_is_wrapped(tmp_path):
    (tmp_path / "app.py").write_text(DDP_APP)
    done = warm.run(["torchrun", "--nproc-per-node", "2", "app.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 True", "rank 1 of 2 False"]


def from_checked():
    """The meshes of a checked config on this group, where nothing solves it again; what the wrong group is told."""
    from nemo_dist_conf.composition.check import check
    from nemo_dist_conf.runtime import device_meshes
    from nemo_dist_conf.runtime.distributed_setup import setup_from_checked

    config: dict[str, Any] = {
        "strategy": {"_target_": "nemo_dist_conf.config.FSDP2Config"},
        "parallelism": {"tp_size": 2},
    }
    config["activation_checkpointing"] = "full"
    checked = check(config, 4)
    solve = device_meshes.solve
    setattr(device_meshes, "solve", None)
    try:
        setup = setup_from_checked(checked)
        with pytest.raises(ConfigError, match="world_size=8 was given, but the process group has 4 ranks"):
            setup_from_checked(check(config, 8))
    finally:
        device_meshes.solve = solve
    full: Any = "full"
    built = DistributedSetup.build("fsdp2", ParallelismSizes(tp_size=2), activation_checkpointing=full)
    same = dataclasses.replace(built, mesh_context=setup.mesh_context, activation_checkpointing=True) == setup
    return same, setup.mesh_context.layout(), facts(setup.mesh_context) == facts(built.mesh_context)


def test_a_checked_config_is_not_solved_again():
    assert run_ranks(4, from_checked) == [(True, "dp_shard 2 x tp 2", True)] * 4


def checked_in_a_group():
    """A group of the program's own, without a launcher's variables, decides what a config is checked for."""
    import nemo_dist_conf

    config = {"strategy": {"_target_": "nemo_dist_conf.config.FSDP2Config"}, "parallelism": {"dp_size": 2}}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        setup, _, _ = nemo_dist_conf.instantiate({**config, "device": "cpu"})
    return setup.mesh_context.layout()


def test_a_group_that_is_there_says_how_many_ranks_a_config_has():
    assert run_ranks(2, checked_in_a_group) == ["dp_shard 2"] * 2
