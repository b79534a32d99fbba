import copy
import math

import numpy as np
import pytest
import torch

from sheepop.data.dataset import IGNORE_INDEX
from sheepop.models.transformer import TransformerModel
from sheepop.training.distributed import World
from sheepop.training.loss import summed_cross_entropy
from sheepop.training.optimizer import make_optimizer
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.devices import FP32


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


def step(model, optimizer, batches, config, number=0):
    return train_step(
        model,
        optimizer,
        batches,
        step=number,
        seed=1,
        learning_rate=0.01,
        training=config.training,
        precision=FP32,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        world=World(),
    )


def make(config):
    torch.manual_seed(0)
    model = TransformerModel(config.model).train()
    return model, make_optimizer(model, config.training)


@pytest.mark.parametrize("sizes", [(1,) * 6, (3, 3), (2, 2, 2), (1, 5), (4, 2)], ids=str)
def test_accumulation_does_not_change_the_update(tiny_config, sizes):
    config = tiny_config(**{"model.dropout": 0.0, "training.max_grad_norm": 0.5})
    inputs, targets = rows()
    whole, cut = make(config), make(config)
    for number in range(3):
        expected = step(*whole, micro_batches(inputs, targets, (6,)), config, number)
        result = step(*cut, micro_batches(inputs, targets, sizes), config, number)
        assert result.num_targets == expected.num_targets == 6 * 11 - 15
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for parameter, same in zip(whole[0].parameters(), cut[0].parameters(), strict=True):
        torch.testing.assert_close(same, parameter, rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_over_real_targets_before_the_update(tiny_config):
    config = tiny_config(**{"model.dropout": 0.0})
    model, optimizer = make(config)
    inputs, targets = rows()
    with torch.no_grad():
        expected = summed_cross_entropy(model(inputs), targets) / (targets != IGNORE_INDEX).sum()
    result = step(model, optimizer, micro_batches(inputs, targets, (2, 4)), config)
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("limit", [0.05, None])
def test_gradients_are_clipped_and_their_norm_is_told_unclipped(tiny_config, limit):
    config = tiny_config(**{"model.dropout": 0.0, "training.max_grad_norm": limit, "training.weight_decay": 0.0})
    model, _ = make(config)
    inputs, targets = rows()
    before = copy.deepcopy(model)
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    result = step(model, plain, micro_batches(inputs, targets, (6,)), config)
    with torch.no_grad():
        distances = [p.dist(q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    moved = math.hypot(*map(float, distances))
    assert result.grad_norm > 0.1
    assert moved == pytest.approx(0.01 * (result.grad_norm if limit is None else limit), rel=1e-4)


def test_dropout_depends_on_seed_step_and_micro_batch_alone(tiny_config):
    config = tiny_config(**{"model.dropout": 0.3})
    inputs, targets = rows()

    def loss(number, *, index=0, drawn_before=0):
        torch.rand(drawn_before)
        model, optimizer = make(config)
        batch = MicroBatch(index, inputs, targets, 6 * 11 - 15)
        return step(model, optimizer, [batch], config, number).loss

    assert loss(2) == loss(2, drawn_before=5)
    assert len({loss(2), loss(3), loss(2, index=1)}) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_changes_nothing(tiny_config, monkeypatch, bad, where):
    config = tiny_config()
    model, optimizer = make(config)
    batches = micro_batches(*rows(), (2, 4))
    assert step(model, optimizer, batches, config).is_finite
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    def spoiled(logits, targets):
        loss = summed_cross_entropy(logits, targets)
        if where == "loss":
            return loss * bad
        logits.register_hook(lambda gradient: gradient * bad)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr("sheepop.training.step.summed_cross_entropy", spoiled)
        result = step(model, optimizer, batches, config, 1)
    assert not result.is_finite
    assert not math.isfinite(result.grad_norm)
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(tensor.equal(moments[index][key]) for key, tensor in state.items())
    # Nothing of the bad gradient is left for the next step.
    again, fresh = step(model, optimizer, batches, config, 1), make(config)
    step(*fresh, batches, config)
    assert again == step(*fresh, batches, config, 1)
