import itertools

import pytest
import torch

from sheepop.config import load_config
from sheepop.models.sizing import (
    activation_bytes,
    count_parameters,
    logits_bytes,
    training_bytes,
    weight_bytes,
)
from sheepop.models.transformer import TransformerModel
from sheepop.training.optimizer import make_optimizer

B, T, V = 3, 45, 97
SIZES = {
    "model.vocab_size": V,
    "model.d_model": 40,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.d_ff": 92,
    "model.max_seq_len": 48,
}
TOLERANCE = 0.03  # of what the formula leaves out: masks of a byte, counters, scalars


def model_config(preset, **settings):
    overrides = SIZES | {f"model.{key}": value for key, value in settings.items()}
    return load_config(preset=preset, overrides=overrides).model


def bytes_saved_for_backward(config, *, dtype=None, document_ids=None, time=T, by_kernels=False):
    """Bytes of the distinct blocks of memory that autograd keeps, without weights and without the head's gradients."""
    torch.manual_seed(0)
    model = TransformerModel(config).train()
    model.learn_by_kernels(attention=by_kernels, head=False)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    blocks = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            blocks[storage.data_ptr()] = storage.nbytes()
        return tensor

    token_ids = torch.randint(0, config.vocab_size, (B, time))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        model(token_ids, targets=token_ids, document_ids=document_ids)
    return sum(blocks.values()) - 4 * config.d_model * (V + B * time)


VARIANTS = [
    ("classic", {}),
    ("classic", {"dropout": 0.0}),
    ("classic", {"dropout": 0.0, "positions": "learned", "bias": True, "activation": "gelu_tanh"}),
    ("classic", {"dropout": 0.0, "activation": "relu", "positions": "none"}),
    ("classic", {"dropout": 0.0, "activation": "relu_squared", "positions": "sinusoidal"}),
    ("classic", {"dropout": 0.0, "sliding_window": 8}),
    ("classic", {"dropout": 0.0, "sliding_window": 8, "attention_sinks": 3}),
    ("classic", {"dropout": 0.0, "sliding_window": 8, "attention_sinks": 99}),
    ("classic", {"dropout": 0.0, "attention": "reference"}),
    ("classic", {"attention": "reference"}),
    ("classic", {"tie_weights": False, "num_kv_heads": 1, "head_dim": 6, "dropout": 0.0}),
    ("modern", {}),
    ("modern", {"dropout": 0.2}),
    ("modern", {"dropout": 0.2, "attention_dropout": 0.0}),
    ("classic", {"dropout": 0.0, "attention_dropout": 0.2}),
    ("modern", {"activation": "geglu", "positions": "none"}),
    ("modern", {"ngram_order": 4, "ngram_entries": 99}),
    ("classic", {"conv_width": 4, "dropout": 0.0}),
    ("modern", {"conv_width": 4}),
    ("classic", {"copy_width": 24, "dropout": 0.0}),
    ("modern", {"copy_width": 24}),
    ("modern", {"qk_norm": False, "num_heads": 5, "num_kv_heads": 5}),
]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("preset", "settings"), VARIANTS, ids=str)
def test_activations_are_those_that_autograd_keeps(preset, settings, dtype):
    config = model_config(preset, **settings)
    estimate = activation_bytes(config, batch_size=B, context=T, bytes_per_number=4 if dtype is None else 2)
    assert estimate == pytest.approx(bytes_saved_for_backward(config, dtype=dtype), rel=TOLERANCE)


BLOCK_VARIANTS = [
    ("classic", {"dropout": 0.0}),
    ("classic", {"dropout": 0.2, "num_kv_heads": 2}),
    ("classic", {"dropout": 0.0, "sliding_window": 70}),
    ("modern", {}),
    ("modern", {"dropout": 0.2, "sliding_window": 9}),
    ("modern", {"sliding_window": 9, "attention_sinks": 2}),
    ("modern", {"qk_norm": False, "num_heads": 5, "num_kv_heads": 5}),
    ("modern", {"qk_norm": False, "positions": "none"}),
]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("context", [256, 300], ids=["kept", "made again"])
@pytest.mark.parametrize(("preset", "settings"), BLOCK_VARIANTS, ids=str)
def test_activations_of_attention_in_blocks(preset, settings, context, dtype):
    config = model_config(preset, max_seq_len=context, **settings)
    estimate = activation_bytes(config, batch_size=B, context=context, bytes_per_number=4 if dtype is None else 2)
    saved = bytes_saved_for_backward(config, dtype=dtype, time=context)
    assert estimate == pytest.approx(saved, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("preset", "settings"), BLOCK_VARIANTS, ids=str)
