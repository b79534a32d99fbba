"""Loss: how wrong a guess was, in nats, as a number of choices, and in bits."""

import numpy as np
import sympy
import torch

from sheepop.evaluation.perplexity import bits_per_byte, perplexity
from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.notation import T, V, array, equals, mean, over, ratio, t, times, u
from sheepop.learn.trace import Trace
from sheepop.models.copying import copy_sums
from sheepop.models.head_loss import summed_head_loss
from sheepop.utils.errors import DataError

LOSS, PERPLEXITY, BITS = sympy.symbols(r"ell \mathrm{PPL} \mathrm{BPB}")
NUM_TOKENS, NUM_BYTES = sympy.symbols(r"N_{\mathrm{tokens}} N_{\mathrm{bytes}}")
SCORES, NEXT = array("Z", T, V), array("y", T)


def check_next(run: Trace) -> None:
    """Check that a run has a token to be predicted.

    Raises:
        DataError: it has one token alone.
    """
    if len(run.token_ids) < 2:
        raise DataError("A text of one token has no next one, so there is no loss to see. Trace a longer text.")


def loss_of(run: Trace, _layer: int) -> float:
    """Return the loss that the head finds over a run's text, in nats per token; errors as `check_next`."""
    check_next(run)
    hidden, weight = run["final_norm"][None, :-1], run.model.head.weight.to("cpu")
    inputs, targets = run.token_ids[None, :-1], run.token_ids[None, 1:]
    copied = None
    if run.model.copy_head is not None:
        query, key = (run[f"copying.{name}"][None, :-1] for name in ("query", "key"))
        copied = copy_sums(query, key, inputs, targets)
    with torch.inference_mode():
        return float(summed_head_loss(hidden, weight, targets, copied)) / (len(run.token_ids) - 1)


def guesses(run: Trace, _layer: int) -> torch.Tensor:
    """Return the scores at all places but the last, whose next token nobody knows; errors as `check_next`."""
    check_next(run)
    return run["logits"][:-1]


def sample_loss(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], float]:
    """Return random scores and next tokens, and the loss of a head that makes these scores."""
    hidden, weight = (torch.from_numpy(random.standard_normal(shape)) for shape in ((7, 5), (11, 5)))
    targets = torch.from_numpy(random.integers(11, size=7))
    return {"Z": hidden @ weight.T, "y": targets}, float(summed_head_loss(hidden[None], weight, targets[None])) / 7


def sample_perplexity(random: np.random.Generator) -> tuple[dict[str, float], float]:
    """Return a loss and its perplexity."""
    loss = float(random.uniform(0, 10))
    return {"ell": loss}, perplexity(loss)


def sample_bits(random: np.random.Generator) -> tuple[dict[str, float], float]:
    """Return a loss over a text, and its bits per byte."""
    loss, tokens, num_bytes = (
        float(random.uniform(0, 10)),
        int(random.integers(1, 10**6)),
        int(random.integers(1, 10**6)),
    )
    values = {"ell": loss, NUM_TOKENS.name: tokens, NUM_BYTES.name: num_bytes}
    return values, bits_per_byte(loss, tokens=tokens, num_bytes=num_bytes)


FORMULAS = (
    Formula(
        name="cross_entropy",
        title="Cross-entropy",
        equation=equals(
            LOSS,
            times(
                -1,
                mean(
                    sympy.log(ratio(sympy.exp(SCORES[t, NEXT[t]]), over(sympy.exp(SCORES[t, u]), u, V))),
                    t,
                    T,
                ),
            ),
        ),
        meanings={
            "ell": Meaning("loss in nats per token", value=loss_of),
            "Z": Meaning("scores at each place whose next token is known", value=guesses),
            "y": Meaning("the next token at each place", value=lambda run, _: run.token_ids[1:]),
        },
        code="sheepop.models.head_loss:OperatorHead.score",
        line="losses = -scores.gather(1, wanted)",
        kids="""
            You have a pile of chips and spread them over all words that might come next. Only the chips on the word
            that really comes count: many chips there mean a small penalty, none at all an endless one.
        """,
        scientists="""
            The mean of -ln p over the tokens that came, so the least loss is the greatest likelihood of the text. Its
            expectation is the entropy of the language plus the model's divergence from it, which is why true
            probabilities are the best answer. The gradient by a place's scores is its probabilities, less one at the
            token that came, over T.
        """,
        pitfalls="""
            Comparing place t with token t instead of the next one; taking a mean of means over batches with different
            numbers of real tokens; computing the softmax first and its logarithm after, which loses small
            probabilities.
        """,
        source="Shannon 1948, A Mathematical Theory of Communication; Bengio et al. 2003",
        sample=sample_loss,
    ),
    Formula(
        name="perplexity",
        title="Perplexity",
        equation=equals(PERPLEXITY, sympy.exp(LOSS)),
        meanings={
            PERPLEXITY.name: Meaning("perplexity", value=lambda run, layer: perplexity(loss_of(run, layer))),
            "ell": Meaning("loss in nats per token", value=loss_of),
        },
        code="sheepop.evaluation.perplexity:perplexity",
        line="return math.exp(loss)",
        kids="""
            How many sides has the die that is as hard to guess as the next word? Six means that the model is as unsure
            as you are about a throw; one means that it knows.
        """,
        scientists="""
            The exponential of the cross-entropy, which is the inverse of the geometric mean of the probabilities of
            the tokens that came. A model that spreads evenly over the vocabulary has perplexity V, however wrong that
            is for the text.
        """,
        pitfalls="""
            Comparing models with different tokenizers, whose tokens are not equally long; averaging perplexities, when
            it is the losses that may be averaged; raising 2 to a loss in nats.
        """,
        source="Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks",
        sample=sample_perplexity,
    ),
    Formula(
        name="bits_per_byte",
        title="Bits per byte",
        equation=equals(BITS, times(ratio(LOSS, sympy.log(2)), ratio(NUM_TOKENS, NUM_BYTES))),
        meanings={
            BITS.name: Meaning("bits for each byte of the text"),
            "ell": Meaning("loss in nats per token"),
            NUM_TOKENS.name: Meaning("tokens of the text"),
            NUM_BYTES.name: Meaning("bytes of the same text in UTF-8"),
        },
        code="sheepop.evaluation.perplexity:bits_per_byte",
        line="return loss / math.log(2) * tokens / num_bytes",
        kids="""
            Imagine whispering a story to a friend who guesses along and asks only yes-or-no questions. This is how many
            questions one letter costs on the average, so the fewer, the better the guessing.
        """,
        scientists="""
            The length, per byte, to which an arithmetic coder with this model would compress the text. Tokens are
            counted out of it, so models with different tokenizers can be compared, as long as they read the same bytes.
        """,
        pitfalls="""
            Counting characters instead of bytes, which is the same in English and not in Greek; leaving ln 2 out, which
            gives nats; scoring a part of the text and dividing by the bytes of the whole.
        """,
        source="Shannon 1951, Prediction and Entropy of Printed English; Gao et al. 2020, The Pile",
        sample=sample_bits,
    ),
)
