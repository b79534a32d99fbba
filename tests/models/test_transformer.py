import itertools

import pytest
import torch
from torch.nn import functional as F

from sheepop.config import ModelConfig
from sheepop.models.blocks import Context
from sheepop.models.kv_cache import KVCache
from sheepop.models.positions import document_starts, rotary_table
from sheepop.models.sizing import (
    count_parameters,
    forward_flops_per_token,
    kv_cache_bytes,
    training_flops_per_token,
    weight_bytes,
)
from sheepop.models.transformer import TransformerModel

SIZES = {"vocab_size": 37, "d_model": 24, "num_layers": 3, "num_heads": 6, "d_ff": 29, "max_seq_len": 11}
CLASSIC = {"norm": "layernorm", "activation": "gelu", "bias": True, "dropout": 0.0}
MODERN = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "qk_norm": True,
    "tie_weights": False,
    "dropout": 0.0,
}
VARIANTS = [
    *({**CLASSIC, "positions": positions} for positions in ("rotary", "sinusoidal", "learned", "none")),
    *({**MODERN, "positions": positions} for positions in ("rotary", "sinusoidal", "learned", "none")),
    *({**CLASSIC, "activation": activation} for activation in ("gelu_tanh", "relu", "silu", "relu_squared", "geglu")),
    {**CLASSIC, "sliding_window": 4},
    {**MODERN, "sliding_window": 3, "positions": "learned"},
    {**CLASSIC, "sliding_window": 4, "attention_sinks": 2},
    {**MODERN, "sliding_window": 1, "attention_sinks": 1, "positions": "sinusoidal"},
    {**MODERN, "sliding_window": 3, "attention_sinks": 30},
    {**MODERN, "rope_scaling": "yarn", "rope_scaling_factor": 2.0},
    {**CLASSIC, "head_dim": 10},
    {**CLASSIC, "parallel_residual": True},
    {**MODERN, "head_dim": 10, "rotary_dim": 6},
    {**CLASSIC, "conv_width": 4},
    {**MODERN, "conv_width": 2, "sliding_window": 3},
    {**CLASSIC, "copy_width": 5},
    {**MODERN, "copy_width": 40, "conv_width": 2, "sliding_window": 3},
    {**CLASSIC, "ngram_order": 2},
    {**MODERN, "ngram_order": 4, "ngram_entries": 41, "positions": "learned"},
]


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = TransformerModel(ModelConfig(**SIZES | settings)).eval()
    with torch.no_grad():
        # Away from the initial symmetry, so that a missing bias or norm weight would show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(batch=3, time=11, seed=0):
    return torch.randint(0, SIZES["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_every_family(settings):
    model = make(**settings)
    tokens = ids()
    with torch.no_grad():
        logits = model(tokens)
        assert logits.shape == (3, 11, 37)
        torch.testing.assert_close(model(tokens, last_only=True), logits[:, -1:], rtol=1e-4, atol=1e-5)

        # optimized attention equals the written-out one
        reference = make(**settings, attention="reference")
        torch.testing.assert_close(reference(tokens), logits, rtol=1e-4, atol=1e-4)

        # cached equals uncached, in pieces of several sizes
        cache = KVCache(model.config, 3, 11)
        pieces = [model(tokens[:, start:end], cache=cache) for start, end in itertools.pairwise([0, 4, 5, 6, 9, 11])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), logits, rtol=1e-4, atol=1e-4)

        # a row in a batch equals the row alone
        torch.testing.assert_close(model(tokens[1:2]), logits[1:2], rtol=1e-4, atol=1e-4)

        # the future does not reach the past
        changed = tokens.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % 37
        torch.testing.assert_close(model(changed)[:, :7], logits[:, :7], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(changed)[:, 7:], logits[:, 7:])


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_documents_in_a_row_equal_documents_alone(settings):
    model = make(**settings)
    tokens = ids()
    documents = torch.tensor([[0] * 3 + [1] * 5 + [2] * 3]).expand(3, -1)
    with torch.no_grad():
        together = model(tokens, document_ids=documents)
        for start, end in ((0, 3), (3, 8), (8, 11)):
            torch.testing.assert_close(together[:, start:end], model(tokens[:, start:end]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sinks", "is_seen"), [(0, False), (2, False), (3, True)])
def test_a_sliding_window_hides_what_is_far_but_for_the_sinks(sinks, is_seen):
    model = make(**CLASSIC, num_layers=1, sliding_window=4, attention_sinks=sinks)
    tokens = ids()
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 37
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[2:6] > 1e-4).all()
    assert ((difference[6:] > 1e-6) == is_seen).all()


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_parameters_are_counted_right(settings):
    model = make(**settings)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model.config).total == counted
    assert weight_bytes(model.config) == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        CLASSIC,
        MODERN,
        {**CLASSIC, "sliding_window": 4},
        {**CLASSIC, "sliding_window": 4, "attention_sinks": 2},
        {**CLASSIC, "sliding_window": 4, "attention_sinks": 9},
    ],
)
def test_flops_equal_those_of_the_matrix_products(settings):
    from torch.utils.flop_counter import FlopCounterMode

    model = make(**settings, attention="reference")
    config, time = model.config, 11
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids(1, time))
    # The written-out attention multiplies all T x T pairs; the formula counts the visible ones only.
    window, sinks = config.sliding_window or time, config.attention_sinks
    visible = sum(1 for t in range(time) for s in range(t + 1) if t - s < window or s < sinks)
    hidden_pairs = config.num_layers * 4 * config.num_heads * config.head_dim * (time * time - visible)
    assert forward_flops_per_token(config, time) * time == pytest.approx(counter.get_total_flops() - hidden_pairs)
    assert training_flops_per_token(config, time) == 3 * forward_flops_per_token(config, time)


