from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.learn.diagrams.forward_trace import trace_forward
from sheepop.learn.diagrams.model_diagrams import attention_diagram, block_diagram, stack_diagram
from sheepop.models import blocks
from sheepop.models.optimized_attention import optimized_attention
from sheepop.models.transformer import TransformerModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 48,
    "num_layers": 2,
    "num_heads": 6,
    "d_ff": 80,
    "max_seq_len": 16,
    "dropout": 0.0,
}

configs = st.builds(
    lambda **kwargs: ModelConfig(**SIZES, **kwargs),
    num_kv_heads=st.sampled_from([1, 3, 6]),
    activation=st.sampled_from(["gelu", "relu_squared", "swiglu", "geglu"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    positions=st.sampled_from(["rotary", "learned", "sinusoidal", "none"]),
    qk_norm=st.booleans(),
    parallel_residual=st.booleans(),
    tie_weights=st.booleans(),
    ngram_order=st.sampled_from([1, 3]),
    bias=st.booleans(),
    attention=st.sampled_from(["optimized", "reference"]),
)


def model_of(config: ModelConfig) -> TransformerModel:
    with torch.device("meta"):
        return TransformerModel(config, initialize=False)


LAYERS = ("Linear", "LayerNorm", "RMSNorm")


@given(config=configs)
@settings(max_examples=10, deadline=None)
def test_every_layer_of_a_model_has_its_box_and_no_other(read_mermaid: Any, config: ModelConfig) -> None:
    block = model_of(config).blocks[0]
    for draw, module in ((block_diagram, block), (attention_diagram, block.attention)):
        chart = read_mermaid(draw(config))
        layers = [path.rpartition(".")[2] for path, layer in module.named_modules() if not list(layer.children())]
        drawn = [lines[0] for lines in chart.lines.values() if lines[1:] and lines[1].startswith(LAYERS)]
        assert sorted(drawn) == sorted(layers)
        begins = {start for start, _, _ in chart.arrows}
        assert [chart.lines[name] for name in chart.lines if name not in begins] == [["out"]]


def test_sizes_have_their_letters(read_mermaid: Any) -> None:
    chart = read_mermaid(attention_diagram(ModelConfig(**SIZES, num_kv_heads=3)))
    assert chart.lines[chart.named("query_key_value")] == ["query_key_value", "Linear 48 → 96", "(B, T, (H+2K)·C)"]
    assert chart.lines[chart.named("softmax")] == ["softmax", "(B, H, T, T)"]
    assert chart.lines[chart.named("divide by √C")] == ["divide by √C", "(B, H, T, T)"]


def test_a_size_that_is_ambiguous_stays_a_number() -> None:
    trace = trace_forward(ModelConfig(**SIZES | {"d_ff": 97}))
    assert trace.shape_text((48, 97, 2)) == "(D, 97, 2)"
    no_room = trace_forward(ModelConfig(**SIZES | {"num_heads": 4, "max_seq_len": 4}))  # T can only be what H is
    batch, time, width = no_room.operations[0].outputs[0].shape
    assert no_room.shape_text((batch, time, width)) == "(B, 4, D)"


def test_queries_keys_and_values_go_their_ways(read_mermaid: Any) -> None:
    chart = read_mermaid(attention_diagram(ModelConfig(**SIZES, num_kv_heads=3, qk_norm=True)))
    first, second, _ = (name for name, lines in chart.lines.items() if lines[0] == "split")
    assert chart.after(first, "value") == {"repeat for each query"}
    assert chart.after(second, "query") == {"query_norm"}
    assert chart.after(second, "key") == {"key_norm"}
    assert chart.after(chart.named("query_norm")) == chart.after(chart.named("key_norm")) == {"join"}
    assert chart.after(chart.named("visible()"), "mask") == {"masked_fill −∞"}
    assert chart.after(chart.named("softmax"), "weights") == {"matrix product"}


def test_the_residual_stream_goes_around(read_mermaid: Any) -> None:
    chart = read_mermaid(block_diagram(ModelConfig(**SIZES)))
    first, second = (name for name, lines in chart.lines.items() if lines == ["+"])
    assert chart.after(chart.named("hidden")) == {"attention_norm", "+"}
    assert chart.after(first) == {"feed_forward_norm", "+"}
    assert chart.after(second) == {"out"}
    parallel = read_mermaid(block_diagram(ModelConfig(**SIZES, parallel_residual=True)))
    assert parallel.after(parallel.named("hidden")) == {"attention_norm", "+", "feed_forward_norm"}


@pytest.mark.parametrize(("activation", "titles"), [("swiglu", {"silu", "×"}), ("gelu", {"gelu"})])
def test_a_gate_is_shown_where_there_is_one(read_mermaid: Any, activation: Any, titles: set[str]) -> None:
    chart = read_mermaid(block_diagram(ModelConfig(**SIZES, activation=activation)))
    inside = {chart.lines[name][0] for name, groups in chart.groups.items() if groups == ("FeedForward",)}
    assert inside == {"input", "output"} | titles
    assert chart.after(chart.named("silu") if "silu" in titles else chart.named("gelu")) == (
        {"×"} if "×" in titles else {"output"}
    )


def test_the_stack_shows_positions_blocks_and_the_tied_head(read_mermaid: Any) -> None:
    rotary = read_mermaid(stack_diagram(ModelConfig(**SIZES)))
    assert rotary.after(rotary.named("rotary")) == {"TransformerBlock × 2"}
    assert rotary.lines[rotary.named("head")][2:] == ["= token_embedding.weight", "(B, T, V)"]
    learned = read_mermaid(stack_diagram(ModelConfig(**SIZES, positions="learned", tie_weights=False)))
    assert "rotary" not in learned.titles()
    assert learned.after(learned.named("position_embedding")) == {"+"}
    assert learned.lines[learned.named("head")][2:] == ["(B, T, V)"]


def test_dropout_is_drawn_only_where_something_is_dropped(read_mermaid: Any) -> None:
    dropped = read_mermaid(block_diagram(ModelConfig(**SIZES | {"dropout": 0.3})))
    assert dropped.titles().count("drop()") == 2
    assert "drop()" not in read_mermaid(block_diagram(ModelConfig(**SIZES))).titles()


def test_who_only_looks_on_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(**SIZES)
    expected = block_diagram(config)
    seen: list[Tensor] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        mixed = optimized_attention(query, key, value, **options)
        seen.append(mixed.detach().float().abs().mean() + key.square().sum())
        return mixed

    monkeypatch.setitem(blocks.ATTENTION, "optimized", watched)
    assert block_diagram(config) == expected
    assert seen


def test_an_operation_that_is_added_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def bent(*args: Any, **options: Any) -> Tensor:
        return optimized_attention(*args, **options).relu()

    assert "relu" not in block_diagram(ModelConfig(**SIZES))
    monkeypatch.setitem(blocks.ATTENTION, "optimized", bent)
    assert "relu" in block_diagram(ModelConfig(**SIZES))
