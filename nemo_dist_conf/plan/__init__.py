"""A run on paper: meshes, memory, traffic, time, schedule and the best layout, without torch, processes or GPUs.

from nemo_dist_conf.plan import job_of, make_plan
print(make_plan(job_of(cfg, world_size=64)).table())
"""

from nemo_dist_conf.plan.from_config import job_of
from nemo_dist_conf.plan.job import Job, Update
from nemo_dist_conf.plan.plan import Plan, make_plan
from nemo_dist_conf.plan.search import search

__all__ = ["Job", "Plan", "Update", "job_of", "make_plan", "search"]
