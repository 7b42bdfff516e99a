"""The setting under which products are made, and norms as numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

import dihal.circuits.passes as attribution
from dihal.backbone.layout import LAYOUTS
from dihal.circuits.attribute import attribute
from dihal.circuits.contraction import fast_products
from dihal.circuits.norms import Norm
from tests.kit import tiny_model
from tests.unit.circuits.models import float64_model, random_pairs

SETTING = torch.backends.cuda.matmul
LOW, HIGH = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


@pytest.fixture(params=["ieee", "tf32"])
def before(request):
    """A setting of the user's, which is to be found again."""
    own = SETTING.fp32_precision
    SETTING.fp32_precision = request.param
    yield request.param
    SETTING.fp32_precision = own


@pytest.mark.parametrize("dtype", [*LOW, *HIGH])
def test_the_setting_holds_inside_only(dtype: torch.dtype, before: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast_products(dtype):
            assert SETTING.fp32_precision == ("tf32" if dtype in LOW else before)
        assert SETTING.fp32_precision == before
        with pytest.raises(KeyError), fast_products(dtype):
            raise KeyError
        assert SETTING.fp32_precision == before


def test_only_the_contraction_of_a_rough_model_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own runs are made as its user wants them, those of float32 weights too."""
    seen: list[str] = []
    runs: set[str] = set()
    contract = attribution.contract

    def spied(*arguments):
        seen.append(SETTING.fp32_precision)
        return contract(*arguments)

    monkeypatch.setattr(attribution, "contract", spied)
    usual = SETTING.fp32_precision
    for model in (tiny_model().bfloat16(), tiny_model(), float64_model()):
        model.model.norm.register_forward_hook(lambda *_: runs.add(SETTING.fp32_precision))
        attribute(model, [random_pairs()])
    assert seen == ["tf32", usual, usual]
    assert runs == {usual}
    assert SETTING.fp32_precision == usual != "tf32"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pulling_back_is_the_gradient(family: str) -> None:
    model, layout = float64_model(family), LAYOUTS[family]
    module = model.get_submodule(f"{layout.decoder}.{layout.norm}")
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
    x, gradient = torch.randn(2, 1, 3, 4, module.weight.numel(), dtype=torch.float64)
    norm = Norm.of([module], layout, torch.float64)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(module(x), x, gradient)
    found = norm.pull_back(gradient, *norm.normalise(x.detach()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
