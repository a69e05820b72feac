"""Whose a group is: options that an app adds stand beside ours, one of the same name makes it the app's."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.composition.groups import config_groups
from tests import warm

PRESETS = {
    "strategy/mine.yaml": "defaults: [fsdp2, _self_]\nreshard_after_forward: false\nmp_policy: {param_dtype: float32}",
    "strategy/plain_ddp.yaml": "defaults:\n  - ddp\n  - _self_\nstatic_graph: true\n",
    "parallelism/tp2.yaml": "defaults: [default, _self_]\ntp_size: 2\n",
    "pipeline/two.yaml": "defaults: [interleaved_1f1b, _self_]\nlayers_per_stage: 1\n",
    "moe/head_apart.yaml": "defaults: [default, _self_]\nwrap_outer_model: false\n",
    "experiment/wide.yaml": (
        "# @package _global_\ndefaults:\n  - override /strategy: mine\n  - override /parallelism: tp2\n"
        "strategy:\n  enable_compile: true\nactivation_checkpointing: selective\n"
    ),
}
APP = """
import hydra

@hydra.main(version_base="1.3", config_path={config_path!r}, config_name="config")
def main(cfg):
    print(cfg.get("strategy"))

main()
"""


pytestmark = pytest.mark.usefixtures("store")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def composed(folder: Path, *words: str, config: str = "config") -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(config, overrides=list(words))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return warm.run(["python", "app.py", *words], cwd=folder)


# ------------------------------------------------------------------------------- options beside ours


def test_presets_of_every_group_stand_beside_our_options(tmp_path):
    write(tmp_path, {**PRESETS, "config.yaml": "defaults: [nemo_dist_conf, _self_]\n"})
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        for group, options in config_groups().items():
            for option in options:  # ours are all there still
                assert "_target_" in compose("config", [f"{group}={option}"])[group]
    cfg = composed(tmp_path, "strategy=mine", "parallelism=tp2")
    assert cfg.strategy.reshard_after_forward is False and cfg.strategy.mp_policy.param_dtype.name == "float32"
    assert cfg.strategy._target_ == "nemo_dist_conf.config.FSDP2Config" and "defaults" not in cfg.strategy
    assert check(cfg, 4).mesh.size("tp") == 2
    assert composed(tmp_path, "strategy=plain_ddp").strategy.static_graph is True
    assert composed(tmp_path, "pipeline=two").pipeline.layers_per_stage == 1
    assert composed(tmp_path, "moe=head_apart").moe.wrap_outer_model is False
    assert composed(tmp_path, "strategy=mine", "strategy.enable_compile=true").strategy.enable_compile is True


def test_a_preset_is_typed_as_what_it_extends(tmp_path):
    write(tmp_path, {**PRESETS, "config.yaml": "defaults: [nemo_dist_conf, _self_]\n"})
    write(tmp_path, {"strategy/typo.yaml": "defaults: [fsdp2, _self_]\nreshard_after_foward: false\n"})
    with pytest.raises(ConfigCompositionException, match="reshard_after_foward"):
        composed(tmp_path, "strategy=typo")
    write(tmp_path, {"parallelism/three.yaml": "defaults: [default, _self_]\ntp_size: three\n"})
    with pytest.raises(ConfigCompositionException, match="three"):
        composed(tmp_path, "parallelism=three")


def test_presets_below_a_package_and_in_experiments(tmp_path):
    write(tmp_path, {**PRESETS, "config.yaml": "defaults: [nemo_dist_conf, _self_]\n"})
    write(tmp_path, {"packaged.yaml": "defaults: [nemo_dist_conf@dist, _self_]\n"})
    words = ["strategy@dist.strategy=mine", "parallelism@dist.parallelism=tp2"]
    cfg = composed(tmp_path, *words, config="packaged")
    assert cfg.dist.strategy.reshard_after_forward is False and check(cfg, 2).mesh.size("tp") == 2
    cfg = composed(tmp_path, "+experiment=wide")
    assert (cfg.strategy.reshard_after_forward, cfg.strategy.enable_compile) == (False, True)
    assert (cfg.parallelism.tp_size, cfg.activation_checkpointing) == (2, "selective")
    assert composed(tmp_path, "+experiment=wide", "parallelism=default").parallelism.tp_size == 1


def test_entries_of_other_providers_stand_beside_ours(tmp_path, store):
    store.store(group="strategy", name="mine", node={"defaults": ["ddp", "_self_"], "static_graph": True})
    write(tmp_path, {"config.yaml": "defaults: [nemo_dist_conf, _self_]\n"})
    assert composed(tmp_path, "strategy=mine").strategy.static_graph is True
    assert composed(tmp_path).strategy._target_ == "nemo_dist_conf.config.FSDP2Config"
    assert store.load("strategy/mine.yaml").provider != "nemo_dist_conf"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("lr: 1\n", ["--config-dir", "more"]),
        ("lr: 1\n", ["--config-dir=more"]),
        ("lr: 1\n", ["hydra.searchpath=[file://more]"]),
        ("hydra:\n  searchpath:\n    - pkg://more  # presets\n", []),
    ],
    ids=["--config-dir", "--config-dir=", "hydra.searchpath", "searchpath of the config"],
)
@pytest.mark.parametrize("same_name", [False, True], ids=["added", "same name"])
def test_folders_that_are_added_later(tmp_path, config, words, same_name):
    """An option of the same name in them is the app's own, not merged into our schema."""
    name = "strategy/ddp.yaml" if same_name else "strategy/mine.yaml"
    option = "mine: true\n" if same_name else PRESETS[name]
    more = {"more/__init__.py": "", "more/strategy/__init__.py": "", f"more/{name}": option}
    write(tmp_path, {"conf/config.yaml": config, "app.py": APP.format(config_path="conf"), **more})
    done = run(tmp_path, *words, "+strategy=ddp" if same_name else "+strategy=mine")
    assert done.returncode == 0 and "schema" not in done.stderr, done.stderr
    assert ("{'mine': True}" if same_name else "'reshard_after_forward': False") in done.stdout


