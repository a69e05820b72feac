"""Registration: every entry is in Hydra's ConfigStore, and an app's own entries and folders stay its own."""

import copy
import dataclasses

import pytest
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nemo_dist_conf.composition.groups import config_groups
from nemo_dist_conf.composition.store import PROVIDER
from nemo_dist_conf.names import OWN_GROUPS


def _registered(folder=None):
    with initialize(None, version_base="1.3") if folder is None else initialize_config_dir(str(folder)):
        pass
    return ConfigStore.instance()


def test_every_option_can_be_loaded_under_both_names(store):
    _registered()
    for group, options in config_groups().items():
        assert set(store.list(group)) == {f"{name}.yaml" for name in options} == set(store.list(f"nemo_dist/{group}"))
        for name in options:
            for path in (f"{group}/{name}.yaml", f"nemo_dist/{group}/{name}.yaml"):
                entry = store.load(path)
                assert entry.provider == PROVIDER
                assert OmegaConf.is_dict(entry.node) and entry.node._target_.startswith("nemo_dist_conf.")


def test_a_loaded_entry_is_a_copy(store):
    _registered()
    store.load("parallelism/default.yaml").node.tp_size = 7
    assert store.load("parallelism/default.yaml").node.tp_size == 1


def test_hydras_copies_of_the_store_share_nodes_and_nothing_else(store):
    """Hydra copies the whole store for each group of a help page; entries put into a copy stay there."""
    _registered()
    copied = copy.deepcopy(store)
    assert copied.repo["strategy"]["ddp.yaml"] is store.repo["strategy"]["ddp.yaml"]
    assert copied.repo["hydra"]["config.yaml"] is store.repo["hydra"]["config.yaml"]
    copied.store(name="new", node={"x": 1}, group="strategy")
    assert "new.yaml" in copied.repo["strategy"] and "new.yaml" not in store.repo["strategy"]
    assert copy.deepcopy(copied).repo["strategy"]["new.yaml"] is copied.repo["strategy"]["new.yaml"]


@pytest.mark.parametrize("alias", ["megatron-fsdp", "mfsdp"])
def test_aliases_are_the_same_strategy(alias):
    with initialize(None, version_base="1.3"):
        assert compose("nemo_dist_conf", [f"strategy={alias}"]) == compose("nemo_dist_conf", ["strategy=megatron_fsdp"])


def test_composed_nodes_are_typed_and_hold_no_bookkeeping_of_ours():
    with initialize(None, version_base="1.3"):
        cfg = compose("nemo_dist_conf")
    kind = OmegaConf.get_type(cfg.strategy)
    assert kind is not None and kind.__name__ == "FSDP2Conf"
    assert "defaults" not in cfg.strategy and set(cfg) == {
        "strategy",
        "parallelism",
        "pipeline",
        "moe",
        *OWN_GROUPS,
        "activation_checkpointing",
        "batch_statistics",
    }


def test_an_apps_own_group_in_its_folder_hides_our_short_name_and_leaves_the_rest(tmp_path, store):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "ddp.yaml").write_text("mine: true\n")
    (tmp_path / "config.yaml").write_text("defaults:\n  - strategy: ddp\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("config").strategy == {"mine": True}
        ours = compose("config", ["+nemo_dist@dist=nemo_dist_conf"])
        assert ours.dist.strategy._target_ == "nemo_dist_conf.config.FSDP2Config"
        chosen = compose("config", ["+nemo_dist@dist=nemo_dist_conf", "nemo_dist/strategy@dist.strategy=ddp"])
        assert chosen.dist.strategy._target_ == "nemo_dist_conf.config.DDPConfig"
        assert chosen.strategy == {"mine": True}
    # Another app in the same process has the short name again.
    with initialize(None, version_base="1.3"):
        assert "_target_" in compose("nemo_dist_conf").strategy


def test_an_apps_own_entry_in_the_config_store_is_neither_replaced_nor_joined(store):
    @dataclasses.dataclass
    class Mine:
        speed: int = 3

    store.store(group="strategy", name="ddp", node=Mine, provider="an app")
    store.store(name="config", node={"defaults": [{"strategy": "ddp"}]})
    _registered()
    assert store.list("strategy") == ["ddp.yaml"]
    with initialize(None, version_base="1.3"):
        assert compose("config").strategy == {"speed": 3}


def test_registering_twice_changes_nothing(store):
    _registered()
    before = sorted(store.list("strategy"))
    _registered()
    assert sorted(store.list("strategy")) == before
