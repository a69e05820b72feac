"""``python -m nemo_dist_conf.plan [overrides]``: the words of the recipe, and what the machine would be."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.check import Checked
from nemo_dist_conf.composition.command_line import WITHOUT, raw_words
from nemo_dist_conf.errors import ConfigError, DataError, Problem
from nemo_dist_conf.plan.from_config import job_of, planned_start
from nemo_dist_conf.plan.plan import make_plan
from nemo_dist_conf.plan.search import search
from nemo_dist_conf.plan.text_report import found_table, table
from nemo_dist_conf.recipe.checks import RecipeCallback, check_recipe
from nemo_dist_conf.topology.launched_ranks import about_to_start
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = ["PlanCallback", "run"]

_OWN = ("world_size", "hardware", "plan")
_PICTURES = (".html", ".htm", ".svg")
_KNOBS = ("search", "top", "formulas", "json", "picture")


class PlanCallback(RecipeCallback):
    """Nothing to check before: the plan checks for the ranks that it is of, and says more."""

    def check(self, config: DictConfig) -> Checked | None:  # type: ignore[override]  # there is none to return yet
        return None


def run(cfg: DictConfig, hydra: Any = None) -> str:
    """What the command prints for a composed config; writes the files that it asks for.

    hydra: Hydra's node, for the words that were typed. Raises ConfigError, DataError for a file that cannot be written.
    """
    _check_nodes(cfg)
    world_size = _whole(cfg, "world_size")
    _check_knobs(cfg.plan)
    with about_to_start(planned_start(world_size)):
        recipe = _recipe_config(cfg, hydra)
        if cfg.plan.search:
            top = _whole(cfg.plan, "top", "plan.")
            result = search(recipe, world_size, cfg.hardware, top)
            found: Any = [{"overrides": one.words, **one.plan.to_dict()} for one in result.best]
            text, best = found_table(result), result.best[0].plan
        else:
            best = make_plan(job_of(recipe, world_size, cfg.hardware))
            text, found = table(best, bool(cfg.plan.formulas)), best.to_dict()
    picture, written = cfg.plan.get("picture"), cfg.plan.get("json")
    if picture is not None:
        from nemo_dist_conf.plan.drawing import page, svg

        drawn = svg(best) if _suffix(picture) == ".svg" else page(best)
        text += f"\n\npicture  {_write('picture', picture, drawn)}"
    if written == "-":
        return json.dumps(found, indent=1)
    if written is not None:
        text += f"\n\njson  {_write('json', written, json.dumps(found, indent=1))}"
    return text


def _check_nodes(cfg: DictConfig) -> None:
    problems = []
    for key, best in (("plan", "plan.search=false"), ("hardware", "hardware=h100")):
        node = cfg.get(key)
        if not isinstance(node, DictConfig):
            asked = assigned(key, node) if key in cfg else f"~{key}"
            problems.append(
                Problem(
                    what=f"{key} is not a group of options",
                    asked=asked,
                    allowed=f"the plan's own group {key}",
                    instead=best,
                )
            )
    ConfigError.raise_if(problems)


def _recipe_config(cfg: DictConfig, hydra: Any) -> DictConfig:
    """The config without what is the plan's own, as the recipe would have it; typed words stay known."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # the recipe's check tells which of its values it is
        values = OmegaConf.to_container(cfg)
    recipe = OmegaConf.create(values)
    assert isinstance(recipe, DictConfig)
    for key in _OWN:
        recipe.pop(key, None)
    words = raw_words(OmegaConf.select(hydra, "overrides.task") if hydra is not None else None)
    with open_dict(recipe):
        recipe.hydra = {"overrides": {"task": words}}
    if OmegaConf.is_interpolation(recipe, "device"):
        recipe.device = cfg.hardware.device
        check_recipe(recipe)
    return recipe


def _whole(node: Any, key: str, prefix: str = "") -> int:
    value = node.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        example = 10 if key == "top" else 8
        what = f"{prefix}{key}={value} is not a number of {'layouts' if key == 'top' else 'ranks'}"
        raise ConfigError(
            Problem(
                what=what,
                asked=assigned(f"{prefix}{key}", value),
                allowed="a whole number, 1 or more",
                instead=assigned(f"{prefix}{key}", example),
            )
        )
    return value


def _check_knobs(node: Any) -> None:
    problems = []
    for key in map(str, node):
        if key not in _KNOBS:
            asked = assigned(f"+plan.{key}", node[key])
            problems.append(
                unknown_name(
                    key,
                    _KNOBS,
                    what=f"plan.{key} is not an option of the plan",
                    asked=asked,
                    allowed=", ".join(_KNOBS),
                    offer=functools.partial(_assigned_knob, node[key]),
                    otherwise=f"{WITHOUT}{asked}",
                )
            )
    for key in ("search", "formulas"):
        if not isinstance(node.get(key), bool):
            what = f"plan.{key}={node.get(key)} is not true or false"
            problems.append(
                Problem(
                    what=what,
                    asked=assigned(f"plan.{key}", node.get(key)),
                    allowed="true, false",
                    instead=f"plan.{key}=true",
                )
            )
    if not isinstance(node.get("json"), (str, type(None))):
        what = f"plan.json={node.get('json')} is not a file"
        problems.append(
            Problem(
                what=what,
                asked=assigned("plan.json", node.get("json")),
                allowed="a file; - for output alone",
                instead="plan.json=-",
            )
        )
    picture = node.get("picture")
    if picture is not None and _suffix(picture) not in _PICTURES:
        what = f"plan.picture={picture} ends in nothing that the plan can draw"
        stem = Path(str(picture)).with_suffix("")
        asked, allowed = assigned("plan.picture", picture), f"a file whose name ends in {', '.join(_PICTURES)}"
        instead = assigned("plan.picture", f"{stem}.html")
        problems.append(Problem(what=what, asked=asked, allowed=allowed, instead=instead))
    ConfigError.raise_if(problems)


def _assigned_knob(value: Any, name: str) -> str:
    return assigned(f"plan.{name}", value)


def _suffix(path: Any) -> str:
    return Path(str(path)).suffix.lower()


def _write(key: str, path: Any, text: str) -> Path:
    file = Path(str(path)).expanduser()
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"{file} cannot be written ({error.strerror})"
        suffix = "html" if key == "picture" else "json"
        raise DataError(
            Problem(
                what=what,
                asked=assigned(f"plan.{key}", path),
                allowed="a file in a folder that is there",
                instead=f"plan.{key}=plan.{suffix}",
            )
        ) from None
    return file