def test_presets_of_a_package(tmp_path):
    files = {f"presets/conf/{name}": text for name, text in PRESETS.items()}
    files["presets/conf/config.yaml"] = "defaults: [nemo_dist_conf, {override strategy: mine}]\n"
    files |= {"presets/__init__.py": "", "presets/conf/__init__.py": ""}
    write(tmp_path, {**files, "app.py": APP.format(config_path="pkg://presets.conf")})
    done = run(tmp_path, "parallelism=tp2", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "tp_size: 2" in done.stdout and "reshard_after_forward: false" in done.stdout
    shown = run(tmp_path, "--help").stdout
    assert "strategy: ddp, fsdp2, megatron-fsdp, megatron_fsdp, mfsdp, mine, plain_ddp" in shown


def test_an_option_of_ours_extended_under_its_own_name_stands_in_its_place(tmp_path, store):
    write(tmp_path, {**PRESETS, "config.yaml": "defaults: [nemo_dist_conf, _self_]\n"})
    extends = "defaults:\n  - /nemo_dist/strategy@_here_: fsdp2\n  - _self_\nenable_compile: true\n"
    write(tmp_path, {"strategy/fsdp2.yaml": extends})
    assert composed(tmp_path).strategy.enable_compile is True
    assert composed(tmp_path, "strategy=mine").strategy.enable_compile is True  # presets extend the app's
    assert composed(tmp_path, "strategy=ddp").strategy._target_ == "nemo_dist_conf.config.DDPConfig"
    assert composed(tmp_path, "+nemo_dist@dist=nemo_dist_conf").dist.strategy.enable_compile is False
    with initialize(None, version_base="1.3"):
        assert compose("nemo_dist_conf").strategy.enable_compile is False
    assert "fsdp2.yaml" in store.list("strategy")


def test_a_preset_of_the_recipe_computes_in_what_the_recipe_says(tmp_path):
    """It extends the recipe's own options, where train.dtype says the dtype."""
    presets = {**PRESETS, "strategy/kept.yaml": "defaults: [fsdp2, _self_]\nreshard_after_forward: false\n"}
    write(tmp_path, {f"conf/{name}": text for name, text in presets.items()})
    words = ["python", "-m", "nemo_dist_conf.train", "--config-dir", "conf", "--cfg", "job", "--resolve"]
    for option, dtype, key in (
        ("kept", "auto", "param_dtype: float32"),
        ("kept", "bfloat16", "param_dtype: bfloat16"),
        ("plain_ddp", "bfloat16", "autocast_dtype: bfloat16"),
    ):
        done = warm.run([*words, f"strategy={option}", f"train.dtype={dtype}", "device=cpu"], cwd=tmp_path)
        assert done.returncode == 0 and "schema" not in done.stderr, done.stderr
        assert key in done.stdout
    done = warm.run([*words, "+experiment=wide"], cwd=tmp_path)
    assert "tp_size: 2" in done.stdout and "enable_compile: true" in done.stdout


# ------------------------------------------------------------------------------- what the app owns


@pytest.mark.parametrize("group", config_groups())
@pytest.mark.parametrize("sign", ["same name", "OWN_GROUP", "ConfigStore"])
def test_a_group_that_an_app_owns_holds_its_options_only(tmp_path, store, group, sign):
    ours = next(iter(config_groups()[group]))
    files = {"config.yaml": f"defaults:\n  - {group}: mine\n", f"{group}/mine.yaml": "mine: true\n"}
    if sign == "same name":
        files[f"{group}/{ours}.yaml"] = "theirs: true\n"
    elif sign == "OWN_GROUP":
        files[f"{group}/OWN_GROUP"] = ""
    else:
        store.store(group=group, name=ours, node={"theirs": True})
    write(tmp_path, files)
    assert composed(tmp_path)[group] == {"mine": True}
    if sign == "OWN_GROUP":
        with pytest.raises(ConfigCompositionException):
            composed(tmp_path, f"{group}={ours}")
    else:
        assert composed(tmp_path, f"{group}={ours}")[group] == {"theirs": True}
    whole = composed(tmp_path, "+nemo_dist@dist=nemo_dist_conf")
    assert "_target_" in whole.dist[group] and whole[group] == {"mine": True}
    store.repo.get(group, {}).pop(f"{ours}.yaml", None) if sign == "ConfigStore" else None
    with initialize(None, version_base="1.3"):  # another app in the same process has the short name again
        assert "_target_" in compose("nemo_dist_conf")[group]


@pytest.mark.parametrize("value", ["greedy", "'greedy'", "3", "[a, b]", "null"])
def test_a_plain_key_of_a_foreign_app_can_still_be_set(tmp_path, value):
    """Where a group of that name exists, Hydra refuses the word: the app would break by our being installed."""
    write(tmp_path, {"config.yaml": f"strategy: {value}\npipeline: {value}  # which\nlr: 1\n"})
    cfg = composed(tmp_path, "strategy=beam", "pipeline=slow")
    assert (cfg.strategy, cfg.pipeline) == ("beam", "slow")
    assert composed(tmp_path, "+moe=default").moe._target_  # what the app does not have is there


def test_a_plain_key_of_a_structured_config_can_still_be_set(store):
    @dataclasses.dataclass
    class Config:
        strategy: str = "greedy"
        moe: int = 1

    store.store(name="app_config", node=Config)
    with initialize(None, version_base="1.3"):
        assert compose("app_config", ["strategy=ddp", "moe=2"]) == {"strategy": "ddp", "moe": 2}


@pytest.mark.parametrize(
    "config",
    [
        "defaults: [nemo_dist_conf, _self_]\npipeline: {pp_batch_size: 2}\nstrategy: {bucket_cap_mb: 4}\n",
        "defaults:\n  - nemo_dist_conf\n  - override strategy: ddp\n  - _self_\nstrategy:\n  bucket_cap_mb: 4\n",
        "defaults:\n  - optional strategy: ddp\n  - _self_\nstrategy:\n  bucket_cap_mb: 4\n",
    ],
)
def test_an_app_that_sets_keys_of_our_groups_does_not_own_them(tmp_path, config):
    write(tmp_path, {"config.yaml": config})
    assert composed(tmp_path, "strategy=ddp").strategy._target_ == "nemo_dist_conf.config.DDPConfig"


def test_one_primary_config_with_a_plain_key_does_not_take_our_group_from_another(tmp_path):
    write(tmp_path, {"old.yaml": "strategy: greedy\n", "config.yaml": "defaults:\n  - strategy: fsdp2\n"})
    assert composed(tmp_path, "strategy=ddp").strategy._target_ == "nemo_dist_conf.config.DDPConfig"
