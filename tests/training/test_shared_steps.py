"""Embeddings that learn what tokens of a like spelling learn."""

import numpy as np
import pytest
import torch

from sheepop.config import TrainingConfig, load_config
from sheepop.data.spelling import spelling_groups
from sheepop.models.transformer import TransformerModel
from sheepop.training.adamw import AdamW
from sheepop.training.optimizer import make_optimizer
from sheepop.training.shared_steps import SharedSteps

GROUP = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Tokens 0 and 1 share group 0; 1, 2 and 4 share group 1; 3 and 5 are alone.
TOKENS, GROUPS = np.array([0, 1, 1, 2, 4]), np.array([0, 0, 1, 1, 1])


def shared_steps():
    return SharedSteps(TOKENS, GROUPS, 6, torch.device("cpu"))


def test_a_weight_moves_like_the_sum_of_its_own_rows_and_its_groups():
    torch.manual_seed(0)
    weight = torch.randn(6, 7, requires_grad=True)
    optimizer = AdamW([{"params": [weight], **GROUP}], shared={weight: shared_steps()})
    own, common = weight.detach().clone().requires_grad_(), torch.zeros(2, 7, requires_grad=True)
    written_out = torch.optim.AdamW([{"params": [own], **GROUP}, {"params": [common], **GROUP, "weight_decay": 0.0}])
    shares = torch.zeros(6, 2)
    for token, group in zip(TOKENS, GROUPS, strict=True):
        shares[token, group] = 1 / np.sqrt((token == TOKENS).sum())
    wanted = torch.randn(6, 7)
    for _ in range(5):
        weight.grad = 2 * (weight.detach() - wanted)
        embedding = own.detach() + shares @ common.detach()
        own.grad = 2 * (embedding - wanted)
        common.grad = shares.T @ own.grad
        # Decay acts on the sum, as that is all there is.
        with torch.no_grad():
            common *= 1 - GROUP["lr"] * GROUP["weight_decay"]
        optimizer.step()
        written_out.step()
        torch.testing.assert_close(weight.detach(), own.detach() + shares @ common.detach())


def test_a_token_that_is_not_in_the_text_learns_from_its_kin():
    weight = torch.zeros(6, 3, requires_grad=True)
    optimizer = AdamW([{"params": [weight], **GROUP}], shared={weight: shared_steps()})
    weight.grad = torch.zeros(6, 3)
    weight.grad[2] = 1.0
    optimizer.step()
    assert (weight[[1, 4]] < 0).all()
    assert (weight[[0, 3, 5]] == 0).all()


def test_without_kin_there_is_nothing_to_share():
    config = load_config(overrides={"model.vocab_size": 5, "model.d_model": 8, "model.num_heads": 2})
    optimizer = make_optimizer(TransformerModel(config.model), TrainingConfig(), spelling_groups(list("abcde")))
    assert isinstance(optimizer, AdamW)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_moved_and_nothing_else(name, tied):
    config = load_config(
        overrides={"model.vocab_size": 5, "model.d_model": 8, "model.num_heads": 2, "model.num_layers": 1}
        | {"model.d_ff": 8, "model.max_seq_len": 8, "model.tie_weights": tied}
    )
    after = []
    for shared in (None, (TOKENS, GROUPS)):
        torch.manual_seed(1)
        model = TransformerModel(config.model)
        optimizer = make_optimizer(model, TrainingConfig(optimizer=name), shared)
        model(torch.tensor([[0, 1, 2, 3]]), targets=torch.tensor([[1, 2, 3, 4]])).backward()
        optimizer.step()
        after.append(dict(model.named_parameters()))
    moved = {key for key, weight in after[0].items() if not torch.equal(weight, after[1][key])}
    assert moved == ({"token_embedding.weight"} if tied else {"token_embedding.weight", "head.weight"})
