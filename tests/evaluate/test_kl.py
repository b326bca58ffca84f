"""KL divergence, agreement and perplexity against a plain computation in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from modelopt.core.errors import CalibrationError, ModeError, ShapeError
from modelopt.evaluate import logits as logits_module
from modelopt.evaluate.kl import Reference, compare
from modelopt.evaluate.logits import split
from modelopt.evaluate.perplexity import perplexity

VOCABULARY, WIDTH = 50, 16


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        return self.dropout(self.mix(self.embed(ids))[0])


class Causal(nn.Module):
    """A model with the two names of transformers that let it be split."""

    def __init__(self, cap=None):
        super().__init__()
        self.base_model = Body()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.cap = cap
        self.calls = 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        self.calls += 1
        logits = self.head(self.base_model(ids))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def noisy(model, amount=0.3):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * amount)
    return other


def plain(original, candidate, windows):
    """The definition, in float64."""
    original, candidate = copy.deepcopy(original).double().eval(), copy.deepcopy(candidate).double().eval()
    with torch.no_grad():
        p, q = original(windows).log_softmax(-1), candidate(windows).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    nll = [-x[:, :-1].gather(-1, windows[:, 1:, None]).mean() for x in (p, q)]
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return kl, same, nll[0].exp(), nll[1].exp()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Causal()


@pytest.fixture
def windows():
    return torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["split", "capped", "callable"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_against_the_definition(model, windows, kind, chunk, batch_size, monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
    model.cap = 0.7 if kind == "capped" else None
    other = noisy(model)
    other.eval()
    assert (split(model.eval(), windows) is not None) == (kind != "capped")
    a, b = (model, other) if kind != "callable" else (model.forward, other.forward)
    result = compare(a, b, windows, batch_size=batch_size)
    kl, same, original, candidate = plain(model, other, windows)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-5) and result.kl > 0.01
    assert result.kl_standard_error == pytest.approx(float(kl.mean(1).std() / math.sqrt(5)), rel=1e-4)
    assert result.kl_per_window == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert result.kl_p99 == pytest.approx(float(kl.flatten().sort()[0][59]), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float(same)) and result.top1_agreement < 1
    assert result.original_perplexity == pytest.approx(float(original), rel=1e-5)
    assert result.perplexity == pytest.approx(float(candidate), rel=1e-5)
    assert (result.num_tokens, result.num_windows) == (60, 5)


def test_a_model_is_at_distance_zero_from_itself(model, windows):
    result = compare(model, model, windows)
    assert result.kl == pytest.approx(0, abs=1e-7) and result.top1_agreement == 1


def test_kl_is_that_of_original_to_candidate_and_not_the_reverse(model, windows):
    other = noisy(model)
    forward, backward = compare(model, other, windows).kl, compare(other, model, windows).kl
    assert forward == pytest.approx(float(plain(model, other, windows)[0].mean()), rel=1e-5)
    assert abs(forward - backward) > 1e-3


def test_the_original_runs_once_and_may_change_afterwards(model, windows):
    other = noisy(model)
    expected = compare(model, other, windows)
    reference = Reference(model, windows)
    calls = model.calls
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    again = reference.compare(other)
    assert again.kl == expected.kl and model.calls == calls
    assert reference.compare(model).kl > 0


def test_a_callable_that_changed_is_refused(model, windows):
    model.eval()
    reference = Reference(model.forward, windows)
    with torch.no_grad():
        model.head.weight.mul_(3)
    with pytest.raises(ModeError, match="The original changed"):
        reference.compare(noisy(model).eval().forward)


def test_dropout_is_off_and_training_flags_come_back(model, windows):
    model.train()
    model.base_model.mix.eval()
    assert compare(model, model, windows).kl == pytest.approx(0, abs=1e-7)
    assert model.training and model.base_model.dropout.training and not model.base_model.mix.training


def test_a_head_with_an_active_quantizer_is_run_whole(model, windows):
    model.eval()
    model.head.input_quantizer = nn.Identity()
    model.head.input_quantizer.is_enabled = False
    assert split(model, windows) is not None
    model.head.input_quantizer.is_enabled = True
    assert split(model, windows) is None


def test_masked_tokens_do_not_spoil_the_sum(model, windows):
    def masked(net):
        def forward(ids):
            logits = net(ids)
            logits[..., 3] = -torch.inf
            return logits

        return forward

    model.eval()
    other = noisy(model).eval()
    keep = [v for v in range(VOCABULARY) if v != 3]
    ids = windows.masked_fill(windows == 3, 4)
    expected = compare(lambda x: model(x)[..., keep], lambda x: other(x)[..., keep], ids.clamp(max=48)).kl
    assert compare(masked(model), masked(other), ids.clamp(max=48)).kl == pytest.approx(expected, rel=1e-5)


def test_bad_input(model, windows):
    with pytest.raises(ShapeError, match="wanted integer token ids"):
        compare(model, model, windows.float())
    with pytest.raises(ShapeError, match="vocabulary"):
        compare(model, lambda ids: torch.zeros(*ids.shape, 7), windows)
    with pytest.raises(ShapeError, match="wanted"):
        compare(model, lambda ids: torch.zeros(3, 7), windows)
    broken = noisy(model)
    with torch.no_grad():
        broken.head.weight[4, 4] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        compare(model, broken, windows)


def test_one_window_has_no_standard_error(model, windows):
    assert compare(model, noisy(model), windows[:1]).kl_standard_error is None


def test_perplexity(model, windows):
    result = perplexity(model, windows, batch_size=2)
    assert result.perplexity == pytest.approx(float(plain(model, model, windows)[2]), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll)) and result.num_tokens == 55
    uniform = perplexity(lambda ids: torch.zeros(*ids.shape, 40), windows.clamp(max=39))
    assert uniform.perplexity == pytest.approx(40, rel=1e-6)
    assert uniform.nll_standard_error == pytest.approx(0, abs=1e-7)


def test_progress_reaches_its_total(model, windows):
    seen = []
    compare(model, model, windows, batch_size=2, progress=lambda d, t, w: seen.append((d, t, w)))
    assert seen[0] == (0, 5, "original") and seen[-1] == (5, 5, "compare")
