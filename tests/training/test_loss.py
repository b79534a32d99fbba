import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.dataset import IGNORE_INDEX
from sheepop.training.loss import summed_cross_entropy


def random_case(seed, batch=3, time=5, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, time, vocab, generator=generator)
    targets = torch.randint(0, vocab, (batch, time), generator=generator)
    targets[torch.rand(batch, time, generator=generator) < 0.3] = IGNORE_INDEX
    return logits, targets


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_it_is_the_sum_over_real_targets(seed):
    logits, targets = random_case(seed)
    expected = 0.0
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if target != IGNORE_INDEX:
            expected += math.log(sum(math.exp(value) for value in row)) - row[target]
    torch.testing.assert_close(summed_cross_entropy(logits, targets), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_without_a_real_target_it_is_zero():
    logits, targets = random_case(0)
    assert summed_cross_entropy(logits, torch.full_like(targets, IGNORE_INDEX)) == 0


def test_low_precision_logits_are_summed_in_fp32():
    # 40,000 equal terms: a bf16 sum would stop growing at a few hundred.
    logits = torch.zeros(100, 400, 2, dtype=torch.bfloat16)
    loss = summed_cross_entropy(logits, torch.zeros(100, 400, dtype=torch.int64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(40_000 * math.log(2)), rtol=1e-4, atol=0)
