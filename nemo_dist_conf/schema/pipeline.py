"""The group ``pipeline``: schedule and splitting, in effect where pp_size is above 1."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

from nemo_dist_conf.names import DType
from nemo_dist_conf.schema.option import option

__all__ = ["PipelineConf", "RoundVirtualStages"]


class RoundVirtualStages(Enum):
    """Which way the number of stages is rounded to a multiple of pp_size."""

    up = "up"
    down = "down"


@dataclass
class PipelineConf:
    """Pipeline parallelism on torch.distributed.pipelining; names and defaults of the API page."""

    pp_schedule: Optional[str] = option("1f1b", "schedule by option name or by torch's class name; null: from the CSV")
    pp_schedule_csv: Optional[str] = option(None, "file with one row of actions per rank, in place of a named schedule")
    pp_microbatch_size: int = option(1, "rows of a microbatch")
    pp_batch_size: int = option(1, "rows that a data rank hands to the pipeline in one step")
    layers_per_stage: Optional[int] = option(None, "layers of a stage; null: split evenly, embedding and head weighted")
    round_virtual_stages_to_pp_multiple: Optional[RoundVirtualStages] = option(
        None, "up or down: round the number of stages to a multiple of pp_size; null: refuse a remainder"
    )
    # A typed Optional[List[List[str]]] = None cannot be filled from the command line (OmegaConf 2.3).
    module_fqns_per_model_part: Any = option(
        None, "the modules of every stage by name, a list of lists; null: split automatically"
    )
    patch_inner_model: bool = option(True, "replace the decoder's forward by one that skips what other stages hold")
    patch_causal_lm_model: bool = option(True, "the same for the causal-LM wrapper around the decoder")
    patch_stage_backward_maybe_with_nosync: bool = option(
        False, "hold back gradient reduction until a stage's last backward"
    )
    dtype: Optional[DType] = option(None, "dtype of what stages send to each other; null: what the model computes in")
    scale_grads_in_schedule: bool = option(False, "let the schedule divide gradients by the number of microbatches")
    loss_fn: Optional[str] = option(None, "loss as package.module.function; null: token-wise cross entropy")
    pp_seq_len: Optional[int] = option(None, "tokens of a row, for the shapes between stages; null: of the first batch")
