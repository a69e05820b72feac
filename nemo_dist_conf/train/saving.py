"""What the recipe keeps of a run as it goes, and where it goes on after a stop."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from nemo_dist_conf.checkpoint.manifest import ROOT, anew, checkpoints_in, step_folder
from nemo_dist_conf.checkpoint.save_and_load import Restored
from nemo_dist_conf.checkpoint.series import Checkpoints
from nemo_dist_conf.composition.agreement.config_tree import different_keys, flat_config
from nemo_dist_conf.errors import DataError, Preempted, Problem
from nemo_dist_conf.recipe.earlier import set_aside
from nemo_dist_conf.runtime.rank_agreement import together
from nemo_dist_conf.topology.launched_ranks import launched, program
from nemo_dist_conf.train.data import DataSource, TextData
from nemo_dist_conf.train.loss_scale import LossScale
from nemo_dist_conf.wording import typed_path

__all__ = ["Saving", "SavingSettings"]

log = logging.getLogger(__name__)

#: Sections that say how a run is executed; that they are others than before changes no number.
_EXECUTION = (
    *("parallelism.", "strategy.", "pipeline.", "checkpoint.", "device", "activation_checkpointing", "recompute."),
    "context.",
    *("train.micro_batch_size", "train.log_every", "train.tensorboard"),
)
#: What a run that is to go on is given another value of.
_LENGTH = "train.steps"


@dataclass(frozen=True)
class SavingSettings:
    """The node ``checkpoint``, checked."""

    every: int | None
    keep: int | None
    asynchronous: bool
    resume: str | None
    export: str | None

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> SavingSettings:
        resume = node.get("resume")
        return cls(
            node.get("every"),
            node.get("keep"),
            bool(node.get("async")),
            None if resume is None else str(resume),
            node.get("export"),
        )


class Saving:
    """The checkpoints of a run of the recipe; every rank calls the same methods."""

    def __init__(self, cfg: Any, folder: Path, layout: str, steps: int) -> None:
        """folder: of the run's output. layout: in words. Raises DataError where the checkpoints cannot be used."""
        self._cfg, self._folder, self._steps = cfg, folder, steps
        self._settings = settings = SavingSettings.of(cfg.get("checkpoint") or {})
        root = folder / ROOT
        self._checkpoints: Checkpoints | None = None
        resume = settings.resume if settings.resume in (None, "auto") else str(typed_path(settings.resume))
        saves = settings.every is not None or settings.export is not None
        there = settings.resume == "auto" and any(together(lambda: bool(checkpoints_in(root)), bool)[1])
        if saves or there or settings.resume not in (None, "auto"):
            self._checkpoints = Checkpoints(
                root,
                resume=resume,
                keep=settings.keep,
                asynchronous=settings.asynchronous,
                layout=layout,
            )
        self.loss_scale: LossScale | None = None  # of a run in float16: saved, because the last bits follow from it
        self._newest: Path | None = None
        self._began_here = False
        self._rows = self._step = 0

    @property
    def is_on(self) -> bool:
        """Whether this run saves anything."""
        return self._settings.every is not None or self._settings.export is not None

    @property
    def goes_on(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._checkpoints is not None and self._checkpoints.start is not None

    def restore(self, model: nn.Module, optimizer: Optimizer, data: DataSource, is_main: bool) -> Restored | None:
        """Load where the run goes on, and say so; None where it starts anew.

        The learning rate and the optimizer's other settings are the config's, not the checkpoint's.
        """
        if self._checkpoints is None:
            return None
        restored = self._checkpoints.restore(model, optimizer, objects=_own(data), settings=False)
        if restored is None:
            return None
        self._newest = restored.folder
        self._began_here = restored.folder.parent == self._folder.absolute() / ROOT
        position = restored.objects.get("position")
        if position is None:
            what = f"{restored.folder} was not saved by this recipe: it does not say where the data stand"
            asked, allowed = f"checkpoint.resume={self._settings.resume}", "a checkpoint of the recipe, or null"
            raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead=anew(restored.folder)))
        self._rows, self._step = position["rows"], restored.step
        if self.loss_scale is not None and position.get("loss_scale") is not None:
            self.loss_scale.load_state_dict(position["loss_scale"])
        if isinstance(data, TextData):
            data.go_on(restored.step, self._rows)
        if is_main:
            changed = self._changed(restored)
            length = changed.pop(_LENGTH, None)
            more = "" if length is None else f"; {length}, and the learning rate's schedule is that of all of them"
            log.info("goes on after step %d, from %s%s", restored.step, restored.folder, more)
            if changed:
                log.warning("other settings than when it was saved: %s", ", ".join(changed.values()))
            if isinstance(data, TextData) and position["text"] not in (None, str(data.corpus.fingerprint)):
                log.warning("the text is another than when the checkpoint was saved; the run goes on in the new one")
        return restored

    def _changed(self, restored: Restored) -> dict[str, str]:
        """Key -> its value now and then, of what changes a number."""
        if restored.config is None:
            return {}
        then, now = flat_config(restored.config), flat_config(self._cfg)
        keys = [key for key in different_keys(now, then) if not key.startswith(_EXECUTION)]
        return {key: f"{key}={now.get(key, 'absent')} (was {then.get(key, 'absent')})" for key in keys}

    def after_step(
        self, step: int, model: nn.Module, optimizer: Optimizer, data: DataSource, loss: float, stop: int
    ) -> None:
        """Save after ``step`` steps where it is due; raise Preempted where a signal, ``stop``, ends the run there."""
        self._rows += self._cfg.train.global_batch_size
        self._step = step
        every = self._settings.every
        is_due = stop or step == self._steps or (every is not None and step % every == 0)
        if self.is_on and is_due:
            self._save(step, model, optimizer, data, loss)
        if stop:
            assert self._checkpoints is not None
            self._checkpoints.wait()
            raise self.stopped(stop)

    def stopped(self, by: int) -> Preempted:
        """What a run says that a signal ended: where, what is saved of it, and the command that goes on.

        A checkpoint that was being written when the run ended at once may not be there, so the folder is looked at.
        """
        name = "Ctrl-C" if by == signal.SIGINT else signal.Signals(by).name
        first = f"stopped by {name} after step {self._step} of {self._steps}"
        newest = next(iter(checkpoints_in(self._folder / ROOT)), None)
        if newest is not None:
            return Preempted(f"{first}\n  saved   {newest}\n  go on   {_command(f'hydra.run.dir={self._folder}')}", by)
        every = max(1, min(100, self._steps // 10))
        more = f"nothing, so it would begin anew; checkpoint.every={every} saves"
        return Preempted(f"{first}\n  saved   {more}\n  again   {_command(f'checkpoint.every={every}')}", by)

    def _save(self, step: int, model: nn.Module, optimizer: Optimizer, data: DataSource, loss: float) -> None:
        assert self._checkpoints is not None
        text = str(data.corpus.fingerprint) if isinstance(data, TextData) else None
        scale = None if self.loss_scale is None else self.loss_scale.state_dict()
        position = {"rows": self._rows, "loss": loss, "text": text, "loss_scale": scale}
        objects = {"position": position, **_own(data)}
        self._checkpoints.save(step, model, optimizer, objects=objects, config=self._cfg)
        self._newest = step_folder(self._checkpoints.folder, step)

    def finish(self) -> dict[str, str]:
        """Wait for what is being written; export where that is asked for. Facts for the summary."""
        if self._checkpoints is None:
            return {}
        self._checkpoints.wait()
        if self._newest is None:
            return {}
        facts = {"checkpoint": str(self._newest)}
        if self._settings.export is not None:
            from nemo_dist_conf.checkpoint.export import export_adapter, export_hf

            tokenizer, target = self._cfg.data.get("tokenizer"), self._folder / self._settings.export
            if tokenizer is not None and typed_path(tokenizer).exists():
                tokenizer = typed_path(tokenizer)
            if not self._began_here and target.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
                log.warning("%s of an earlier run in this folder is now %s", target.name, set_aside(target).name)
            if self._settings.export == "adapter":
                facts["export"] = str(export_adapter(self._newest, target))
            else:
                facts["export"] = str(export_hf(self._newest, target, tokenizer=tokenizer))
        return facts

    def close(self) -> None:
        """Wait for what is being written and give the folder back."""
        if self._checkpoints is not None:
            self._checkpoints.close()


def _own(data: DataSource) -> dict[str, Any]:
    """The user's own data where it has a state; ours follows from the step."""
    return {"data": data} if hasattr(data, "state_dict") and hasattr(data, "load_state_dict") else {}


def _command(word: str) -> str:
    """The command that started this run, with one word changed or added."""
    key = word.partition("=")[0]
    words = [typed for typed in sys.argv[1:] if typed.lstrip("+").partition("=")[0] != key]
    words = [typed for typed in words if typed != "checkpoint.resume=null"]  # which would refuse what is saved there
    place = launched()
    nodes = int(os.environ.get("GROUP_WORLD_SIZE") or 1)
    if place.source not in ("none", "torchrun") or nodes > 1:
        return f"the same command with {word}"
    started = "python" if place.source == "none" else f"torchrun --nproc-per-node {place.world_size}"
    return " ".join([started, program(), *map(shlex.quote, [*words, word])])
