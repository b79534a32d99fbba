"""Normalization: numbers of every size brought to one, so that each layer reads what it is used to."""

from collections.abc import Callable

import numpy as np
import sympy
import torch

from sheepop.config import ModelConfig
from sheepop.learn.formula import Formula, Meaning, Value
from sheepop.learn.notation import C, D, H, T, array, c, equals, h, i, j, mean, plus, r, ratio, root, t, times
from sheepop.learn.parts import bias_of, block_of, only, sample_run
from sheepop.learn.trace import Trace
from sheepop.models.blocks import make_norm

READ, MADE, MEAN = array("X", T, D), array("Y", T, D), array("mu", T)
GAIN, SHIFT, EPSILON = array("gamma", D), array("beta", D), sympy.Symbol("epsilon")
QUERY, NORMED = array("Q", H, T, C), array(r"\hat{Q}", H, T, C)


def gain(run: Trace, layer: int) -> torch.Tensor:
    """Return the weight of the norm before attention."""
    return block_of(run, layer).attention_norm.weight  # type: ignore[return-value]


def normed_queries(run: Trace, layer: int) -> torch.Tensor:
    """Return the queries behind their norm, before they are turned."""
    heads = run.model.config.num_heads
    if run.model.config.positions == "rotary":
        return run[f"blocks.{layer}.attention.before_rotary"].transpose(0, 1)[:heads]
    return run[f"blocks.{layer}.attention.query"]


def sample_norm(norm: str) -> Callable[[np.random.Generator], tuple[dict[str, Value], torch.Tensor]]:
    """Return what draws small numbers, beside which epsilon counts, and what the model's norm makes of them."""

    def sample(random: np.random.Generator) -> tuple[dict[str, Value], torch.Tensor]:
        config = ModelConfig(norm=norm, d_model=12, num_heads=1, bias=True, layer_norm_eps=1e-3)  # type: ignore[arg-type]
        module = make_norm(config, 12).double()
        for parameter in module.parameters():
            parameter.data = torch.from_numpy(random.standard_normal(12))
        numbers = torch.from_numpy(random.normal(0.05, 0.1, (5, 12)))
        weights = dict(module.named_parameters())
        values: dict[str, Value] = {"X": numbers, "gamma": weights["weight"], "epsilon": config.layer_norm_eps}
        if norm == "layernorm":
            values |= {"mu": numbers.mean(-1), "beta": weights["bias"]}
        return values, module(numbers)

    return sample


MEANINGS = {
    "Y": Meaning("the same, normalised", "blocks.{layer}.attention_norm"),
    "X": Meaning("the stream", "blocks.{layer}.input"),
    "mu": Meaning(
        "mean of the D numbers of a place", value=lambda run, layer: run[f"blocks.{layer}.input"].double().mean(-1)
    ),
    "gamma": Meaning("learned scale of each number", value=gain),
    "beta": Meaning(
        "learned shift, 0 where the model has none",
        value=lambda run, layer: bias_of(block_of(run, layer).attention_norm),
    ),
    "epsilon": Meaning(
        "a little, so that nothing is divided by 0", value=lambda run, _: run.model.config.layer_norm_eps
    ),
}
QUERY_NORM = {
    r"\hat{Q}": Meaning("queries, normalised (keys likewise)", value=normed_queries),
    "Q": Meaning(
        "queries as they are projected",
        value=lambda run, layer: run[f"blocks.{layer}.attention.projected"].transpose(0, 1)[
            : run.model.config.num_heads
        ],
    ),
    "gamma": Meaning(
        "learned scale of each number, the same for all heads",
        value=lambda run, layer: block_of(run, layer).attention.query_norm.weight,  # type: ignore[union-attr]
    ),
    "epsilon": MEANINGS["epsilon"],
}


def root_of_mean_square(square: sympy.Expr, index: sympy.Symbol, size: sympy.Symbol) -> sympy.Expr:
    """Return the root of the mean of squares and epsilon."""
    return root(plus(mean(square, index, size), EPSILON))