def test_activations_of_attention_by_kernels(preset, settings, dtype):
    config = model_config(preset, max_seq_len=150, head_dim=16, **settings)
    size = 4 if dtype is None else 2
    estimate = activation_bytes(config, batch_size=B, context=150, bytes_per_number=size, by_kernels=True)
    saved = bytes_saved_for_backward(config, dtype=dtype, time=150, by_kernels=True)
    assert estimate == pytest.approx(saved, rel=TOLERANCE)


def test_a_document_mask_costs_a_matrix_a_layer():
    config = model_config("classic", dropout=0.0)
    document_ids = torch.zeros((B, T), dtype=torch.long)
    saved = bytes_saved_for_backward(config, document_ids=document_ids)
    assert activation_bytes(config, batch_size=B, context=T, document_mask=True) == pytest.approx(saved, rel=TOLERANCE)


@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(preset):
    config = model_config(preset)
    whole = activation_bytes(config, batch_size=B, context=T)
    less = activation_bytes(config, batch_size=B, context=T, activation_checkpointing=True)
    assert 3 * 4 * B * T * 40 < less < whole


@pytest.mark.parametrize("settings", [settings for _, settings in VARIANTS], ids=str)
@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_counts_and_bytes_are_those_of_the_model(preset, settings):
    config = model_config(preset, **settings)
    parameters = list(TransformerModel(config).parameters())
    assert count_parameters(config).total == sum(parameter.numel() for parameter in parameters)
    assert weight_bytes(config) == sum(parameter.nbytes for parameter in parameters)


def test_the_peak_has_activations_or_gradients_but_not_both_unless_gradients_are_accumulated():
    config = model_config("classic")
    once = training_bytes(config, batch_size=B, context=T)
    assert once.peak == once.weights + once.optimizer + once.activations + once.logits
    assert once.logits == logits_bytes(config, batch_size=B, context=T) == 4 * (B * T * V + 40 * (V + B * T))
    several = training_bytes(config, batch_size=B, context=T, gradient_accumulation_steps=2)
    assert several.peak == once.peak + once.gradients
    little = training_bytes(config, batch_size=1, context=1)
    assert little.peak == little.state


def test_the_logits_are_those_of_a_chunk():
    config = load_config(preset="gpt2").model
    head = 4 * 768 * (50257 + 8 * 1024)
    assert logits_bytes(config, batch_size=8, context=1024) == 4 * 256 * 50257 + head
    assert logits_bytes(config, batch_size=8, context=1024, on_gpu=True) == 2 * 4 * 4096 * 50257 + head
    mixed = logits_bytes(config, batch_size=8, context=1024, bytes_per_number=2)
    assert mixed == (4 + 2) * 256 * 50257 + head + 2 * 2**22
    by_kernels = logits_bytes(config, batch_size=8, context=1024, by_kernels=True)
    assert by_kernels == 4 * 512 * 50257 + head
    assert mixed == logits_bytes(config, batch_size=8, context=1024, bytes_per_number=2, by_kernels=True)


def test_the_optimizer_keeps_what_the_plan_says():
    for name, preset in itertools.product(("adamw", "muon"), ("classic", "modern")):
        settings = {
            "model.d_model": 24,
            "model.num_heads": 4,
            "model.vocab_size": 23,
            "model.bias": preset == "classic",
        }
        config = load_config(preset=preset, overrides=settings | {"training.optimizer": name})
        model = TransformerModel(config.model)
        optimizer = make_optimizer(model, config.training)
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
        optimizer.step()
        kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
        assert training_bytes(config.model, batch_size=1, context=2, optimizer=name).optimizer == kept
