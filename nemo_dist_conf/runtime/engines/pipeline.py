"""The engine of a model that is split into pipeline stages, whichever strategy shards each of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Collection, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.runtime.engines.base import Engine, unwrapped

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.engines.pipeline_model import StageRow

__all__ = ["PipelineEngine"]


class PipelineEngine(Engine):
    """The model is a ``Pipeline``, whose ``step`` takes the place of the microbatches of a loop."""

    name = "pipeline"

    def __init__(self, of_stage: Engine) -> None:
        """of_stage: the strategy's engine, which has sharded the stages."""
        super().__init__(of_stage.config, of_stage.device_mesh, of_stage.moe_mesh, groups=of_stage.groups)
        self._of_stage = of_stage

    def model_name(self, model: Any) -> str:
        stage = next(iter(model.parts.values()))
        return self._of_stage.model_name(stage)

    def show_shards(self, model: Any) -> None:
        for stage in model.parts.values():
            self._of_stage.show_shards(stage)

    def weights_changed(self, model: Any) -> None:
        for stage in model.parts.values():
            self._of_stage.weights_changed(stage)

    def replica_groups(self, model: nn.Module) -> Sequence[dist.ProcessGroup]:
        return self._of_stage.replica_groups(model)

    def stage_mesh(self, model: Any) -> DeviceMesh | None:
        mesh: DeviceMesh = model.pp_mesh
        return mesh

    def stages(self, model: Any) -> tuple[StageRow, ...]:
        rows: tuple[StageRow, ...] = model.rows
        return rows

    def counted_elsewhere(self, model: Any) -> Collection[int]:
        found: set[int] = model.shared.counted_elsewhere()
        return found

    def on_several_stages(self, model: Any) -> Collection[str]:
        names: list[str] = model.shared.on_several_ranks()
        return names

    def parts(self, model: Any) -> list[nn.Module]:
        return [unwrapped(stage) for stage in model.parts.values()]

    def own_name(self, name: str) -> str:
        return re.sub(r"^parts\.\d+\.", "", name)
