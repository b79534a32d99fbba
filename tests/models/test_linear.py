import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sheepop.models.linear import (
    LEAST_PRODUCTS,
    OneDNNLinear,
    add_weight_gradient,
    linear,
    prefers_onednn,
    product,
)

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")


def tensors(rows, inputs, outputs, bias):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((*rows, inputs), (outputs, inputs), (outputs,))]
    return [tensor.requires_grad_() for tensor in made[: 3 if bias else 2]]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 36), (480, 640)], ids=["small", "large"])
@pytest.mark.parametrize("by_onednn", [(False, True), (True, False), (True, True)], ids=str)
def test_onednn_gives_the_stock_layers_values_and_gradients(inputs, outputs, bias, by_onednn):
    arguments = tensors((3, 50), inputs, outputs, bias)
    ours = OneDNNLinear.apply(*arguments, *([] if bias else [None]), *by_onednn)
    stock = F.linear(*arguments)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    weights = torch.randn(stock.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((stock * weights).sum(), arguments)
    for gradient, same in zip(torch.autograd.grad((ours * weights).sum(), arguments), expected, strict=True):
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=2e-3)


@needs_onednn
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_onednn", [(False, True), (True, False), (True, True)], ids=str)
def test_compiled_code_goes_to_onednn_too(bias, by_onednn, monkeypatch):
    monkeypatch.setattr("sheepop.models.linear.LEAST_WEIGHTS", 256 * 128)
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", False)
    arguments = tensors((30, 50), 128, 256, bias)

    def activated(*arguments):
        return linear(*arguments, gradients_by_onednn=by_onednn).relu() * 2

    def learn():
        result = compiled_function(*arguments)
        return result, torch.autograd.grad(result.square().sum(), arguments)

    compiled_function = torch.compile(activated, fullgraph=True)  # in one piece
    learn()  # compiles
    products, operator = [], torch.ops.mkldnn._linear_pointwise

    def counted(*given):
        products.append(given)
        return operator(*given)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    compiled, gradients = learn()
    assert len(products) == 1 + sum(by_onednn)
    expected = F.linear(*arguments).relu() * 2
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    for gradient, same in zip(gradients, torch.autograd.grad(expected.square().sum(), arguments), strict=True):
        torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-2)


@needs_onednn
def test_only_large_fp32_products_on_a_cpu_of_another_maker_than_intel_go_to_onednn(monkeypatch):
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", False)
    weight = torch.empty(256, 128)
    rows = LEAST_PRODUCTS // weight.numel()
    assert prefers_onednn(torch.empty(rows, 128), weight)
    assert prefers_onednn(torch.empty(2, rows // 2, 128), weight)
    assert not prefers_onednn(torch.empty(rows - 1, 128), weight)
    assert not prefers_onednn(torch.empty(rows, 128, dtype=torch.bfloat16), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not prefers_onednn(torch.empty(rows, 128), weight)
        assert linear(torch.zeros(rows, 128), weight).dtype == torch.bfloat16
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", True)
    assert not prefers_onednn(torch.empty(rows, 128), weight)


@needs_onednn
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("most_at_once", [2**22, 5_000, 1])
def test_products_without_a_gradient_are_the_same_by_either_library(intel, most_at_once, monkeypatch):
    monkeypatch.setattr("sheepop.models.linear.MOST_AT_ONCE", most_at_once)
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", intel)
    monkeypatch.setattr("sheepop.models.linear.LEAST_PRODUCTS", 0)
    left, right = torch.randn(300, 256), torch.randn(128, 256)
    assert prefers_onednn(left, right) == (not intel)
    expected = left.double() @ right.double().t()
    torch.testing.assert_close(product(left, right).double(), expected, rtol=1e-5, atol=1e-4)
    total = torch.full((300, 128), math.nan)
    assert product(left, right, out=total) is total
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("most_at_once", [2**22, 5_000, 1])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 300), (300, 128)], ids=["wide", "narrow"])
def test_weight_gradients_are_added_up_the_same_either_way(intel, most_at_once, inputs, outputs, monkeypatch):
    monkeypatch.setattr("sheepop.models.linear.MOST_AT_ONCE", most_at_once)
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", intel)
    monkeypatch.setattr("sheepop.models.linear.LEAST_PRODUCTS", 0)
    hidden, gradient = torch.randn(256, inputs), torch.randn(256, outputs)
    expected = gradient.double().t() @ hidden.double()
    total = torch.full((outputs, inputs), math.nan)
    add_weight_gradient(total, hidden, gradient, is_first=True)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
    add_weight_gradient(total, hidden, gradient, is_first=False)
    torch.testing.assert_close(total.double(), 2 * expected, rtol=1e-5, atol=1e-4)
    add_weight_gradient(total, hidden.bfloat16(), gradient.bfloat16(), is_first=True)
    assert float((total - expected).norm()) < 0.01 * float(expected.norm())


class RightFactors(TorchDispatchMode):
    """Notes which right factors oneDNN is given."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "_linear_pointwise" in str(function):
            self.strides.append((arguments[1].shape, arguments[1].stride()))
        return function(*arguments, **(options or {}))


@needs_onednn
@pytest.mark.parametrize("inputs", [64, 400])
def test_onednn_gets_no_right_factor_with_gaps(inputs, monkeypatch):
    """For which it has no fast code: the gradient of a large head took a thousand times as long."""
    monkeypatch.setattr("sheepop.models.linear.LEAST_PRODUCTS", 0)
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", False)
    hidden, gradient, total = torch.randn(128, inputs), torch.randn(128, 600)[:, :300], torch.empty(300, inputs)
    wide = torch.randn(300, 2 * inputs)
    with RightFactors() as factors:
        add_weight_gradient(total, hidden, gradient, is_first=True)
        scores = product(hidden, wide[:, :inputs])
        monkeypatch.setattr("sheepop.models.linear.MOST_AT_ONCE", 100 * inputs)
        add_weight_gradient(total, hidden, gradient, is_first=True)  # in pieces, which have gaps: by BLAS
    assert len(factors.strides) == 2
    for (rows, columns), stride in factors.strides:
        assert stride in ((columns, 1), (1, rows))
    torch.testing.assert_close(total, gradient.t() @ hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, hidden @ wide[:, :inputs].t(), rtol=1e-4, atol=1e-4)


def test_frozen_parts_get_no_gradient():
    hidden, weight = tensors((4, 512), 128, 256, bias=False)
    weight.requires_grad_(False)
    linear(hidden, weight).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
