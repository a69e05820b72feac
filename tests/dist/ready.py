"""Imported by the fork server: what the first compose of a process takes, done once for all ranks and programs.

Hydra looks for its plugins and learns its grammar in the first compose of a process, half a second, and takes a
quarter of a second for each other choice of groups.
"""

from __future__ import annotations

from nemo_dist_conf.names import SCHEDULES
from tests import conftest
from tests.dist import layouts

__all__: list[str] = []

for choice in ((), *((f"strategy={name}",) for name in ("fsdp2", "ddp", "megatron_fsdp"))):
    layouts.choice_of(choice)
for schedule in SCHEDULES:
    layouts.choice_of((f"pipeline={schedule}",))
conftest.close_hydra()
