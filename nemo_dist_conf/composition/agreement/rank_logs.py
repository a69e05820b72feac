"""Each rank keeps a log of its own; only rank 0 writes to the console and into ``.hydra``."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from nemo_dist_conf.composition.hydra_inside import written_at

__all__ = ["keep_apart", "rank_file"]


def rank_file(path: str, rank: int) -> str:
    """``folder/train.log`` -> ``folder/train.rank3.log``; rank 0 keeps the plain name."""
    if rank == 0:
        return path
    stem, suffix = (path, "") if path.endswith("}") else os.path.splitext(path)
    return f"{stem}.rank{rank}{suffix}"


def keep_apart(config: DictConfig, rank: int) -> None:
    """Change Hydra's config in place for a rank above 0: no ``.hydra``, log files of its own, nothing on the console.

    Handlers that write no file are taken out of every logger.
    """
    if rank == 0:
        return
    with (
        flag_override(config, ["readonly", "struct"], False),
        flag_override(config.hydra, ["readonly", "struct"], False),
    ):
        config.hydra.output_subdir = None
        logging = OmegaConf.select(config, "hydra.job_logging")
        handlers = None if logging is None else logging.get("handlers")
        if handlers is None:
            return
        files = [str(name) for name in handlers if handlers[name] is not None and "filename" in handlers[name]]
        for name in files:
            node: Any = handlers[name]
            node.filename = rank_file(str(written_at(node, "filename")), rank)
        for logger in (logging.get("root"), *(logging.get("loggers") or {}).values()):
            if logger is not None and logger.get("handlers"):
                logger.handlers = [name for name in logger.handlers if name in files]
