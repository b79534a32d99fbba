import pytest
import torch
from torch.nn import functional as F

from sheepop.models.linear import LEAST_PRODUCTS, LEAST_WEIGHTS, OneDNNLinear, linear, prefers_onednn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")


def tensors(rows, inputs, outputs, bias):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((*rows, inputs), (outputs, inputs), (outputs,))]
    return [tensor.requires_grad_() for tensor in made[: 3 if bias else 2]]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 36), (480, 640)], ids=["small", "large"])
def test_onednn_gives_the_stock_layers_values_and_gradients(inputs, outputs, bias):
    arguments = tensors((3, 50), inputs, outputs, bias)
    ours = OneDNNLinear.apply(*arguments, *([] if bias else [None]))
    stock = F.linear(*arguments)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    weights = torch.randn(stock.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((stock * weights).sum(), arguments)
    for gradient, same in zip(torch.autograd.grad((ours * weights).sum(), arguments), expected, strict=True):
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=2e-3)
    assert (outputs * inputs >= LEAST_WEIGHTS) == (inputs == 480)  # both kinds of weight gradient were seen


@needs_onednn
def test_only_large_fp32_products_on_a_cpu_go_to_onednn():
    weight = torch.empty(256, 128)
    rows = LEAST_PRODUCTS // weight.numel()
    assert prefers_onednn(torch.empty(rows, 128), weight)
    assert prefers_onednn(torch.empty(2, rows // 2, 128), weight)
    assert not prefers_onednn(torch.empty(rows - 1, 128), weight)
    assert not prefers_onednn(torch.empty(rows, 128, dtype=torch.bfloat16), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not prefers_onednn(torch.empty(rows, 128), weight)
        assert linear(torch.zeros(rows, 128), weight).dtype == torch.bfloat16


def test_frozen_parts_get_no_gradient():
    hidden, weight = tensors((4, 512), 128, 256, bias=False)
    weight.requires_grad_(False)
    linear(hidden, weight).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
