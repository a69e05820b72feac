"""``hydra/sweeper=layouts``: search on paper, run the best for real, and hold the estimates against the runs."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any, Mapping, Sequence

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_dist_conf.composition.agreement.shared_failure import end
from nemo_dist_conf.composition.command_line import WITHOUT
from nemo_dist_conf.errors import ConfigError, NemoDistConfError, Problem
from nemo_dist_conf.launch.settings import read_settings
from nemo_dist_conf.names import HARDWARE
from nemo_dist_conf.plan.search import Found, search
from nemo_dist_conf.plan.text_report import columns, duration
from nemo_dist_conf.schema.sweeper import LayoutsConf
from nemo_dist_conf.topology.gpu_presence import cuda_present
from nemo_dist_conf.topology.launched_ranks import planned_world_size
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = ["LayoutsSweep"]


class LayoutsSweep:
    """What the sweeper plugin does. options: of LayoutsConf."""

    def __init__(
        self, options: Mapping[str, Any], context: HydraContext, task: TaskFunction, config: DictConfig
    ) -> None:
        self.options, self.context, self.config = options, context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )

    def run(self, arguments: Sequence[str]) -> list[JobReturn]:
        """Search, launch the best layouts, print estimate against measurement; what each job gave."""
        try:
            found = self._search(list(arguments))
        except NemoDistConfError as error:
            end(error)
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        print(f"{len(found)} layouts to run, the fastest by estimate first", flush=True)
        results = list(self.launcher.launch([[*arguments, *one.words.split()] for one in found], initial_job_idx=0))
        print(_comparison(found, results), flush=True)
        return results

    def _search(self, arguments: list[str]) -> Sequence[Found]:
        known = [item.name for item in dataclasses.fields(LayoutsConf)]
        for key in (key for key in self.options if key not in known):
            what, asked = f"hydra.sweeper.{key} is not an option", assigned(f"+hydra.sweeper.{key}", self.options[key])
            raise ConfigError(Problem(what=what, asked=asked, allowed=", ".join(known), instead=f"{WITHOUT}{asked}"))
        top = self.options.get("top")
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            what = f"hydra.sweeper.top={top} is not a number of layouts"
            asked = assigned("hydra.sweeper.top", top)
            raise ConfigError(
                Problem(what=what, asked=asked, allowed="a whole number, 1 or more", instead="hydra.sweeper.top=3")
            )
        cfg = self.context.config_loader.load_sweep_config(self.config, arguments)
        with open_dict(cfg):
            cfg.hydra.overrides.task = arguments
        return search(cfg, self._world_size(), self._hardware(), top, instead="hydra/sweeper=basic").best

    def _world_size(self) -> int:
        """The ranks that the launcher starts for a job."""
        node = self.config.hydra.launcher
        if str(node.get("_target_")).endswith(".TorchrunLauncher"):
            options: Any = OmegaConf.to_container(node, resolve=True)
            options.pop("_target_")
            return read_settings(options).world_size
        return planned_world_size()

    def _hardware(self) -> str:
        name = self.options.get("hardware")
        if name in HARDWARE:
            return str(name)
        if name is not None:
            key = "hydra.sweeper.hardware"
            raise ConfigError(
                unknown_name(
                    name,
                    HARDWARE,
                    what=f"there is no hardware profile {name!r}",
                    asked=assigned(key, name),
                    allowed=", ".join(HARDWARE),
                    offer=lambda known: assigned(key, known),
                )
            )
        if cuda_present():
            what = "which GPUs these are is not known before torch is imported"
            asked = "hydra.sweeper.hardware=null"
            raise ConfigError(
                Problem(
                    what=what,
                    asked=asked,
                    allowed="a profile of the group hardware",
                    instead="hydra.sweeper.hardware=h100",
                )
            )
        return "cpu"


def _comparison(found: Sequence[Found], results: Sequence[JobReturn]) -> str:
    """A line for each layout: what was estimated, what its steps took."""
    rows = [("", "estimated", "measured", "ratio", "layout")]
    for number, (one, result) in enumerate(zip(found, results)):
        seconds = _measured(result)
        ratio = f"{seconds / one.plan.step.seconds:.2f}" if seconds else "-"
        taken = duration(seconds) if seconds else "failed" if result.status is JobStatus.FAILED else "-"
        rows.append((f"#{number}", duration(one.plan.step.seconds), taken, ratio, one.words))
    return "\n".join(columns(rows, ""))


def _measured(result: JobReturn) -> float | None:
    """The median step of a job's metrics.jsonl without the first; None where there is none."""
    folder = OmegaConf.select(result.hydra_cfg, "hydra.runtime.output_dir") if result.hydra_cfg is not None else None
    if folder is None:
        return None
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line)["seconds"] for line in lines[1:]]
    except (OSError, ValueError, KeyError):
        return None
    return statistics.median(steps) if steps else None
