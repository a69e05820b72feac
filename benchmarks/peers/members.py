"""Who is compared: each side's module, environment and name in tables, and whom the ratios are to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BASE", "SIDES", "Side"]


@dataclass(frozen=True)
class Side:
    """A module of sides/, its environment's file, how it is called in tables, a command that shows help, and what of
    the peer's is installed."""

    module: str
    environment: str
    title: str
    help: tuple[str, ...] = ()
    package: str | None = None


SIDES = (
    Side("hand", "hand", "by hand"),
    Side("hand_fused", "hand", "by hand, fused AdamW"),
    Side("hand_whole", "hand", "by hand, compiled as one"),
    Side("ours", "ours", "nemo_dist_conf", ("-m", "nemo_dist_conf.train", "--help")),
    Side("accelerate_side", "accelerate", "Accelerate", ("-m", "accelerate.commands.launch", "--help"), "accelerate"),
    Side("fabric_side", "fabric", "Fabric", ("-m", "lightning_fabric.cli", "run", "--help"), "lightning-fabric"),
)
#: Ratios are to this side, and its losses are what the others must have.
BASE = "hand"
