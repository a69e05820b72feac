"""What an earlier run left in this one's output folder: nothing of it is overwritten, it gets a number. No torch."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.checkpoint.manifest import ROOT, checkpoints_in

__all__ = ["keep_snapshot", "next_number", "set_aside"]


def next_number(path: Path) -> Path:
    """``metrics.1.jsonl`` for ``metrics.jsonl``; 2 where there is that already, and so on."""
    number = 1
    while (found := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return found


def set_aside(path: Path) -> Path:
    """Give a file or folder the next free number; where it is then."""
    return path.rename(next_number(path))


def keep_snapshot(config: DictConfig) -> Path | None:
    """Where the snapshot of another config is now that an earlier run left in this run's folder; None without one.

    To be called before Hydra writes its own (``.hydra``). A run that goes on from a checkpoint there leaves it: the
    checkpoint has the config as well.
    """
    folder, name = (OmegaConf.select(config, key) for key in ("hydra.run.dir", "hydra.output_subdir"))
    if folder is None or name is None:
        return None
    if OmegaConf.select(config, "checkpoint.resume") is not None and checkpoints_in(Path(str(folder)) / ROOT):
        return None
    there = Path(str(folder)) / str(name)
    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        before = (there / "config.yaml").read_text(encoding="utf-8")
        return set_aside(there) if before != OmegaConf.to_yaml(task) else None
    except OSError:
        return None
