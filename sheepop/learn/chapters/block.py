"""The block, and the whole way from tokens to scores."""

from collections.abc import Callable

import numpy as np
import sympy
from numpy.typing import NDArray
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.learn.evaluation import Part
from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.functions import Applied, Indicator, Stacked
from sheepop.learn.notation import (
    D,
    L,
    T,
    V,
    array,
    cases,
    equals,
    i,
    j,
    matrix_product,
    matrix_sum,
    over,
    plus,
    s,
    t,
    times,
    v,
)
from sheepop.learn.parts import block_of, context_of, part_of, sample_run
from sheepop.learn.trace import Trace
from sheepop.models.blocks import TransformerBlock
from sheepop.models.copying import following
from sheepop.models.short_convolution import ShortConvolution

STREAM, MADE = sympy.MatrixSymbol("X", T, D), sympy.MatrixSymbol("Y", T, D)
EMBEDDED, HEAD, SCORES = sympy.MatrixSymbol("E", T, D), sympy.MatrixSymbol("U", V, D), sympy.MatrixSymbol("Z", T, V)
ATTENDED = Applied(sympy.Symbol("Attention"), Applied(sympy.Symbol("Norm_1"), STREAM))


NORMED, READ = array("Y", T, D), array("R", T, D)
WIDTH = sympy.Symbol("W", integer=True, positive=True)
COPIED, ENTRIES, FOLLOWER = array("Z^C", T, V), array("Z", T, V), array("y", T)
ASKED, FOUND_BY = array("Q", T, WIDTH), array("K", T, WIDTH)
BACK = sympy.Symbol("J", integer=True, positive=True)
MIXING = array("w", BACK, D)
BEFORE = NORMED[t - 1 - j, i]


def convolution_of(run: Trace, layer: int) -> ShortConvolution:
    """Return a block's short convolution before attention."""
    convolution = block_of(run, layer).attention_convolution
    assert convolution is not None
    return convolution


def inner(compute: Callable[[TransformerBlock, Tensor], Tensor]) -> Callable[[Trace, int], Part]:
    """Return what gives a part of a block as a function."""
    return lambda run, layer: part_of(run, lambda hidden: compute(block_of(run, layer), hidden))


def attention_of(run: Trace, layer: int) -> Part:
    """Return attention with all its heads as a function of what it reads."""
    context = context_of(run)
    return part_of(run, lambda hidden: block_of(run, layer).attention(hidden, context))


