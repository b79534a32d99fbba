import copy
import math

import numpy as np
import pytest
import torch

from sheepop.data.dataset import IGNORE_INDEX
from sheepop.training.loss import summed_cross_entropy
from sheepop.training.step import MicroBatch, micro_batch_loss, train_step


def rows(count=6, time=11, vocab=23, seed=4):
    """Inputs and targets (B, T) whose rows have different numbers of real targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, vocab, (count, time), generator=generator)
    targets = torch.randint(0, vocab, (count, time), generator=generator)
    for row in range(count):
        targets[row, time - row :] = IGNORE_INDEX
    return inputs, targets


def micro_batches(inputs, targets, sizes):
    cuts = np.cumsum(sizes)[:-1].tolist()
    pieces = zip(inputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
    return [
        MicroBatch(index, some, wanted, int((wanted != IGNORE_INDEX).sum()))
        for index, (some, wanted) in enumerate(pieces)
    ]


def step(run, batches, number=0):
    return train_step(run, batches, step=number, learning_rate=0.01)


@pytest.mark.parametrize("sizes", [(1,) * 6, (3, 3), (2, 2, 2), (1, 5), (4, 2)], ids=str)
def test_accumulation_does_not_change_the_update(tiny_config, bare_run, sizes):
    config = tiny_config(**{"model.dropout": 0.0, "training.max_grad_norm": 0.5})
    inputs, targets = rows()
    whole, cut = bare_run(config), bare_run(config)
    for number in range(3):
        expected = step(whole, micro_batches(inputs, targets, (6,)), number)
        result = step(cut, micro_batches(inputs, targets, sizes), number)
        assert result.num_targets == expected.num_targets == 6 * 11 - 15
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for parameter, same in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(same, parameter, rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_over_real_targets_before_the_update(tiny_config, bare_run):
    run = bare_run(tiny_config(**{"model.dropout": 0.0}))
    inputs, targets = rows()
    with torch.no_grad():
        expected = summed_cross_entropy(run.model(inputs), targets) / (targets != IGNORE_INDEX).sum()
    result = step(run, micro_batches(inputs, targets, (2, 4)))
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("limit", [0.05, None])
def test_gradients_are_clipped_and_their_norm_is_told_unclipped(tiny_config, bare_run, limit):
    config = tiny_config(**{"model.dropout": 0.0, "training.max_grad_norm": limit, "training.weight_decay": 0.0})
    run = bare_run(config)
    model = run.model
    inputs, targets = rows()
    before = copy.deepcopy(model)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = step(run, micro_batches(inputs, targets, (6,)))
    with torch.no_grad():
        distances = [p.dist(q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    moved = math.hypot(*map(float, distances))
    assert result.grad_norm > 0.1
    assert moved == pytest.approx(0.01 * (result.grad_norm if limit is None else limit), rel=1e-4)


@pytest.mark.parametrize("setting", ["model.dropout", "model.attention_dropout"])
def test_dropout_depends_on_seed_step_and_micro_batch_alone(tiny_config, bare_run, setting):
    config = tiny_config(**{setting: 0.3})
    inputs, targets = rows()

    def loss(number, *, index=0, drawn_before=0):
        torch.rand(drawn_before)
        return step(bare_run(config), [MicroBatch(index, inputs, targets, 6 * 11 - 15)], number).loss

    assert loss(2) == loss(2, drawn_before=5)
    assert len({loss(2), loss(3), loss(2, index=1)}) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_changes_nothing(tiny_config, bare_run, monkeypatch, bad, where):
    run = bare_run(tiny_config())
    model, optimizer = run.model, run.optimizer
    batches = micro_batches(*rows(), (2, 4))
    assert step(run, batches).is_updated
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    def spoiled(learner, batch):
        loss = micro_batch_loss(learner, batch)
        if where == "loss":
            return loss * bad
        loss.register_hook(lambda gradient: gradient * bad)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr("sheepop.training.step.micro_batch_loss", spoiled)
        result = step(run, batches, 1)
    assert (result.verdict, result.is_updated) == ("bad", False)
    assert not math.isfinite(result.grad_norm)
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(tensor.equal(moments[index][key]) for key, tensor in state.items())
    # Nothing of the bad gradient is left for the next step.
    again, fresh = step(run, batches, 1), bare_run(tiny_config())
    step(fresh, batches)
    assert again == step(fresh, batches, 1)