FORMULAS = (
    Formula(
        name="layer_norm",
        title="Layer norm",
        equation=equals(
            MADE[t, j],
            plus(
                times(
                    GAIN[j],
                    ratio(
                        plus(READ[t, j], -MEAN[t]),
                        root_of_mean_square(sympy.Pow(plus(READ[t, i], -MEAN[t]), 2), i, D),
                    ),
                ),
                SHIFT[j],
            ),
        ),
        meanings=MEANINGS,
        code="sheepop.models.blocks:make_norm",
        line="return nn.LayerNorm(",
        kids="""
            A choir in which some shout and some whisper. The conductor finds the middle loudness, sets it to zero, and
            turns everybody's knob so that the spread is always the same; who is louder than whom stays.
        """,
        scientists="""
            Each place is centred and divided by its own standard deviation over the D numbers, then scaled and shifted
            by learned vectors. But for epsilon, the result is the same for a stream that is multiplied by a positive
            number, so layers read numbers of one size at any depth. The variance is the biased one, divided by D.
        """,
        pitfalls="""
            Dividing the variance by D - 1; adding epsilon behind the root instead of under it; normalising over the
            places or the batch, through which a place would see what comes after it.
        """,
        source="Ba et al. 2016, Layer Normalization; before the sub-layer: Xiong et al. 2020",
        sample=sample_norm("layernorm"),
        missing=only("norm", "layernorm"),
    ),
    Formula(
        name="rms_norm",
        title="RMS norm",
        equation=equals(
            MADE[t, j],
            times(GAIN[j], ratio(READ[t, j], root_of_mean_square(READ[t, i] ** 2, i, D))),
        ),
        meanings={name: MEANINGS[name] for name in ("Y", "X", "gamma", "epsilon")},
        code="sheepop.models.blocks:make_norm",
        line="return nn.RMSNorm(",
        kids="""
            The same choir, but the conductor only turns one big knob until the whole choir has its usual loudness.
            Nobody's middle is looked for, which saves a walk along the rows.
        """,
        scientists="""
            Division by the root of the mean square instead of the standard deviation, without centring and shift. For
            numbers whose mean is zero it is layer norm; that centring can be left out is an empirical finding. It
            reads the stream once and needs one sum over the D numbers instead of two.
        """,
        pitfalls="""
            Leaving epsilon out, which is seen only where the stream is small, such as at padding; squaring in a type of
            16 bits, where 256 squared is already more than fp16 holds.
        """,
        source="Zhang and Sennrich 2019, Root Mean Square Layer Normalization",
        sample=sample_norm("rmsnorm"),
        missing=only("norm", "rmsnorm"),
    ),
    Formula(
        name="qk_norm",
        title="Norm of queries and keys",
        equation=equals(
            NORMED[h, t, c],
            times(array("gamma", C)[c], ratio(QUERY[h, t, c], root_of_mean_square(QUERY[h, t, r] ** 2, r, C))),
        ),
        meanings=QUERY_NORM,
        code="sheepop.models.blocks:MultiHeadAttention.forward",
        line="self.query_norm(query), self.key_norm(key)",
        kids="""
            Before question cards and name tags are held together, all are printed in the same size. Then the best fit
            wins, and not the largest print.
        """,
        scientists="""
            Queries and keys of each head get the root mean square 1 before a learned scale, so that a score is at most
            the root of C times the largest scales of both. Otherwise scores can grow until the softmax is one-hot and
            training at a high rate breaks.
        """,
        pitfalls="""
            Normalising after the rotation with a scale for each number, which breaks the pairs; normalising over all
            heads at once where a model was trained with a norm for each.
        """,
        source="Dehghani et al. 2023, Scaling Vision Transformers to 22 Billion Parameters; Henry et al. 2020",
        sample=sample_run(QUERY_NORM, r"\hat{Q}", qk_norm=True),
        missing=only("qk_norm", True),
    ),
)