def blocks_of(run: Trace, _layer: int) -> Part:
    """Return all blocks as a function of what one reads and of which one it is."""
    context = context_of(run)

    def block(hidden: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        return part_of(run, lambda tensor: block_of(run, number)(tensor, context))(hidden)

    return block


def missing_in_series(config: ModelConfig) -> str | None:
    """Say why a model's sub-layers do not follow each other."""
    if config.parallel_residual:
        return (
            "its model.parallel_residual is true: attention and feed-forward read the same stream, and are not one "
            "behind the other"
        )
    return None


def missing_where_nothing_is_mixed(config: ModelConfig) -> str | None:
    """Say why a model has no short convolutions."""
    return None if config.conv_width > 1 else "its model.conv_width is 1: layers read each token by itself"


def read(site: int) -> Callable[[Trace, int], Part]:
    """Return what gives the way from the stream to what attention (0) or the feed-forward (1) reads."""

    def compute(block: TransformerBlock, hidden: Tensor) -> Tensor:
        norm = (block.attention_norm, block.feed_forward_norm)[site]
        convolution = (block.attention_convolution, block.feed_forward_convolution)[site]
        normed: Tensor = norm(hidden)
        return normed if convolution is None else convolution(normed)

    return inner(compute)


def entry_scores(run: Trace, _layer: int) -> Tensor:
    """Return the head's scores, before anything is copied."""
    return run["entry_scores" if "entry_scores" in run else "logits"]


def followers(run: Trace, _layer: int) -> Tensor:
    """Return the token after each place of a run's text."""
    return following(run.token_ids[None])[0]


def missing_where_nothing_is_copied(config: ModelConfig) -> str | None:
    """Say why a model has no head that copies."""
    return (
        None if config.copy_width else "its model.copy_width is 0: its head scores the entries of the vocabulary alone"
    )


CONVOLUTION = {
    "R": Meaning("what attention reads", "blocks.{layer}.attention.read"),
    "Y": Meaning("the normalised stream", "blocks.{layer}.attention_norm"),
    "w": Meaning(
        "weights of the tokens before, the nearest first",
        value=lambda run, layer: convolution_of(run, layer).weight,
    ),
    "J": Meaning("how many tokens before are mixed in", value=lambda run, _: run.model.config.conv_width - 1),
}
BLOCK = {
    "Y": Meaning("the stream behind the block", "blocks.{layer}.output"),
    "X": Meaning("the stream before the block", "blocks.{layer}.input"),
    "Norm_1": Meaning("norm before attention, with the short convolution of a model that has one", value=read(0)),
    "Attention": Meaning("attention with all its heads", value=attention_of),
    "Norm_2": Meaning(
        "norm before the feed-forward, with the short convolution of a model that has one", value=read(1)
    ),
    "FFN": Meaning("the feed-forward", value=inner(lambda block, x: block.feed_forward(x))),
}
FORWARD = {
    "Z": Meaning("scores of all entries of the vocabulary at each place", value=entry_scores),
    "E": Meaning("embedding of the text", "embedding"),
    "Block": Meaning("the blocks, one behind the other", value=blocks_of),
    "L": Meaning("layers", value=lambda run, _: run.model.config.num_layers),
    "Norm": Meaning("the last norm", value=lambda run, _: part_of(run, run.model.final_norm)),
    "U": Meaning(
        "the head: a row for each entry, often the table of embeddings itself",
        value=lambda run, _: run.model.head.weight,
    ),
}
COPYING = {
    "Z^C": Meaning("scores with what is copied", "logits"),
    "Z": Meaning("scores of all entries of the vocabulary at each place", value=entry_scores),
    "Q": Meaning("what each place looks for", "copying.query"),
    "K": Meaning("what each place is found by", "copying.key"),
    "y": Meaning("the token after each place, -1 behind the last", value=followers),
    "W": Meaning("how many numbers that is", value=lambda run, _: run.model.config.copy_width),
}

FORMULAS = (
    Formula(
        name="short_convolution",
        title="Short convolution",
        equation=equals(
            READ[t, i], plus(NORMED[t, i], over(times(MIXING[j, i], cases((BEFORE, j < t), otherwise=0)), j, BACK))
        ),
        meanings=CONVOLUTION,
        code="sheepop.models.short_convolution:ShortConvolution.forward",
        line="mixed = mixed + self.weight[distance - 1] * earlier",
        kids="""
            Before a worker on the belt looks at a brick, a little of the colour of the three bricks before it has
            rubbed off on it. So the worker sees at once what it comes after, without turning round.
        """,
        scientists="""
            A depthwise causal convolution with the identity added, before each sub-layer: groups of J + 1 tokens at
            every depth for 2J vectors a layer. Attention need not spend heads on its neighbours, and induction needs
            one layer less. In writing, the last J inputs of each have to be kept.
        """,
        pitfalls="""
            Mixing in the token that is to be predicted; mixing over the border of two texts that share a row; starting
            each piece of a prompt from nothing instead of from the piece before.
        """,
        source="Allen-Zhu 2025, Physics of Language Models: Part 4.1; So et al. 2021, Primer",
        sample=sample_run(CONVOLUTION, "R", conv_width=4),
        missing=missing_where_nothing_is_mixed,
    ),
    Formula(
        name="transformer_block",
        title="Transformer block",
        equation=equals(
            MADE,
            matrix_sum(
                STREAM,
                ATTENDED,
                Applied(sympy.Symbol("FFN"), Applied(sympy.Symbol("Norm_2"), matrix_sum(STREAM, ATTENDED))),
            ),
        ),
        meanings=BLOCK,
        code="sheepop.models.blocks:TransformerBlock.compute",
        line='return tap("output", attended + drop(',
        kids="""
            A conveyor belt runs past two workers. The first looks around at what lies further up the belt and puts a
            brick on; the second thinks about what is there and puts another one on. Nobody takes anything off the belt.
        """,
        scientists="""
            Two sub-layers, each of which reads a normalised copy of the stream and adds to it. Its derivative is the
            identity plus a correction, so the gradient reaches the first layer however many there are. With the norm on
            the branch (pre-norm) that path is free of any norm, which spares the warm-up that post-norm needs.
        """,
        pitfalls="""
            Adding the normalised copy instead of the stream itself; letting the feed-forward read what was there
            before attention, which is another model (a parallel one), not a wrong one.
        """,
        source="Vaswani et al. 2017, section 3.1; residuals: He et al. 2016; pre-norm: Xiong et al. 2020",
        sample=sample_run(BLOCK, "Y", bias=True),
        missing=missing_in_series,
    ),
    Formula(
        name="forward_pass",
        title="Forward pass",
        equation=equals(
            SCORES,
            matrix_product(
                Applied(sympy.Symbol("Norm"), Stacked(sympy.Symbol("Block"), EMBEDDED, L)),
                HEAD.T,
            ),
        ),
        meanings=FORWARD,
        code="sheepop.models.transformer:TransformerModel.logits",
        line="return self.head(hidden)",
        kids="""
            Words become rows of bricks, and the rows travel along an assembly line with a station for each layer. At
            the end every row is held against a wall of samples, one for each word that there is: the sample that it is
            most like is the guess for what comes next.
        """,
        scientists="""
            Embedding, L blocks, a last norm, and an inner product with a vector for each entry of the vocabulary. All
            places are computed at once, since the mask keeps each from seeing what follows. Where head and embedding
            are tied, the same table reads tokens in and scores them.
        """,
        pitfalls="""
            Leaving the last norm out, without which a pre-norm model's scores have the wrong size; reading the scores
            of place t as those of token t, when they are about token t + 1.
        """,
        source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners; Vaswani et al. 2017",
        sample=sample_run(FORWARD, "Z", positions="learned", norm="rmsnorm"),
    ),
    Formula(
        name="copying",
        title="Copying",
        equation=equals(
            COPIED[t, v],
            sympy.log(
                plus(
                    sympy.exp(ENTRIES[t, v]),
                    over(
                        times(
                            Indicator(sympy.And(s < t, sympy.Eq(FOLLOWER[s], v))),
                            sympy.exp(over(times(ASKED[t, i], FOUND_BY[s, i]), i, WIDTH)),
                        ),
                        s,
                        T,
                    ),
                )
            ),
        ),
        meanings=COPYING,
        code="sheepop.models.copying:Copies.add_to",
        line="both = torch.logaddexp(",
        kids="""
            Somebody who writes about a girl with a rare name does not invent it anew each time. They look up the page
            to where they were about to write a name before, and copy what stands there.
        """,
        scientists="""
            One softmax over entries and places: an entry has its own share and those of all places that it followed.
            What a place is found by are projections of what the head reads there, so that contexts which predict the
            same find each other. Attention can learn to repeat, but its values pass through C numbers a head, and a
            small model needs long to find tokens there again; here what is copied is the token itself.
        """,
        pitfalls="""
            Letting a place offer its own token, or one see itself, whose next token is the one to be guessed; adding
            scores instead of their exponentials, by which a token that stood there twice gets their product; copying
            from another text that shares the row.
        """,
        source="Gu et al. 2016, CopyNet, section 3.3; Merity et al. 2016, Pointer Sentinel; Grave et al. 2016",
        sample=sample_run(COPYING, "Z^C", copy_width=6),
        missing=missing_where_nothing_is_copied,
    ),
)
