"""Errors planted into the implementation: exactly the formulas that are about it have to notice."""

import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from sheepop.learn.formula import Formula, relative_difference
from sheepop.learn.formulas import FORMULAS
from sheepop.learn.trace import Trace
from sheepop.models.blocks import ACTIVATIONS

TOLERANCE = 1e-6
# Between them they have all parts.
FAMILIES = ("classic", "window", "sinks", "convolutions", "copying", "learned", "sinusoidal")


@dataclass(frozen=True)
class Mutation:
    """An error: `edits` of the text of `code`, or `patch`.

    `random` are the formulas that notice it on random numbers, and `traced` in a run, if not the same.
    """

    name: str
    random: set[str]
    code: str = ""
    edits: dict[str, str] = field(default_factory=dict)
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    traced: set[str] | None = None

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.patch is not None:
            self.patch(monkeypatch)
        if self.code:
            plant(monkeypatch, self.code, self.edits)


def plant(monkeypatch: pytest.MonkeyPatch, code: str, edits: dict[str, str]) -> None:
    """Give a function, wherever it was imported to, the code of its text after these edits."""
    module_name, _, path = code.partition(":")
    module = importlib.import_module(module_name)
    symbol: Any = module
    for name in path.split("."):
        symbol = getattr(symbol, name)
    function = inspect.unwrap(symbol)
    text = textwrap.dedent(inspect.getsource(function))
    for old, new in edits.items():
        assert text.count(old) == 1, f"{code} has {text.count(old)} times '{old}', so the error cannot be planted"
        text = text.replace(old, new)
    space = dict(vars(module))
    exec(text, space)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(space[function.__name__]).__code__)


