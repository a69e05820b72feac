"""Groups of ours beyond the page's: named like much else, so an app may have something of its own under such a name."""

import dataclasses
from typing import Any

import pytest
from hydra import compose, initialize, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.names import OWN_GROUPS
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.own_groups import OWN_SCHEMAS, default_groups, own_group

pytestmark = pytest.mark.usefixtures("store")

GROUPS = pytest.mark.parametrize("group", OWN_GROUPS)


def composed(*words, base="nemo_dist_conf"):
    with initialize(None, version_base="1.3"):
        return compose(base, overrides=list(words))


def plain_tree() -> dict[str, Any]:
    """What is composed, without its types."""
    return dict(OmegaConf.to_container(composed(), enum_to_str=True))  # type: ignore[arg-type]


def kind_of(node) -> type:
    kind = OmegaConf.get_type(node)
    assert isinstance(kind, type)
    return kind


def first_field(group):
    return dataclasses.fields(OWN_SCHEMAS[group])[0].name


def test_every_group_has_a_schema_and_rules():
    assert set(OWN_GROUPS) == set(OWN_SCHEMAS) == set(default_groups())


@GROUPS
def test_every_option_is_typed_as_the_groups_schema(group):
    for option, values in OWN_GROUPS[group].items():
        node = composed(f"{group}={option}")[group]
        assert issubclass(kind_of(node), OWN_SCHEMAS[group])
        assert {key: node[key] for key in values} == values


@GROUPS
def test_a_node_is_an_object_of_the_schema_once_it_is_instantiated(group):
    node = instantiate(composed()[group])
    assert isinstance(node, OWN_SCHEMAS[group]) or issubclass(kind_of(node), OWN_SCHEMAS[group])


@GROUPS
def test_a_checked_config_has_its_values(group):
    assert check(composed(), 1).groups[group] == default_groups()[group]
    assert check(OmegaConf.create({"strategy": plain_tree()["strategy"]}), 1).groups == default_groups()


@GROUPS
def test_a_stray_key_is_refused(group):
    with pytest.raises(ConfigError, match=f"{group}.no_such is not an option"):
        check(composed(f"+{group}.no_such=1"), 1)


@GROUPS
@pytest.mark.parametrize("value", [{"rows": 3, "page": "a"}, {}, "something", 3, ["a"], None, True])
def test_what_an_app_has_of_its_own_under_such_a_name_is_left_alone(group, value):
    assert check(OmegaConf.create({**plain_tree(), group: value}), 1).groups[group] == default_groups()[group]


@GROUPS
def test_what_means_the_group_is_read(group):
    plain = plain_tree()
    name = first_field(group)
    misspelt = (
        f"{name}s" if f"{name}s" not in [item.name for item in dataclasses.fields(OWN_SCHEMAS[group])] else f"{name}_"
    )
    with pytest.raises(ConfigError, match=f"{group}.{misspelt} is not an option"):
        check(OmegaConf.create({**plain, group: {misspelt: 1}}), 1)
    for option in OWN_GROUPS[group]:
        with pytest.raises(ConfigError, match=f"{group} is '{option}', not a group of options"):
            check(OmegaConf.create({**plain, group: option}), 1)


@GROUPS
def test_the_base_config_leaves_out_what_the_app_has_of_that_name(group, tmp_path):
    (tmp_path / "config.yaml").write_text(f"defaults: [nemo_dist_conf, _self_]\n{group}: 3\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config", [f"{group}=4"])
    assert cfg[group] == 4 and check(cfg, 1).groups[group] == default_groups()[group]
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config", ["+nemo_dist@dist=nemo_dist_conf"])
    assert cfg[group] == 3 and issubclass(kind_of(cfg.dist[group]), OWN_SCHEMAS[group])


def test_settings_that_would_do_nothing_are_refused_unless_the_size_itself_is():
    with pytest.raises(ConfigError) as caught:
        check(composed("context.method=gather"), 1)
    assert caught.value.what == "context settings were changed, but cp_size is 1, so they would do nothing"
    assert caught.value.type == "context.method=auto"
    with pytest.raises(ConfigError) as caught:
        check(composed("context.method=gather", "parallelism.cp_size=-2"), 2)
    assert [problem.what for problem in caught.value.problems if "context" in problem.what] == []
    assert own_group("context").idle(Asked(None, {}, {"cp_size": 1}, False, None)) == Idle("cp_size", 1, "2 or more")


def test_a_method_that_there_is_not_is_refused():
    with pytest.raises(ConfigError) as caught:
        check(composed("context.method=gathr", "parallelism.cp_size=2"), 2)
    assert caught.value.type == "context.method=gather"
