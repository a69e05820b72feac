"""A run on paper: meshes, memory, traffic, time, schedule and the best layout, without torch, processes or GPUs.

from nemo_dist_conf.plan import job_of, make_plan, table
print(table(make_plan(job_of(cfg, world_size=64))))
"""

from nemo_dist_conf.plan.from_config import job_of
from nemo_dist_conf.plan.job import Job, Update
from nemo_dist_conf.plan.plan import Plan, make_plan
from nemo_dist_conf.plan.search import search
from nemo_dist_conf.plan.text_report import summary, table

__all__ = ["Job", "Plan", "Update", "job_of", "make_plan", "search", "summary", "table"]
