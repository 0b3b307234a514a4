"""oneDNN's products are those of F.linear: values, gradients, views, and where neither applies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptcli.config.schema import LoraBlock
from gptcli.model import linear as module
from gptcli.model.linear import Linear, gelu_of, linear, product
from gptcli.model.lora import LoRALinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(module, "WORTH", 0)


@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (2, 7, 24), (3, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape), torch.randn(40, 24), *([torch.randn(40)] if bias else [])]
    grad = torch.randn(*shape[:-1], 40)
    results = []
    for function in (linear, F.linear):
        inputs = [t.clone().requires_grad_() for t in given]
        y = function(*inputs)
        y.backward(grad)
        results.append([y.detach(), *(t.grad for t in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_made_only_where_one_is_wanted() -> None:
    layer = Linear(24, 40).requires_grad_(False)
    assert not layer(torch.randn(5, 24)).requires_grad
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 24), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [5.0] * 40


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_in_one_pass(approximate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, 40), torch.randn(2, 7, 24)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate=approximate)
    with torch.no_grad():
        torch.testing.assert_close(gelu_of(layer, x, approximate), expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(lambda t: gelu_of(layer, t, approximate) * 2, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected * 2, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(module, "WORTH", 1 << 40)  # which a program asks anew at every call
        torch.testing.assert_close(compiled(x), expected * 2, rtol=1e-5, atol=1e-5)
    assert gelu_of(layer, x, approximate).requires_grad


def test_gelu_of_a_layer_with_a_low_rank_update_contains_that() -> None:
    layer, x = LoRALinear(Linear(24, 40), LoraBlock(rank=2, alpha=4.0), seed=0), torch.randn(5, 24)
    torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        torch.testing.assert_close(gelu_of(layer, x, "tanh"), F.gelu(layer(x), approximate="tanh"))
        assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))


def test_products_of_transposed_views() -> None:
    a, b = torch.randn(6, 30), torch.randn(30, 9)
    torch.testing.assert_close(product(a, b.T), a @ b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(b.T, a), (a @ b).T, rtol=1e-5, atol=1e-5)


def test_other_kinds_of_numbers_go_to_torch() -> None:
    x, weight = torch.randn(4, 24), torch.randn(8, 24)
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.to("meta"), weight.to("meta")).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
