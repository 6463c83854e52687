"""Where is a comparison of two models' tokens about the text, and where only about spelling?"""

from tokenalign.chunks import Alignment
from tokenalign.convention import Convention
from tokenalign.flags import Flag, Policy, TokenFlags
from tokenalign.pair import Pair
from tokenalign.queries import canonical, tag_spans
from tokenalign.relation import Relation, VocabMap
from tokenalign.report import Report
from tokenalign.respelling import TeacherText
from tokenalign.supports import merge_class, project_topk

__all__ = [
    "Alignment",
    "Convention",
    "Flag",
    "Pair",
    "Policy",
    "Relation",
    "Report",
    "TeacherText",
    "TokenFlags",
    "VocabMap",
    "canonical",
    "merge_class",
    "project_topk",
    "tag_spans",
]
