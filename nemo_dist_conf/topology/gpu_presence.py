"""Whether this machine has a GPU that torch can use, told without importing torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cuda_count", "cuda_present"]


def cuda_present() -> bool:
    """True where CUDA can be expected to work: torch's own answer once it is imported, signs of it before.

    The signs: a driver's device file, a visible device, and a torch that is not a CPU build.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda"):
        return bool(torch.cuda.is_available())
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    if not any(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*")):
        return False
    import importlib.metadata

    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def cuda_count() -> int:
    """How many GPUs this process may use: torch's own answer once it is imported, else visible device files."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda"):
        return int(torch.cuda.device_count())
    if not cuda_present():
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip()])
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
