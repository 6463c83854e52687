import math

import pytest
import torch
from slow import positions, top_support
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import FullVocabulary, LocalSupportMatching
from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Support

N, D, V, K = 8, 6, 30, 4
SUPPORTS = ["renormalise", "tail_bucket", "generalised"]
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher_support(seed: int = 3, k: int = K, added: Tensor | None = None) -> Support:
    return top_support(drawn(N, V, seed=seed) * 2, torch.zeros(N, dtype=torch.long), k, added)


def head_as_logits() -> tuple[OutputHead, Tensor]:
    """A head whose hidden states are the logits themselves."""
    return OutputHead(weight=torch.eye(V, dtype=torch.float64)), drawn(N, V, seed=1) * 2


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_k_of_one_is_refused_with_the_reason_and_the_remedy(source):
    with pytest.raises(ConfigurationError, match=r"k=1\).*always 0.*`SampledToken`"):
        LocalSupportMatching(k=1, source=source)
    assert LocalSupportMatching(k=2).teacher_tokens == 2


@pytest.mark.parametrize("source", ["union", "sampled_added"])
def test_one_token_of_each_of_two_is_a_comparison(source):
    LocalSupportMatching(k=1, source=source)
    head, hidden = head_as_logits()
    added = (hidden - drawn(N, V, seed=3) * 2).topk(1).indices  # what the teacher thinks less of
    loss = LocalSupportMatching(k=1, source=source)(head, positions(hidden, teacher_support(k=1, added=added)))
    assert loss.value.max() > 0.1


@pytest.mark.parametrize("support", [*SUPPORTS, "raw"])
def test_no_support_at_all_is_refused(support):
    for k in (0, -3):
        with pytest.raises(ConfigurationError, match=rf"k={k}\): use a positive number of tokens"):
            LocalSupportMatching(k=k, support=support)


def test_one_token_and_a_tail_are_a_comparison():
    head, hidden = head_as_logits()
    loss = LocalSupportMatching(k=1, support="tail_bucket")(head, positions(hidden, teacher_support(k=1)))
    assert (loss.value > 0).all()


def test_raw_sums_come_with_a_warning_that_says_where_to_read_about_it():
    with pytest.warns(UserWarning, match="reverse_kl .*collapses .*arXiv 2603.25562"):
        LocalSupportMatching(support="raw")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_raw_sums_of_another_divergence_come_without_it(divergence):
    LocalSupportMatching(support="raw", divergence=divergence)  # a warning would be an error here


@pytest.mark.parametrize(
    ("source", "asked"),
    [("teacher", (K, 0, False)), ("student", (0, K, False)), ("union", (K, K, False)), ("sampled_added", (K, 0, True))],
)
def test_a_source_is_what_is_asked_of_both_sides(source, asked):
    objective = LocalSupportMatching(k=K, source=source)
    assert (objective.teacher_tokens, objective.student_tokens, objective.adds_sampled) == asked
    assert not objective.compares_sampled


def test_temperature_needs_the_normaliser_to_cancel():
    with pytest.raises(ConfigurationError, match="only `renormalise`"):
        LocalSupportMatching(support="tail_bucket", temperature=2.0)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigurationError, match=f"temperature={wrong}"):
            LocalSupportMatching(temperature=wrong)


def test_temperature_compares_both_sides_at_that_temperature():
    head, hidden = head_as_logits()
    support = teacher_support()
    loss = LocalSupportMatching(k=K, temperature=2.0)(head, positions(hidden, support))
    hot = [(x / 2).softmax(-1) for x in (hidden.gather(1, support.ids), support.log_probs)]
    assert_close(loss.value, (hot[0] * (hot[0] / hot[1]).log()).sum(-1))


# ---- what is compared and told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_equals_the_divergence_of_true_log_probs(support, divergence):
    head = OutputHead(weight=drawn(V, D, seed=2))
    hidden, teacher = drawn(N, D, seed=1), teacher_support()
    student = (hidden @ head.weight.T).log_softmax(-1).gather(1, teacher.ids)
    loss = LocalSupportMatching(k=K, support=support, divergence=divergence)(head, positions(hidden, teacher))
    expected = support_divergence(student, teacher.log_probs, support=support, divergence=divergence)
    assert_close(loss.value, expected)
    assert_close(loss.metrics["kl"], expected)


@pytest.mark.parametrize("support", SUPPORTS)
def test_the_mass_outside_the_support_of_both_sides_is_told(support):
    """Of what is no member, such as an id that is there a second time."""
    head, hidden = head_as_logits()
    teacher = teacher_support(added=teacher_support().ids[:, :2])
    metrics = LocalSupportMatching(k=K, support=support)(head, positions(hidden, teacher)).metrics
    members = teacher_support().ids
    for side, logits in (("student", hidden), ("teacher", drawn(N, V, seed=3) * 2)):
        outside = logits.softmax(-1).scatter(1, members, 0.0).sum(-1)
        assert_close(metrics[f"{side}_mass_outside"], outside, rtol=1e-9, atol=1e-12)
    first = hidden.gather(1, members).argmax(-1)
    assert_close(metrics["top1_agreement"].double(), (first == 0).double())


