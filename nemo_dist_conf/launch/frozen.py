"""Imported last by a process that ranks are forked from: what it holds is left alone by their garbage collections.

Without that a rank's first full collection visits, and so copies page by page, all that torch and transformers made
when they were imported: 0.3 s on the machine of benchmarks/results/launch.md, 0.03 s with it. Source: the note at
gc.freeze in Python's documentation.
"""

from __future__ import annotations

import gc

__all__: list[str] = []

gc.collect()
gc.freeze()
