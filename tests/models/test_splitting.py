import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sheepop.config import load_config
from sheepop.models.splitting import join, split
from sheepop.models.transformer import TransformerModel


class Copies(TorchDispatchMode):
    """Count the tensors that are joined by a copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.cat.default
        return function(*args, **(kwargs or {}))


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), dim=st.integers(0, 2))
def test_parts_and_gradients_are_those_of_pytorch(sizes, dim):
    shape = [2, 3, 5]
    shape[dim] = sum(sizes)
    whole = torch.randn(shape, requires_grad=True)
    gradients = []
    for parts in (split(whole, tuple(sizes), dim), whole.split(sizes, dim)):
        assert [part.shape[dim] for part in parts] == sizes
        loss = sum((number + 1) * part.square().sum() for number, part in enumerate(parts))
        gradients.append(torch.autograd.grad(loss, whole)[0])
    assert gradients[0].equal(gradients[1])


def test_a_part_that_nothing_reads_has_a_gradient_of_zeros():
    whole = torch.ones(2, 3, requires_grad=True)
    split(whole, (1, 2), 1)[0].sum().backward()
    assert whole.grad.tolist() == [[1, 0, 0]] * 2


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    dim=st.integers(0, 2),
    turned=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_only_neighbours_in_order_are_joined_without_a_copy(sizes, dim, turned, order):
    shape = [2, 3, 4]
    shape[dim] = sum(sizes)
    whole = torch.randn(shape)
    whole = whole.transpose(0, 2) if turned else whole
    parts = list(whole.split(sizes, 2 - dim if turned else dim))
    order.shuffle(parts)
    joined = join(tuple(parts), 2 - dim if turned else dim)
    assert joined.equal(torch.cat(parts, 2 - dim if turned else dim))
    if joined.data_ptr() == whole.data_ptr():
        assert joined.stride() == whole.stride()


def test_neighbours_are_a_view_and_others_are_not():
    whole = torch.arange(24.0).view(2, 6, 2)
    first, second, third = whole.split((1, 2, 3), 1)
    joined = join((first, second, third), 1)
    assert joined.data_ptr() == whole.data_ptr()
    assert joined.equal(whole)
    assert join((second, third), 1).equal(whole[:, 1:])
    for others in ((first, third), (second, first), (first, second.clone()), (first, second.bfloat16())):
        assert join(others, 1).data_ptr() != whole.data_ptr()
    assert join((first, second.clone()), 1).equal(whole[:, :3])


@pytest.mark.parametrize(
    ("positions", "num_kv_heads", "copies"), [("learned", 4, 0), ("learned", 2, 0), ("rotary", 4, 1)]
)
def test_attention_kernels_write_the_gradients_of_a_projection_into_one_tensor(positions, num_kv_heads, copies):
    pytest.importorskip("numba")
    sizes = {"d_model": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": num_kv_heads, "max_seq_len": 64}
    settings = sizes | {"positions": positions, "vocab_size": 29, "dropout": 0.0}
    model = TransformerModel(load_config(overrides={f"model.{key}": value for key, value in settings.items()}).model)
    token_ids = torch.randint(0, 29, (2, 64))
    gradients = []
    for by_kernels in (True, False):
        model.train().learn_by_kernels(attention=by_kernels, head=False)
        loss = model(token_ids, targets=token_ids)
        with Copies() as joined:
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        if by_kernels:
            assert joined.count == copies  # rotary turns queries and keys alone, to which values are added
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