def test_cache_bytes_are_those_of_its_buffers():
    config = ModelConfig(**SIZES | MODERN)
    cache = KVCache(config, 5, 7)
    held = sum(tensor.numel() * tensor.element_size() for tensor in cache.keys + cache.values)
    assert kv_cache_bytes(config, batch_size=5, length=7) == held


def test_a_cache_can_be_reused_after_reset():
    model = make(**MODERN)
    cache = KVCache(model.config, 3, 11)
    with torch.no_grad():
        model(ids(seed=1), cache=cache)
        cache.reset()
        again = model(ids(seed=2), cache=cache)
        torch.testing.assert_close(again, model(ids(seed=2)), rtol=1e-4, atol=1e-4)


def test_initial_weights_have_the_documented_spread():
    torch.manual_seed(0)
    model = TransformerModel(ModelConfig(vocab_size=500, d_model=128, num_layers=8, num_heads=4, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith("output.weight") else 0.02  # sqrt(2 x 8 layers) = 4
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_with_outputs_from_zero_a_new_model_passes_its_embeddings_on_and_learns():
    torch.manual_seed(0)
    model = TransformerModel(ModelConfig(**SIZES, **CLASSIC, zero_init_outputs=True))
    embedded = model.head(model.final_norm(model.token_embedding(ids())))
    torch.testing.assert_close(model(ids()), embedded)
    model(ids(), targets=ids(seed=1)).backward()
    outputs = [weight for name, weight in model.named_parameters() if name.endswith("output.weight")]
    assert len(outputs) == 2 * model.config.num_layers
    assert all(weight.grad.abs().sum() > 0 for weight in outputs)


def test_tied_weights_are_one_matrix():
    tied, untied = make(**CLASSIC), make(**CLASSIC, tie_weights=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight


def test_dropout_acts_in_training_only():
    model = make(**CLASSIC | {"dropout": 0.5})
    torch.testing.assert_close(model(ids()), model(ids()))
    model.train()
    assert not torch.allclose(model(ids()), model(ids()))


@pytest.mark.parametrize(
    ("dropout", "attention_dropout", "dropped"), [(0.0, None, 0.0), (0.3, None, 0.3), (0.3, 0.0, 0.0), (0.0, 0.3, 0.3)]
)
def test_dropout_of_attention_follows_the_other_unless_it_is_set(dropout, attention_dropout, dropped):
    model = make(**CLASSIC | {"dropout": dropout, "attention_dropout": attention_dropout}).train()
    assert {block.attention.dropout for block in model.blocks} == {dropped}
    assert {block.dropout for block in model.blocks} == {dropout}
    is_random = not torch.allclose(model(ids()), model(ids()))
    assert is_random == (dropout + dropped > 0)


def test_sublayers_in_parallel_read_the_same_stream():
    block = make(**MODERN, parallel_residual=True).blocks[0]
    hidden, context = torch.randn(2, 5, 24), Context(rotary=rotary_table(ModelConfig(**SIZES | MODERN), 5)[:, None])
    by_formula = (
        hidden
        + block.attention(block.attention_norm(hidden), context)
        + block.feed_forward(block.feed_forward_norm(hidden))
    )
    torch.testing.assert_close(block(hidden, context), by_formula)


def test_too_long_sequences_are_refused():
    with pytest.raises(ValueError, match="at most 11 tokens, not 12"):
        make(**CLASSIC)(ids(time=12))


def test_document_starts():
    starts = document_starts(torch.tensor([[5, 5, 6, 6, 6, 7]]))
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5]]


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("family", [CLASSIC, MODERN], ids=["classic", "modern"])
def test_with_targets_it_returns_their_loss_and_the_gradients_of_all_weights(family, tie_weights):
    model = make(**family | {"tie_weights": tie_weights})
    token_ids, targets = ids(seed=1), ids(seed=2)
    targets[1, 4:] = -1
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(token_ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    loss = model(token_ids, targets=targets)
    torch.testing.assert_close(loss, expected)
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for name, (found, wanted) in zip(names, pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=name)
