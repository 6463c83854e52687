"""A teacher's log-probs in terms of the student's ids."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.top_k import top_k
from tokenalign import Pair, VocabMap, project_topk


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Which of the teacher's tokens may enter a support, and what they are to the student."""

    vocab: VocabMap
    members: Bool[Tensor, " v"]
    """Over the teacher's output rows: its tokens, without the padding of its vocabulary."""
    to_teacher: Int[Tensor, " u"]
    """Teacher id of each student id, -1 for none."""
    ends: Int[Tensor, " e"]
    """End-of-turn tokens scored as one class: the first holds the probability of all. Empty: each on its own."""
    rivals: Int[Tensor, " r"]
    """Student ids that look like the teacher's end of a turn and do not end the student's."""

    @classmethod
    def of_ids(cls, pair: Pair, vocabulary: int, rows: int, name: str, device: torch.device) -> "Translation":
        """Every token that both sides have under the same id; the teacher reads the student's ids as they stand.

        Args:
            pair: Student and teacher.
            vocabulary: The student's output rows; no id beyond them is translated to.
            rows: The teacher's.
            name: The teacher's, for messages.
            device: Where log-probs are going to be.

        Raises:
            ConfigurationError: A token has another id at the teacher, or its id is another token there, so that the
                teacher would misread the student's ids.
        """
        to_teacher = pair.vocab.to_teacher
        same = to_teacher == np.arange(len(to_teacher))
        moved = np.flatnonzero(~same & (to_teacher >= 0))
        # The same bytes in another role are read rightly; an id that is padding there is no member and left out.
        other = [i for i in pair.collisions if pair.student.pieces[i] != pair.teacher.pieces[i]]
        if differing := len({*moved.tolist(), *other}):
            raise ConfigurationError(
                f"The vocabularies of the student and of the teacher '{name}' differ: {differing} of the student's "
                f"{len(to_teacher)} ids are other tokens there, and it would read the student's ids as they stand. "
                "Set model.mask to repair, which gives it its own spelling of the texts."
            )
        to_student = np.full(rows, -1, np.int32)
        shared = np.flatnonzero(same[: min(rows, vocabulary)])
        to_student[shared] = shared
        return cls._made(to_student, np.where(same, to_teacher, -1), to_student >= 0, device)

    @classmethod
    def of_meaning(cls, pair: Pair, vocabulary: int, rows: int, name: str, device: torch.device) -> "Translation":
        """Every token with the same bytes and role, and the end of a turn as one token on both sides.

        Arguments as `of_ids`.

        Raises:
            ConfigurationError: The vocabularies have next to nothing in common.
        """
        student, teacher = pair.conventions
        to_teacher, to_student = pair.vocab.to_teacher.copy(), pair.vocab.to_student[:rows].copy()
        members = pair.teacher.lengths[:rows] > 0
        ends, rivals = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if student.own_turn_end is not None and teacher.own_turn_end is not None:
            # Whatever ends the student's turn is the teacher's end of a turn, and that is the student's own.
            to_student[np.isin(to_student, [*student.turn_end])] = -1
            ends = np.array([teacher.own_turn_end, *sorted(teacher.turn_end - {teacher.own_turn_end})])
            rivals = np.setdiff1d(np.flatnonzero(np.isin(to_teacher, ends)), [*student.turn_end])
            to_teacher[rivals] = -1
            to_teacher[[*student.turn_end]] = teacher.own_turn_end
            to_student[ends] = -1
            to_student[teacher.own_turn_end] = student.own_turn_end
            members[ends[1:]] = False
        to_student[to_student >= vocabulary] = -1
        to_teacher[to_teacher >= rows] = -1
        made = cls._made(to_student, to_teacher, members, device, ends, rivals[rivals < vocabulary])
        if made.known < 2:
            raise ConfigurationError(
                f"The student and the teacher '{name}' share {made.known} tokens, too few to compare them over: see "
                "`python -m tokenalign inspect` on the two, and choose another teacher."
            )
        return made

    @classmethod
    def _made(
        cls,
        to_student: NDArray[np.int32],
        to_teacher: NDArray[np.int32],
        members: NDArray[np.bool_],
        device: torch.device,
        ends: NDArray[np.int64] = np.zeros(0, np.int64),
        rivals: NDArray[np.int64] = np.zeros(0, np.int64),
    ) -> "Translation":
        return cls(
            vocab=VocabMap(to_teacher=to_teacher, to_student=to_student),
            members=torch.from_numpy(members).to(device),
            to_teacher=torch.from_numpy(to_teacher).long().to(device),
            ends=torch.from_numpy(ends).to(device),
            rivals=torch.from_numpy(rivals).to(device),
        )

    @cached_property
    def bar(self) -> Float[Tensor, " v"]:
        """Added to log-probs, it takes out all but the members."""
        return torch.where(self.members, 0.0, -torch.inf)

    @property
    def known(self) -> int:
        """How many of the teacher's tokens have a counterpart."""
        return int((self.vocab.to_student >= 0).sum())

    def translate(
        self, log_probs: Float[Tensor, "n v"], k: int, added: Int[Tensor, "n c"]
    ) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"], Float[Tensor, " n"]]:
        """The members of a support by the student's ids, their log-probs (-inf: no member), and the mass lost.

        Rivals are members, no more probable than the least probable of the others, nor than their even share of what
        all these leave over, so that no row sums to more than 1. Without them a student could take to the teacher's way
        of ending a turn unseen: the teacher means an end, and the id is in no other support.

        Args:
            log_probs: The teacher's, over its whole vocabulary, with the end of a turn as one token (`merge_`). They
                are overwritten: at this size another copy takes as long as all the rest.
            k: How many of its top tokens; fewer come back where the student lacks some.
            added: Further student ids.
        """
        theirs = self.to_teacher[added]
        of_added = log_probs.gather(-1, theirs.clamp(min=0))
        top, values, lost = self._top(log_probs.add_(self.bar), k)
        more = of_added.masked_fill(self._is_idle(theirs, top), -torch.inf)
        ids, members = torch.cat((top, added), -1), torch.cat((values, more), -1)
        if len(self.rivals) and ids.shape[1]:
            least = members.masked_fill(members == -torch.inf, torch.inf).amin(-1, keepdim=True)
            least = least.masked_fill(least == torch.inf, -torch.inf)
            left = 1 - members.exp().sum(-1, keepdim=True) - lost.unsqueeze(-1)
            # One more share than there are rivals, or nothing would be left over for all other tokens.
            share = left.clamp(min=torch.finfo(left.dtype).eps).log() - math.log(len(self.rivals) + 1)
            ids = torch.cat((ids, self.rivals.expand(len(ids), -1)), -1)
            members = torch.cat((members, torch.minimum(least, share).expand(-1, len(self.rivals))), -1)
        return ids, members, lost

    def merge_(self, log_probs: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Make the end of a turn one token of the log-probs, in place."""
        if len(self.ends):
            of_class = log_probs[:, self.ends].logsumexp(-1, keepdim=True)
            log_probs.index_fill_(-1, self.ends, -torch.inf).index_copy_(-1, self.ends[:1], of_class)
        return log_probs

    def _top(
        self, log_probs: Float[Tensor, "n v"], k: int
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"], Float[Tensor, " n"]]:
        top, indices = top_k(log_probs, k)
        translated = project_topk(self.vocab, indices.cpu().numpy(), top.cpu().numpy())
        ids, values, lost = (torch.from_numpy(array).to(log_probs.device) for array in translated)
        return ids.long(), values, lost.to(values.dtype)

    def _is_idle(self, added: Int[Tensor, "n c"], top: Int[Tensor, "n k"]) -> Bool[Tensor, "n c"]:
        """Whether a token adds nothing: the teacher lacks it, or its meaning is there, be it under another id.

        Args:
            added: The teacher's ids; -1 for none.
            top: The student's.
        """
        of_top = self.to_teacher[top.clamp(min=0)].masked_fill(top < 0, -1)
        place = torch.arange(added.shape[1], device=added.device)
        repeated = ((added.unsqueeze(-1) == added.unsqueeze(-2)) & (place < place.unsqueeze(-1))).any(-1)
        there = (added.unsqueeze(-1) == of_top.unsqueeze(-2)).any(-1)
        return (added < 0) | there | repeated