@pytest.mark.parametrize(("support", "least"), [("renormalise", 2), ("tail_bucket", 1), ("generalised", 1)])
def test_positions_without_a_comparison_are_told_and_agree_about_nothing(support, least):
    head, hidden = head_as_logits()
    teacher = teacher_support()
    teacher.log_probs[:2] = -torch.inf
    teacher.log_probs[2:5, 1:] = -torch.inf
    teacher.ids.masked_fill_(teacher.log_probs == -torch.inf, 0)
    loss = LocalSupportMatching(k=K, support=support)(head, positions(hidden, teacher))
    empty = torch.tensor([0] * 2 + [1] * 3 + [K] * (N - 5)) < least
    assert loss.metrics["support_empty"].tolist() == empty.float().tolist()
    assert (loss.value[empty] == 0).all()
    assert (loss.value[~empty] != 0).all()
    everywhere = LocalSupportMatching(k=K, support=support)(head, positions(hidden, teacher_support()))
    agreement = loss.metrics["top1_agreement"].tolist()
    assert len(agreement) == int((~empty).sum())
    assert agreement[-(N - 5) :] == everywhere.metrics["top1_agreement"][5:].tolist()
    assert (everywhere.metrics["support_empty"] == 0).all()


def test_what_needs_all_logits_is_looked_at_where_it_is_watched():
    head, hidden = head_as_logits()
    watched = torch.arange(N) % 3 == 0
    at_some = LocalSupportMatching(k=K)(head, positions(hidden, teacher_support(), watched=watched))
    everywhere = LocalSupportMatching(k=K)(head, positions(hidden, teacher_support()))
    name = "student_mass_outside"
    assert at_some.metrics[name].tolist() == everywhere.metrics[name][watched].tolist()
    assert at_some.value.tolist() == everywhere.value.tolist()


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_token_in_both_top_ks_counts_once(support):
    """The union of overlapping supports is that of the set of their tokens."""
    head, hidden = head_as_logits()
    k, teacher = V // 3, drawn(N, V, seed=3) * 2
    union = positions(hidden, teacher_support(k=k, added=hidden.topk(k).indices))
    loss = LocalSupportMatching(k=k, source="union", support=support)(head, union)
    overlaps = 0
    for n in range(N):
        tokens = sorted({*teacher[n].topk(k).indices.tolist(), *hidden[n].topk(k).indices.tolist()})
        overlaps += 2 * k - len(tokens)
        sides = [side[n].log_softmax(-1)[tokens] for side in (hidden, teacher)]
        assert loss.value[n].item() == pytest.approx(support_divergence(*sides, support=support).item(), abs=1e-12)
    assert overlaps > 10


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_full_vocabulary_is_the_exact_divergence_and_all_of_the_supports(divergence):
    head, hidden = head_as_logits()
    everything = teacher_support(k=V)
    full = FullVocabulary(divergence)(head, positions(hidden, everything))
    p, q = hidden.softmax(-1), (drawn(N, V, seed=3) * 2).softmax(-1)
    middle = (p + q) / 2
    exact = {
        "reverse_kl": (p * (p / q).log()).sum(-1),
        "forward_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2,
    }
    assert_close(full.value, exact[divergence], rtol=1e-10, atol=1e-12)
    for support in SUPPORTS:
        some = LocalSupportMatching(k=V, support=support, divergence=divergence)(head, positions(hidden, everything))
        assert_close(some.value, full.value, rtol=1e-9, atol=1e-10)
        for name, values in some.metrics.items():
            assert_close(values.double(), full.metrics[name].double(), rtol=1e-9, atol=1e-9)
    smaller = LocalSupportMatching(k=V // 2, divergence=divergence)(head, positions(hidden, teacher_support(k=V // 2)))
    assert (smaller.value - full.value).abs().max() > 1e-3  # the check can fail


def test_over_vocabularies_that_differ_the_mass_elsewhere_counts():
    """Tokens that the teacher lacks are no members, and what the student puts there is a loss."""
    head, hidden = head_as_logits()
    shared = teacher_support(k=V)
    shared.log_probs[:, V // 2 :] = -torch.inf
    loss = FullVocabulary()(head, positions(hidden, shared))
    p, log_q = hidden.softmax(-1).gather(1, shared.ids)[:, : V // 2], shared.log_probs[:, : V // 2]
    assert_close(loss.value, (p * (p.log() - log_q)).sum(-1) + log_q.exp().sum(-1) - p.sum(-1))
    assert_close(loss.metrics["student_mass_outside"], 1 - p.sum(-1))
    assert_close(loss.metrics["teacher_mass_outside"], 1 - log_q.exp().sum(-1))
    nothing_missing = FullVocabulary()(head, positions(hidden, teacher_support(k=V))).metrics["student_mass_outside"]
    assert nothing_missing.abs().max() < 1e-12
