"""Teachers, chosen in YAML by `class_path`."""

from lsm_lightning.teacher.base import Teacher
from lsm_lightning.teacher.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]
