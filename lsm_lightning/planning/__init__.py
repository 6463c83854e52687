"""The planner: where memory and time of a run will go, before anything is loaded."""

from lsm_lightning.planning.plan import Plan, TaskPlan, plan
from lsm_lightning.planning.report import as_dict, show

__all__ = ["Plan", "TaskPlan", "as_dict", "plan", "show"]
