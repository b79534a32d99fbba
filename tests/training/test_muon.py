import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.models.transformer import TransformerModel
from sheepop.training.muon import COEFFICIENTS, FEWER_ROUNDS, ROUNDS, Muon, orthogonalize
from sheepop.training.optimizer import make_optimizer


def newton_schulz(matrix):
    """Write the iteration out for one matrix."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm()
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), more=st.integers(0, 7), seed=st.integers(0, 999))
def test_singular_values_come_near_one_and_directions_stay(rows, more, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, rows, rows + more, generator=generator, dtype=torch.float64)
    result = orthogonalize(matrices)
    for matrix, found in zip(matrices, result, strict=True):
        torch.testing.assert_close(found, newton_schulz(matrix))
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        inner = left.T @ found @ right.T  # diagonal in the same directions
        assert (inner - inner.diag().diag()).abs().max() < 1e-6
        shown = values / values.norm() > 0.05
        assert ((inner.diag()[shown] > 0.5) & (inner.diag()[shown] < 1.3)).all()


@pytest.mark.parametrize(("rounds", "least", "error"), [(3, 0.01, 0.2697), (4, 0.003, 0.1984)])
def test_fewer_rounds_bring_singular_values_as_near_to_one(rounds, least, error):
    values = torch.logspace(math.log10(least), 0, 400, dtype=torch.float64)
    matrices = values.view(-1, 1, 1) * torch.eye(1, 2, dtype=torch.float64)
    for coefficients in FEWER_ROUNDS[rounds]:
        matrices = newton_schulz_round(matrices, coefficients)
    assert (matrices[:, 0, 0] - 1).abs().max() < error

    generator = torch.Generator().manual_seed(rounds)
    given = torch.randn(2, 20, 60, generator=generator, dtype=torch.float64)
    expected = given / given.norm(dim=(1, 2), keepdim=True)
    for coefficients in FEWER_ROUNDS[rounds]:
        expected = torch.stack([newton_schulz_round(matrix[None], coefficients)[0] for matrix in expected])
    torch.testing.assert_close(orthogonalize(given, rounds), expected)


def newton_schulz_round(matrices, coefficients):
    a, b, c = coefficients
    gram = matrices @ matrices.mT
    return a * matrices + b * gram @ matrices + c * gram @ gram @ matrices


@pytest.mark.parametrize("shape", [(6, 17), (17, 6), (8, 8)])
def test_rows_are_divided_by_their_usual_size(shape):
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    group = {"params": [weight], "lr": 0.5, "weight_decay": 0.0}
    optimizer = Muon([group], [{"params": []}], momentum=0.0, dtype=torch.float64, beta2=0.9)
    generator = torch.Generator().manual_seed(3)
    usual = torch.zeros(shape[0], dtype=torch.float64)
    for _ in range(4):
        weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
        update = newton_schulz(weight.grad)
        usual = 0.9 * usual + 0.1 * update.square().mean(1)
        balanced = update / usual.sqrt()[:, None]
        expected = balanced * update.norm() / balanced.norm()
        torch.testing.assert_close(before - weight, 0.5 * 0.2 * math.sqrt(max(shape)) * expected)
    torch.testing.assert_close(optimizer.state[weight]["row_squares"], usual)


def test_rows_that_have_no_gradient_stay_as_they_are():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([{"params": [weight], "lr": 0.5}], [{"params": []}], momentum=0.9, beta2=0.95)
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert (weight == 1).all()


def test_a_run_can_go_on_with_rows_of_equal_size():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([{"params": [weight], "lr": 0.5}], [{"params": []}], momentum=0.9)
    weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    optimizer.step()
    optimizer.beta2 = 0.95
    optimizer.step()
    assert set(optimizer.state[weight]) == {"momentum", "row_squares"}
    assert weight.isfinite().all()


def test_the_rounds_are_a_setting(tiny_config):
    model = TransformerModel(tiny_config().model)
    config = tiny_config(**{"training.optimizer": "muon", "training.muon_rounds": 3})
    assert make_optimizer(model, config.training).rounds == 3


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()
    assert not orthogonalize(torch.zeros(2, 3, 4), 3).any()


@pytest.mark.parametrize("shape", [(6, 17), (17, 6), (8, 8)])
def test_it_equals_torch_optim_muon_within_the_rounding_of_bf16(shape):
    ours, theirs = (torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in "ab")
    one = Muon([{"params": [ours], "lr": 0.02, "weight_decay": 0.1}], [{"params": []}], momentum=0.95)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    moved = (ours - before).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bf16 has three digits


def test_several_steps_equal_the_algorithm_written_out(tiny_config):
    config = tiny_config(**{"training.optimizer": "muon", "model.activation": "swiglu", "model.bias": True})
    model = TransformerModel(config.model).double()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, config.training)
    optimizer.dtype = torch.float64
    training, C, F = config.training, config.model.head_dim, config.model.d_ff
    rows = {"query_key_value": [5 * C, 5 * C, 5 * C], "feed_forward.input": [F, F]}
    momenta = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * group["lr_ratio"]
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient
            if not (name.startswith("blocks.") and parameter.dim() == 2):
                continue
            momenta[name] = 0.95 * momenta[name] + gradient
            ahead = gradient + 0.95 * momenta[name]
            sizes = next((sizes for end, sizes in rows.items() if end in name), [len(ahead)])
            moved = [0.2 * math.sqrt(max(piece.shape)) * newton_schulz(piece) for piece in ahead.split(sizes)]
            expected[name] = expected[name] * (1 - 0.03 * training.weight_decay) - 0.03 * torch.cat(moved)
        optimizer.step()
    inner = [name for name in expected if name.startswith("blocks.") and expected[name].dim() == 2]
    assert len(inner) == 2 * 4
    for name, parameter in model.named_parameters():
        if name in inner:
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-11, msg=name)
            assert set(optimizer.state[parameter]) == {"momentum"}
        else:
            assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def test_every_weight_is_in_one_group(tiny_config):
    for tie_weights in (True, False):
        config = tiny_config(**{"training.optimizer": "muon", "model.tie_weights": tie_weights, "model.bias": True})
        model = TransformerModel(config.model)
        optimizer = make_optimizer(model, config.training)
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_a_weight_without_a_gradient_is_left_alone():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.1}], [{"params": []}], momentum=0.9)
    before = copy.deepcopy(weight)
    optimizer.step()
    assert weight.equal(before)
    assert not optimizer.state[weight]
