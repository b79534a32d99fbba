"""Schedules: how long the steps are, from the first to the last."""

from collections.abc import Callable

import numpy as np
import sympy

from sheepop.config import TrainingConfig
from sheepop.learn.formula import Formula, Meaning, Value
from sheepop.learn.functions import Nearest
from sheepop.learn.notation import array, cases, equals, plus, ratio, times
from sheepop.training.schedule import learning_rate_at

N = sympy.Symbol("N", integer=True, positive=True)
STEP = sympy.Symbol("n", integer=True)
RATE, PEAK = array("eta", N), sympy.Symbol(r"\eta_{\max}")
WARMUP, FLOOR, FRACTION = sympy.symbols("w r f")
RISING = (times(PEAK, ratio(plus(STEP, 1), WARMUP)), STEP < WARMUP)
MEANINGS = {
    "eta": Meaning("learning rate of each step"),
    PEAK.name: Meaning("its peak"),
    "n": Meaning("number of the step, from 0"),
    "N": Meaning("steps of the run"),
    "w": Meaning("steps of the warm-up"),
    "r": Meaning("last learning rate over the peak"),
}


def sample_schedule(schedule: str) -> Callable[[np.random.Generator], tuple[dict[str, Value], list[float]]]:
    """Return what draws a run and gives its learning rates."""

    def sample(random: np.random.Generator) -> tuple[dict[str, Value], list[float]]:
        steps, floor, fraction = (
            int(random.integers(10, 60)),
            float(random.uniform(0, 0.5)),
            float(random.uniform(0.1, 1)),
        )
        warmup, peak = int(random.integers(0, steps // 2)), float(random.uniform(0.1, 5))
        training = TrainingConfig(
            schedule=schedule,  # type: ignore[arg-type]
            learning_rate=peak,
            warmup_steps=warmup,
            min_learning_rate_ratio=floor,
            decay_fraction=fraction,
        )
        values: dict[str, Value] = {PEAK.name: peak, "w": warmup, "r": floor}
        if schedule == "wsd":
            values["f"] = fraction
        return values, [learning_rate_at(step, steps, training) for step in range(steps)]

    return sample


FORMULAS = (
    Formula(
        name="cosine_schedule",
        title="Cosine schedule",
        equation=equals(
            RATE[STEP],
            cases(
                RISING,
                otherwise=times(
                    PEAK,
                    plus(
                        FLOOR,
                        times(
                            ratio(plus(1, -FLOOR), 2),
                            plus(
                                1,
                                sympy.cos(
                                    times(sympy.pi, ratio(plus(STEP, -WARMUP), plus(N, -1, -WARMUP))),
                                ),
                            ),
                        ),
                    ),
                ),
            ),
        ),
        meanings=MEANINGS,
        code="sheepop.training.schedule:learning_rate_at",
        line="remaining = 0.5 * (1.0 + math.cos(",
        kids="""
            A swing is pushed up, and from the highest point it comes down: slowly at first, fast in the middle, and
            gently at the end. Big strides first to see the land, small ones at last to find the very spot.
        """,
        scientists="""
            Linear warm-up over w steps, while the moments settle, then half a period of a cosine, from the peak at step
            w to r times the peak at step N - 1. Large rates explore and average little; small ones at the end average
            the noise of the gradients out. The end has to be known in advance.
        """,
        pitfalls="""
            Being off by one, so that the last step has not the last rate, or the first step has the rate 0 and does
            nothing; going on after the end, where a whole cosine would rise again.
        """,
        source="Loshchilov and Hutter 2017, SGDR, equation 5, without restarts; warm-up: Goyal et al. 2017",
        sample=sample_schedule("cosine"),
    ),
    Formula(
        name="wsd_schedule",
        title="Warm-up, stable, decay",
        equation=equals(
            RATE[STEP],
            cases(
                RISING,
                otherwise=times(
                    PEAK,
                    plus(
                        FLOOR,
                        times(
                            plus(1, -FLOOR),
                            sympy.Min(
                                1,
                                ratio(plus(N, -1, -STEP), sympy.Max(1, Nearest(times(FRACTION, N)), evaluate=False)),
                                evaluate=False,
                            ),
                        ),
                    ),
                ),
            ),
        ),
        meanings=MEANINGS | {"f": Meaning("share of the run in which the rate falls")},
        code="sheepop.training.schedule:learning_rate_at",
        line="remaining = (total_steps - 1 - place) / decay_steps",
        kids="""
            A train speeds up, rides at full speed for nearly all of the way, and brakes only before the station. If the
            station is moved further out, it simply rides on.
        """,
        scientists="""
            Warm-up, a long plateau at the peak, and a straight line down over the last share f of the steps. The loss
            falls steeply in that last part. A checkpoint from the plateau can be trained on or decayed at any time, so
            the length of the run need not be known until then.
        """,
        pitfalls="""
            Comparing the loss on the plateau with that of a run by cosine, which is at its end; a last part that is too
            short to make use of the smaller steps.
        """,
        source="Hu et al. 2024, MiniCPM, section 4",
        sample=sample_schedule("wsd"),
    ),
)
