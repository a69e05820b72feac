"""The plan of a run beside the run: its short form at the start, estimate against measurement at the end."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from nemo_dist_conf.errors import NemoDistConfError
from nemo_dist_conf.plan import Plan, job_of, make_plan, summary
from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf, profile_of_device

__all__ = ["measured", "plan_of_run", "planned"]

log = logging.getLogger(__name__)


def plan_of_run(cfg: Any, context: MeshContext) -> Plan | None:
    """The plan for the machine that runs it; None for a device or a model of which too little is known.

    A model without a row of shapes is not built once more for it: the start of a run is not to wait for its plan.
    Nothing that goes wrong in it may stop the run that it is of.
    """
    try:
        machine = _machine(context.device)
        if machine is None:
            return None
        plan = make_plan(job_of(cfg, context.world_size, machine, builds=False))
        summary(plan)
        return plan
    except NemoDistConfError as error:  # a user's own module has no config to plan from
        log.debug("no plan: %s", error)
    except Exception as error:
        log.warning("no plan of this run, which goes on without (%s: %s)", type(error).__name__, error)
    return None


def _machine(device: torch.device) -> HardwareConf | None:
    if device.type == "cuda":
        profile = profile_of_device(torch.cuda.get_device_name(device))
        return HardwareConf(**PROFILES[profile]) if profile is not None else None
    core = HardwareConf(**PROFILES["cpu"])
    return dataclasses.replace(core, fp32_tflops=core.fp32_tflops * torch.get_num_threads())


def planned(plan: Plan | None) -> dict[str, str]:
    """The plan in one line, for the start of a run."""
    return {} if plan is None else {"plan": summary(plan)}


def measured(plan: Plan | None, tokens_per_second: float, peak_bytes: int, context: MeshContext) -> dict[str, str]:
    """What a run took, as a multiple of its plan; memory on a GPU only, where torch counts its own."""
    if plan is None or not tokens_per_second or not plan.step.seconds:
        return {}
    seconds = plan.job.global_rows * plan.job.seq_len / tokens_per_second
    text = f"{1e3 * seconds:,.1f} ms a step, {seconds / plan.step.seconds:.2f} of the plan's"
    if context.device.type == "cuda":
        text += f"; peak {peak_bytes / 2**30:.2f} GiB, {peak_bytes / plan.most.peak:.2f} of the plan's"
    return {"against plan": text}
