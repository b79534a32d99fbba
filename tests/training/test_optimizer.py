import copy
import subprocess
import sys

import pytest
import torch

from sheepop.config import TrainingConfig
from sheepop.models.transformer import TransformerModel
from sheepop.training.optimizer import make_optimizer

DECAYED = (
    "token_embedding.weight",
    "position_embedding.weight",
    "head.weight",
    "blocks.0.attention.output.weight",
    "blocks.1.feed_forward.output.weight",
)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_matrices_are_decayed_and_norms_and_biases_are_not(tiny_config, tie_weights):
    config = tiny_config(**{"model.bias": True, "model.positions": "learned", "model.tie_weights": tie_weights})
    model = TransformerModel(config.model)
    optimizer = make_optimizer(model, config.training)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay_of) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        is_vector = "norm" in name or name.endswith("bias")
        assert decay_of[id(parameter)] == (0.0 if is_vector else config.training.weight_decay), name
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert names.issuperset(DECAYED)


def test_several_steps_equal_adamw_written_out(tiny_config):
    training = TrainingConfig(learning_rate=0.03, beta1=0.8, beta2=0.9, weight_decay=0.2, adam_epsilon=1e-6)
    model = TransformerModel(tiny_config(**{"model.bias": True}).model).double()
    expected = copy.deepcopy(model)
    optimizer = make_optimizer(model, training)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    for step in range(1, 6):
        rate = training.learning_rate / step
        for group in optimizer.param_groups:
            group["lr"] = rate
        for (name, weight), parameter in zip(expected.named_parameters(), model.parameters(), strict=True):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.clone()
            first, second = moments[name]
            first.mul_(0.8).add_(0.2 * gradient)
            second.mul_(0.9).add_(0.1 * gradient**2)
            with torch.no_grad():
                if weight.dim() >= 2:
                    weight.mul_(1 - rate * 0.2)
                unbiased, scale = first / (1 - 0.8**step), (second / (1 - 0.9**step)).sqrt()
                weight.sub_(rate * unbiased / (scale + 1e-6))
        optimizer.step()
    for (name, weight), parameter in zip(expected.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, weight, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_do_not_import_the_compiler(optimizer):
    """It would double the time to the first step of a short run."""
    program = f"""
import sys, torch
from sheepop.config import load_config
from sheepop.models.transformer import TransformerModel
from sheepop.training.optimizer import make_optimizer
config = load_config(preset="nano", overrides={{"training.optimizer": "{optimizer}", "model.qk_norm": True}})
model = TransformerModel(config.model)
model.compile_blocks(False)
optimizer = make_optimizer(model, config.training)
for _ in range(2):
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
