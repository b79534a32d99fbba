"""Generation: from scores to the next token."""

import math
from collections.abc import Callable

import numpy as np
import sympy
import torch

from sheepop.generation.sampling import SamplingSettings, distribution, keep_top_k, keep_top_p, sample_token
from sheepop.learn.formula import Formula, Meaning, Value
from sheepop.learn.functions import ArgMax, Indicator
from sheepop.learn.notation import V, array, cases, equals, i, over, plus, ratio, times, u, v
from sheepop.learn.trace import Trace

SCORES, LEFT, PROBABILITIES, DRAWS = array("Z", V), array("Y", V), array("P", V), sympy.IndexedBase("e")
TOKEN, TEMPERATURE, COUNT, MASS = sympy.symbols("x tau k p")
BLOCK, NUM_BLOCKS, WIDTH = sympy.symbols("b n w", integer=True, positive=True)
NOTHING = torch.empty(0, dtype=torch.int64)  # no token was said before

# What a trace shows the formulas with.
WARMTH, BEST, NUCLEUS, MOST_LIKELY = 0.8, 5, 0.9, 4096


def last_scores(run: Trace) -> torch.Tensor:
    """Return the scores for what follows the text, (V,), in float32, which is what is drawn from."""
    return run["logits"][-1].float()


def likely_scores(run: Trace) -> torch.Tensor:
    """Return the scores of the most likely entries, in the vocabulary's order: each is compared with all others."""
    scores = last_scores(run)
    return scores[scores.topk(min(MOST_LIKELY, len(scores))).indices.sort().values]


def width_of(vocab_size: int) -> int:
    """Return how many entries a block has."""
    return math.ceil(math.sqrt(vocab_size))


def race_values(scores: torch.Tensor, temperature: float) -> dict[str, Value]:
    """Return what a race is run with, whose draws are those of a generator that begins with seed 0."""
    width = width_of(len(scores))
    num_blocks = math.ceil(len(scores) / width)
    draws = torch.empty(num_blocks + width).exponential_(generator=torch.Generator().manual_seed(0))
    return {"Z": scores, "tau": temperature, "e": draws, "n": num_blocks, "w": width}


def draw(scores: torch.Tensor, temperature: float) -> int:
    """Return the token that is drawn with these numbers."""
    return sample_token(scores, SamplingSettings(temperature), torch.Generator().manual_seed(0))