def layer_norm_of_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbiased(hidden: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        centred = hidden - hidden.mean(-1, keepdim=True)
        normed = centred / (hidden.var(-1, keepdim=True, unbiased=True) + eps).sqrt() * weight
        return normed if bias is None else normed + bias

    monkeypatch.setattr(functional, "layer_norm", unbiased)


def rms_norm_without_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.rms_norm
    monkeypatch.setattr(functional, "rms_norm", lambda hidden, shape, weight, eps: original(hidden, shape, weight, 0.0))


def swap_activation(name: str, other: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, name, other)


POSITIONS, BLOCKS, ATTENTION = "sheepop.models.positions", "sheepop.models.blocks", "sheepop.models.attention:attention"
MODEL, HEADS = "sheepop.models.transformer:TransformerModel", f"{BLOCKS}:MultiHeadAttention.forward"
SAMPLING, SCHEDULE = "sheepop.generation.sampling", "sheepop.training.schedule:learning_rate_at"
ADAMW, MUON, SIZING = "sheepop.training.adamw:move", "sheepop.training.muon", "sheepop.models.sizing"
ADAMW_CORRECTIONS = {"adamw_momentum_correction", "adamw_second_moment_correction"}
NEVER: set[str] = set()

MUTATIONS = (
    Mutation(
        "wrong row of the table",
        {"token_embedding"},
        f"{MODEL}.embed",
        {"self.token_embedding(token_ids)": "self.token_embedding((token_ids + 1) % self.config.vocab_size)"},
    ),
    Mutation(
        "no root of D",
        {"embedding_sum"},
        f"{MODEL}.embed",
        {"embedded * math.sqrt(self.config.d_model) +": "embedded +"},
    ),
    Mutation(
        "cosines before sines",
        {"sinusoidal_encoding"},
        f"{POSITIONS}:sinusoidal_table",
        {"(angles.sin(), angles.cos())": "(angles.cos(), angles.sin())"},
    ),
    Mutation(
        "sign of the rotation",
        {"rotary_encoding"},
        f"{POSITIONS}:turn",
        {"rotations.conj() if back else rotations": "rotations if back else rotations.conj()"},
    ),
    Mutation(
        "pairs i and i + C/2",
        {"rotary_encoding"},
        f"{POSITIONS}:turn",
        {
            "pairs = torch.view_as_complex(vectors.view(*vectors.shape[:-1], -1, 2))": (
                "pairs = torch.complex(*vectors.chunk(2, dim=-1))"
            ),
            "torch.view_as_real(pairs * (rotations.conj() if back else rotations)).flatten(-2)": (
                "torch.view_as_real(pairs * rotations).mT.flatten(-2)"
            ),
        },
    ),
    Mutation(
        "projection too large",
        {"query_projection", "key_projection", "value_projection"},
        HEADS,
        {"self.query_key_value(hidden).view(": "(1.01 * self.query_key_value(hidden)).view("},
    ),
    Mutation(
        "values of other heads",
        {"value_projection"},
        HEADS,
        {"value = value.transpose(1, 2)": "value = value.roll(1, 2).transpose(1, 2)"},
    ),
    Mutation(
        "no root of C",
        {"attention_scores", "attention"},
        ATTENTION,
        {" / math.sqrt(query.shape[-1])": ""},
    ),
    Mutation(
        "root of the model's width",
        {"attention_scores", "attention"},
        ATTENTION,
        {"math.sqrt(query.shape[-1])": "math.sqrt(query.shape[-1] * query.shape[1])"},
    ),
    Mutation(
        "keys of other groups",
        {"attention_scores"},
        ATTENTION,
        {"key.repeat_interleave(heads_per_group, dim=1)": "key.repeat(1, heads_per_group, 1, 1)"},
    ),
    Mutation(
        "a cell too many in the mask",
        {"causal_mask"},
        "sheepop.models.attention:visible",
        {"key_positions <= query_positions": "key_positions <= query_positions + 1"},
    ),
    Mutation(
        "window off by one",
        {"causal_mask"},
        "sheepop.models.attention:visible",
        {"key_positions > query_positions - window": "key_positions >= query_positions - window"},
    ),
    Mutation(
        "sinks off by one",
        {"causal_mask"},
        "sheepop.models.attention:visible",
        {"places < sinks": "places <= sinks"},
    ),
    Mutation(
        "a place that copies the token that is to be guessed",
        {"copying"},
        "sheepop.models.copying:visible",
        {"device=positions.device) < positions": "device=positions.device) <= positions"},
        traced={"copying", "cross_entropy"},  # the latter by a loss that is made without this line
    ),
    Mutation(
        "the farthest token first",
        {"short_convolution"},
        "sheepop.models.short_convolution:ShortConvolution.forward",
        {"self.weight[distance - 1]": "self.weight[-distance]"},
    ),
    Mutation(
        "softmax over the queries",
        {"attention_weights", "attention"},
        ATTENTION,
        {".softmax(dim=-1)": ".softmax(dim=-2)"},
    ),
    Mutation(
        "heads laid flat over places",
        {"multi_head_attention"},
        HEADS,
        {'tap("attention.mixed", mixed).transpose(1, 2).reshape(': 'tap("attention.mixed", mixed).reshape('},
    ),
    Mutation(
        "bent before it is widened",
        {"feed_forward", "swiglu"},
        f"{BLOCKS}:FeedForward.forward",
        {"hidden = self.input(hidden)": "hidden = self.input(self.activation(hidden))"},
    ),
    Mutation(
        "gate and linear half swapped",
        {"swiglu"},
        f"{BLOCKS}:FeedForward.forward",
        {"gate, linear = hidden.chunk(2, dim=-1)": "linear, gate = hidden.chunk(2, dim=-1)"},
    ),
    Mutation("tanh for erf", {"gelu"}, patch=partial(swap_activation, "gelu", ACTIVATIONS["gelu_tanh"])),
    Mutation("erf for tanh", {"gelu_tanh"}, patch=partial(swap_activation, "gelu_tanh", ACTIVATIONS["gelu"])),
    Mutation("ReLU for SiLU", {"silu"}, patch=partial(swap_activation, "silu", ACTIVATIONS["relu"])),
    Mutation("variance over N - 1", {"layer_norm"}, patch=layer_norm_of_sample),
    Mutation("no epsilon", {"rms_norm", "qk_norm"}, patch=rms_norm_without_epsilon),
    Mutation(
        "no residual around attention",
        {"transformer_block"},
        f"{BLOCKS}:TransformerBlock.compute",
        {'tap("after_attention", hidden + drop(': 'tap("after_attention", drop('},
    ),
    Mutation(
        "feed-forward beside attention",
        {"transformer_block"},
        f"{BLOCKS}:TransformerBlock.compute",
        {"source = hidden if self.is_parallel else attended": "source = hidden"},
    ),
    Mutation(
        "no last norm",
        {"forward_pass"},
        f"{MODEL}.hidden_states",
        {'tap("final_norm", self.final_norm(hidden))': 'tap("final_norm", hidden)'},
    ),
    Mutation(
        "what the first block makes thrown away",
        {"forward_pass"},
        f"{MODEL}.hidden_states",
        {"hidden = block(hidden, context)": "hidden = (hidden, block(hidden, context))[min(layer, 1)]"},
    ),
    Mutation(
        "loss in bits",
        {"cross_entropy"},
        "sheepop.models.head_loss:HeadLoss.forward",
        {".where(is_real, 0.0).sum()": ".where(is_real, 0.0).sum() / 0.6931471805599453"},
    ),
    Mutation(
        "2 to the loss", {"perplexity"}, "sheepop.evaluation.perplexity:perplexity", {"math.exp(loss)": "2**loss"}
    ),
    Mutation(
        "nats per byte",
        {"bits_per_byte"},
        "sheepop.evaluation.perplexity:bits_per_byte",
        {"loss / math.log(2) * tokens": "loss * tokens"},
        traced=NEVER,
    ),
    Mutation(
        "slowest block wins",
        {"generation_heat"},
        f"{SAMPLING}:race",
        {"(weights.log_() - log_arrivals": "(weights.log_() + log_arrivals"},
    ),
    Mutation(
        "slowest entry wins",
        {"generation_step"},
        f"{SAMPLING}:race",
        {"(within - log_arrivals": "(within + log_arrivals"},
    ),
    Mutation(
        "distribution without temperature",
        {"temperature_softmax"},
        f"{SAMPLING}:distribution",
        {"filter_logits(logits.float(), previous_ids, settings)": "logits.float()"},
    ),
    Mutation("one too many", {"top_k"}, f"{SAMPLING}:keep_top_k", {"logits[..., :1], k,": "logits[..., :1], k - 1,"}),
    Mutation(
        "without the one that crosses p",
        {"top_p"},
        f"{SAMPLING}:keep_top_p",
        {".sum(dim=-1, keepdim=True) + 1": ".sum(dim=-1, keepdim=True).clamp_min(1)"},
    ),
    Mutation(
        "gradients twice",
        {"adamw_momentum", "adamw_second_moment"} | ADAMW_CORRECTIONS,
        ADAMW,
        {"gradients,\n        averages": "[2 * gradient for gradient in gradients],\n        averages"},
        traced=NEVER,
    ),
    Mutation(
        "steps counted twice",
        ADAMW_CORRECTIONS | {"adamw_update"},
        ADAMW,
        {"torch._foreach_add_(steps, 1)": "torch._foreach_add_(steps, 2)"},
        traced=NEVER,
    ),
    Mutation(
        "no decay",
        {"adamw_update"},
        ADAMW,
        {'weight_decay=group["weight_decay"]': "weight_decay=0.0"},
        traced=NEVER,
    ),
    Mutation(
        "a mean of gradients",
        {"muon_momentum"},
        f"{MUON}:Muon.step",
        {".add_(gradient)": ".add_(gradient, alpha=1 - self.momentum)"},
        traced=NEVER,
    ),
    Mutation(
        "another coefficient",
        {"muon_orthogonalization"},
        f"{MUON}:newton_schulz",
        {"beta=b, alpha=c": "beta=1.1 * b, alpha=c"},
        traced=NEVER,
    ),
    Mutation(
        "momentum without looking ahead",
        {"muon_update"},
        f"{MUON}:Muon.step",
        {"ahead = gradient.add(momentum, alpha=self.momentum)": "ahead = momentum"},
        traced=NEVER,
    ),
    Mutation(
        "clipped to the half",
        {"gradient_clipping"},
        "sheepop.training.step:train_step",
        {"(model.parameters(), max_grad_norm, total_norm)": "(model.parameters(), max_grad_norm / 2, total_norm)"},
        traced=NEVER,
    ),
    Mutation(
        "cosine a step ahead",
        {"cosine_schedule"},
        SCHEDULE,
        {"(place - warmup) / max(1": "(place + 1 - warmup) / max(1"},
        traced=NEVER,
    ),
    Mutation(
        "decay ends a step late",
        {"wsd_schedule"},
        SCHEDULE,
        {"(total_steps - 1 - place) / decay_steps": "(total_steps - place) / decay_steps"},
        traced=NEVER,
    ),
    Mutation(
        "warm-up from zero",
        {"cosine_schedule", "wsd_schedule"},
        SCHEDULE,
        {"peak * (place + 1) / warmup": "peak * place / warmup"},
        traced=NEVER,
    ),
    Mutation(
        "keys without values",
        {"kv_cache_bytes"},
        f"{SIZING}:kv_cache_bytes",
        {"numbers = 2 * config": "numbers = config"},
        traced=NEVER,  # which shows a real cache
    ),
    Mutation(
        "a tied head counted twice",
        {"parameter_count"},
        f"{SIZING}:count_parameters",
        {"head=0 if config.tie_weights else config.vocab_size * D": "head=config.vocab_size * D"},
        traced=NEVER,  # which shows real parameters
    ),
    Mutation(
        "work without the head",
        {"forward_flops"},
        f"{SIZING}:forward_flops_per_token",
        {"inner_matrices(config) + config.d_model * (config.vocab_size + 2": "inner_matrices(config) + (2"},
    ),
)


def notices(check: Callable[[], tuple[Any, Any]]) -> bool:
    try:
        return not relative_difference(*check()) < TOLERANCE  # what is not a number is noticed too
    except Exception:
        return True


def noticed_on_random_numbers(formula: Formula) -> bool:
    return any(notices(lambda seed=seed: formula.sampled(np.random.default_rng(seed))) for seed in range(3))


def noticed_in_runs(formula: Formula, runs: list[Trace]) -> bool:
    about = [run for run in runs if formula.is_traced and not formula.missing(run.model.config)]
    return any(notices(lambda run=run, layer=layer: formula.traced(run, layer)) for run in about for layer in range(2))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_exactly_the_formulas_about_it_notice_an_error(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch, run_of: Callable[[str], Trace]
) -> None:
    mutation.plant(monkeypatch)
    runs = [run_of(family) for family in FAMILIES]
    assert {name for name, formula in FORMULAS.items() if noticed_on_random_numbers(formula)} == mutation.random
    expected = mutation.random if mutation.traced is None else mutation.traced
    assert {name for name, formula in FORMULAS.items() if noticed_in_runs(formula, runs)} == expected


def test_every_formula_notices_an_error() -> None:
    assert set().union(*(mutation.random for mutation in MUTATIONS)) == FORMULAS.keys()


def test_an_error_that_can_no_longer_be_planted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="attention has 0 times 'no such text', so the error cannot be planted"):
        plant(monkeypatch, ATTENTION, {"no such text": ""})
