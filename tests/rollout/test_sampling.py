import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.sampling import NUCLEUS_GUESSES
from lsm_lightning.rollout.sampling import sample as tokens_and_log_probs

NUCLEUS = Sampling(temperature=1.0, top_p=0.9)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    return tokens_and_log_probs(logits, uniform, sampling)[0]


def nucleus(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Token → probability, renormalised: the fewest most probable tokens that hold `top_p` together."""
    probs = (torch.tensor(logits, dtype=torch.float64) / sampling.temperature).softmax(-1).tolist()
    chosen: dict[int, float] = {}
    for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if sum(chosen.values()) >= sampling.top_p:
            break
        chosen[token] = probs[token]
    total = sum(chosen.values())
    return {token: p / total for token, p in chosen.items()}


@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=20, unique=True),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0.05, 1.0),
    st.floats(0.2, 3.0),
)
def test_every_draw_is_in_the_nucleus(tenths, uniform, top_p, temperature):
    sampling = Sampling(temperature=temperature, top_p=top_p)
    logits = [x / 10 for x in tenths]
    token = sample(torch.tensor([logits]), torch.tensor([uniform]), sampling).item()
    # float32 may put a token at the very edge on either side of it
    wider = Sampling(temperature=temperature, top_p=min(1.0, top_p + 1e-5))
    assert token in nucleus(logits, wider)


def frequencies(logits: Tensor, sampling: Sampling, draws: int) -> Tensor:
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits.expand(draws, -1), uniform, sampling)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / draws


def chi_square_per_degree(logits: Tensor, sampling: Sampling, draws: int = 20_000) -> float:
    """About 1 where `sample` draws from the renormalised nucleus."""
    exact = nucleus(logits.tolist(), sampling)
    counts = frequencies(logits, sampling, draws) * draws
    assert counts.sum() == counts[list(exact)].sum() == draws
    return sum((counts[i].item() - draws * p) ** 2 / (draws * p) for i, p in exact.items()) / max(1, len(exact) - 1)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_renormalised_nucleus(top_p, temperature):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=temperature, top_p=top_p)
    # 40 degrees of freedom at most: 3 is beyond what chance gives in a million runs
    assert chi_square_per_degree(logits, sampling) < 3


def test_the_frequency_check_can_fail(monkeypatch):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    right = sample
    monkeypatch.setitem(globals(), "sample", lambda x, u, s: right(x / 1.1, u, s))
    assert chi_square_per_degree(logits, Sampling(top_p=1.0)) > 3


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0], ids="spread={}".format)
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_a_vocabulary_beyond_the_first_guess_is_drawn_from_all_the_same(spread, top_p):
    vocabulary = NUCLEUS_GUESSES[-1] + 300
    tilt = torch.arange(vocabulary) * 1e-4  # no ties, so the nucleus is unique
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(2)) * spread + tilt
    assert chi_square_per_degree(logits, Sampling(top_p=top_p), draws=60_000) < 1.5


def test_what_lies_beyond_the_guess_in_one_row_is_no_matter_for_another():
    """Also where tokens are equally probable, as coarse bf16 logits often are."""
    vocabulary = NUCLEUS_GUESSES[-1] + 300
    generator = torch.Generator().manual_seed(3)
    coarse = (torch.randn(64, vocabulary, generator=generator) * 16).round() / 4
    flat = torch.zeros(1, vocabulary)
    uniform = torch.rand(65, generator=generator)
    alone = torch.cat([sample(row[None], u[None], NUCLEUS) for row, u in zip(coarse, uniform, strict=False)])
    together = sample(torch.cat((coarse, flat)), uniform, NUCLEUS)
    assert together[:-1].tolist() == alone.tolist()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_a_draw_at_either_end_stays_inside(uniform):
    logits = torch.tensor([[0.0, -torch.inf, 2.0, 1.0, -torch.inf]])
    for top_p in (0.3, 0.9, 1.0):
        token = sample(logits, torch.tensor([uniform]), Sampling(top_p=top_p)).item()
        assert token in nucleus(logits[0].tolist(), Sampling(top_p=top_p))


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused_by_name_and_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        Sampling(**settings)


def test_all_of_the_vocabulary_is_drawn_from_without_sorting_it(monkeypatch):
    for name in ("sort", "argsort", "topk"):
        monkeypatch.setattr(Tensor, name, None)
    with pytest.raises(TypeError):
        sample(torch.zeros(1, 400), torch.tensor([0.5]), NUCLEUS)
    assert sample(torch.zeros(1, 400), torch.tensor([0.5]), Sampling(top_p=1.0)).tolist() == [200]


@pytest.mark.parametrize("spread", [0.0, 3.0], ids="spread={}".format)
def test_a_draw_from_a_large_vocabulary_keeps_its_digits(spread):
    """The token's own piece of the unit interval holds the number, up to float32's rounding of it."""
    vocabulary, draws = 150_001, 64
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(vocabulary, generator=generator) * spread
    uniform = torch.rand(draws, generator=generator)
    tokens = sample(logits.expand(draws, -1), uniform, Sampling(top_p=1.0))
    ends = logits.double().softmax(-1).cumsum(-1)
    starts = ends - logits.double().softmax(-1)
    assert bool((starts[tokens] - 2e-6 < uniform).all())
    assert bool((uniform < ends[tokens] + 2e-6).all())


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_probs_are_raw(temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    tokens, log_probs = tokens_and_log_probs(
        logits, torch.full((3,), 0.3), Sampling(temperature=temperature, top_p=0.5)
    )
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_what_is_no_number_stays_so_and_breaks_nothing(top_p):
    """Whoever asked looks at the log-probs."""
    logits = torch.randn(3, 50)
    logits[1] = torch.nan
    tokens, log_probs = tokens_and_log_probs(logits, torch.full((3,), 0.3), Sampling(top_p=top_p))
    assert log_probs.isfinite().tolist() == [True, False, True]
    assert (tokens < 50).all()


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_the_largest_draw_falls_on_a_token_with_some_probability(top_p):
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 20:23] = 1.0
    tokens, _ = tokens_and_log_probs(logits, torch.ones(1), Sampling(top_p=top_p))
    assert 20 <= int(tokens) < 23