def warm(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probabilities that a token is drawn with."""
    return distribution(scores, SamplingSettings(temperature), NOTHING)


def random_scores(random: np.random.Generator) -> torch.Tensor:
    """Return scores of 19 entries, no two alike."""
    return torch.from_numpy(random.normal(0, 2, 19)).float()


def block_drawn(scores: torch.Tensor, temperature: float) -> int:
    """Return the block of the token that is drawn."""
    return draw(scores, temperature) // width_of(len(scores))


def sample_heat(random: np.random.Generator) -> tuple[dict[str, Value], int]:
    """Return what a race is run with, and the block that wins."""
    scores, temperature = random_scores(random), float(random.choice([0.5, 1.0, 1.7]))
    return race_values(scores, temperature), block_drawn(scores, temperature)


def sample_step(random: np.random.Generator) -> tuple[dict[str, Value], int]:
    """Return the same at a temperature that is 0 at times, the block that has won, and the token drawn."""
    scores, temperature = random_scores(random), float(random.choice([0.0, 0.5, 1.0, 1.7]))
    values = race_values(scores, temperature) | {"b": block_drawn(scores, temperature)}
    return values, draw(scores, temperature)


def sample_softmax(random: np.random.Generator) -> tuple[dict[str, Value], torch.Tensor]:
    """Return scores and a temperature, and the probabilities."""
    scores, temperature = random_scores(random), float(random.uniform(0.3, 2))
    return {"Z": scores, "tau": temperature}, warm(scores, temperature)


def sample_top_k(random: np.random.Generator) -> tuple[dict[str, Value], torch.Tensor]:
    """Return scores and k, and the scores that are left."""
    scores, count = random_scores(random), int(random.integers(1, 19))
    return {"Z": scores, "k": count}, keep_top_k(scores, count)


def sample_top_p(random: np.random.Generator) -> tuple[dict[str, Value], torch.Tensor]:
    """Return scores, their probabilities and p, and the scores that are left."""
    scores, mass = random_scores(random), float(random.uniform(0.3, 0.99))
    return {"Z": scores, "P": scores.double().softmax(0), "p": mass}, keep_top_p(scores, mass)


def shown(text: str, value: Callable[[Trace], Value]) -> Meaning:
    """Return the meaning of what does not depend on a layer."""
    return Meaning(text, value=lambda run, _: value(run))


SEEN = shown("scores for what follows the text", last_scores)
LIKELY = shown(f"scores for what follows the text; of the {MOST_LIKELY} likeliest where a run is shown", likely_scores)
TAU = shown(f"temperature; {WARMTH} where a run is shown", lambda _: WARMTH)


def raced(name: str) -> Callable[[Trace], Value]:
    """Return what finds one of the values that a race is run with."""
    return lambda run: race_values(last_scores(run), WARMTH)[name]


RACE = {
    "e": shown(
        "draws from the exponential distribution of mean 1: one for each block, then one for each entry of a block",
        raced("e"),
    ),
    "n": shown("number of blocks", raced("n")),
    "w": shown("entries of a block, the root of V rounded up", raced("w")),
}
MADDISON = "Gumbel 1954; Maddison et al. 2014, A* Sampling, section 2"
HOLTZMAN = "Holtzman et al. 2020, The Curious Case of Neural Text Degeneration"

FORMULAS = (
    Formula(
        name="generation_heat",
        title="One step of writing: the first heat",
        equation=equals(
            BLOCK,
            ArgMax(
                plus(
                    sympy.log(
                        over(
                            times(Indicator(sympy.Eq(sympy.floor(v / WIDTH), i)), sympy.exp(SCORES[v] / TEMPERATURE)),
                            v,
                            V,
                        )
                    ),
                    -sympy.log(DRAWS[i]),
                ),
                i,
                NUM_BLOCKS,
            ),
        ),
        meanings={
            "b": shown("the block that wins", lambda run: block_drawn(last_scores(run), WARMTH)),
            "Z": SEEN,
            "tau": TAU,
            **RACE,
        },
        code="sheepop.generation.sampling:race",
        line="winner = (weights.log_()",
        kids="""
            So many words want to race that the track is too narrow. So they form teams of neighbours, and the teams run
            first. A team's head start is as large as all that the model likes in it, and a bit of luck is added.
        """,
        scientists="""
            Minus the logarithm of an exponential draw has Gumbel's distribution, and the argmax of scores with such
            noise is an exact draw from their softmax (the Gumbel-max trick). The score of a block is the logarithm of
            the sum of its entries' powers, so a block wins with the probability that they have together.
        """,
        pitfalls="""
            Taking a block's largest score in place of the sum; using the same random numbers for all texts of a batch.
        """,
        source=MADDISON,
        sample=sample_heat,
    ),
    Formula(
        name="generation_step",
        title="One step of writing",
        equation=equals(
            TOKEN,
            cases(
                (ArgMax(SCORES[v], v, V), sympy.Eq(TEMPERATURE, 0)),
                otherwise=plus(
                    times(WIDTH, BLOCK),
                    ArgMax(
                        plus(
                            SCORES[plus(times(WIDTH, BLOCK), i)] / TEMPERATURE, -sympy.log(DRAWS[plus(NUM_BLOCKS, i)])
                        ),
                        i,
                        WIDTH,
                    ),
                ),
            ),
        ),
        meanings={
            "x": shown("the next token", lambda run: draw(last_scores(run), WARMTH)),
            "Z": SEEN,
            "tau": TAU,
            "b": shown("the block that won the first heat", lambda run: block_drawn(last_scores(run), WARMTH)),
            **RACE,
        },
        code="sheepop.generation.sampling:race",
        line="return winner * width",
        kids="""
            Now the words of the winning team race alone, each with a head start as large as the model likes it and a
            bit of luck, and whoever comes in first is written down. Without luck the favourite wins always.
        """,
        scientists="""
            The same trick inside of the block, so that an entry is drawn with its block's probability times its own
            within it: exactly its softmax, from some 2√V random numbers in place of V. The chosen token goes behind the
            text, and the model is asked again.
        """,
        pitfalls="""
            Taking the scores at another place than the last one of the text, such as at the end of a padded row;
            dividing by a temperature of 0, which has to be the argmax instead.
        """,
        source=MADDISON,
        sample=sample_step,
    ),
    Formula(
        name="temperature_softmax",
        title="Softmax with temperature",
        equation=equals(
            PROBABILITIES[v],
            ratio(sympy.exp(SCORES[v] / TEMPERATURE), over(sympy.exp(SCORES[u] / TEMPERATURE), u, V)),
        ),
        meanings={
            "P": shown("probability of each entry", lambda run: warm(last_scores(run), WARMTH)),
            "Z": SEEN,
            "tau": TAU,
        },
        code="sheepop.generation.sampling:distribution",
        line=".softmax(dim=-1)",
        kids="""
            Think of a landscape of clay with one hill for each word. Cool it and the highest hill grows into a tower;
            warm it and all of it melts towards a plain, where any word may be stepped on.
        """,
        scientists="""
            Boltzmann's distribution with energies -Z. As τ goes to 0 all probability comes to the largest score, with
            τ = 1 it is the model's own distribution, and for large τ it becomes even. The order of the entries never
            changes, only the ratios: the odds of two entries are raised to the power 1/τ.
        """,
        pitfalls="""
            Multiplying by τ; dividing by a τ of 0, which has to be the argmax instead; applying it after top-p, which
            then keeps another set.
        """,
        source="Ackley et al. 1985, A Learning Algorithm for Boltzmann Machines",
        sample=sample_softmax,
    ),
    Formula(
        name="top_k",
        title="Top-k",
        equation=equals(
            LEFT[v], cases((SCORES[v], over(Indicator(SCORES[u] > SCORES[v]), u, V) < COUNT), otherwise=-sympy.oo)
        ),
        meanings={
            "Y": shown("scores that are left to draw from", lambda run: keep_top_k(likely_scores(run), BEST)),
            "Z": LIKELY,
            "k": shown(f"how many are kept; {BEST} where a run is shown", lambda _: BEST),
        },
        code="sheepop.generation.sampling:keep_top_k",
        line="descending = logits.topk(k, dim=-1).values",
        kids="""
            Only the k fastest runners of the training may start in the race. A very slow one could win by sheer luck
            otherwise, and the story would take a strange turn.
        """,
        scientists="""
            An entry stays if fewer than k have a higher score. The tail of a large vocabulary holds many unlikely
            tokens whose probabilities add up and are badly estimated; cutting it off trades variety for sense. Of equal
            scores the entries with lower numbers are kept.
        """,
        pitfalls="""
            Keeping all entries that equal the k-th score, which can be many more than k, for instance after rounding to
            16 bits; a fixed k where sometimes one token and sometimes a hundred make sense.
        """,
        source="Fan et al. 2018, Hierarchical Neural Story Generation",
        sample=sample_top_k,
    ),
    Formula(
        name="top_p",
        title="Top-p",
        equation=equals(
            LEFT[v],
            cases(
                (
                    SCORES[v],
                    over(times(Indicator(PROBABILITIES[u] > PROBABILITIES[v]), PROBABILITIES[u]), u, V) < MASS,
                ),
                otherwise=-sympy.oo,
            ),
        ),
        meanings={
            "Y": shown("scores that are left to draw from", lambda run: keep_top_p(likely_scores(run), NUCLEUS)),
            "Z": LIKELY,
            "P": shown("probability of each entry", lambda run: likely_scores(run).double().softmax(0)),
            "p": shown(f"probability to be reached; {NUCLEUS} where a run is shown", lambda _: NUCLEUS),
        },
        code="sheepop.generation.sampling:keep_top_p",
        line="count = (mass < p).sum(",
        kids="""
            Fill a jug with the largest glasses first and stop as soon as it holds enough. Sometimes one big glass will
            do, sometimes it takes twenty small ones; the drops that are left stay on the table.
        """,
        scientists="""
            The smallest set of most likely entries whose probability reaches p: an entry stays if those more likely
            than it do not reach p yet. Its size follows the model's certainty, unlike that of top-k. The most likely
            entry always stays.
        """,
        pitfalls="""
            Dropping the entry that crosses p, which leaves nothing when the first one alone does; adding the
            probabilities up in a type of 16 bits.
        """,
        source=HOLTZMAN,
        sample=sample_top_p,
    ),
)
