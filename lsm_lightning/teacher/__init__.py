"""Teachers, chosen in YAML by `class_path`."""

from lsm_lightning.teacher.base import Teacher
from lsm_lightning.teacher.local import LocalTeacher
from lsm_lightning.teacher.served import ServedTeacher

__all__ = ["LocalTeacher", "ServedTeacher", "Teacher"]
