"""Optimization: how gradients move the weights."""

from typing import Any

import numpy as np
import sympy
import torch

from sheepop.config import Config, ModelConfig, TrainingConfig
from sheepop.learn.chapters import muon
from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.notation import array, equals, i, j, over, plus, ratio, times
from sheepop.models.transformer import TransformerModel
from sheepop.training.adamw import AdamW
from sheepop.training.distributed import World
from sheepop.training.state import Learner, TrainingState
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.devices import FP32

M, M_BEFORE, M_HAT, V2, V_BEFORE, V_HAT = sympy.symbols(r"m_n m_{n-1} \hat{m}_n v_n v_{n-1} \hat{v}_n")
WEIGHT, WEIGHT_BEFORE, GRADIENT = sympy.symbols(r"\theta_n \theta_{n-1} g_n")
BETA1, BETA2, STEP, RATE, DECAY, EPSILON = sympy.symbols("beta_1 beta_2 n eta lambda epsilon")
N = sympy.Symbol("N", integer=True, positive=True)

TEXTS = {
    M.name: "momentum of each weight: a running mean of its gradients",
    M_BEFORE.name: "momentum one step before, 0 at first",
    M_HAT.name: "momentum, corrected",
    V2.name: "second moment of each weight: a running mean of its squared gradients",
    V_BEFORE.name: "second moment one step before, 0 at first",
    V_HAT.name: "second moment, corrected",
    WEIGHT.name: "the weight after the step",
    WEIGHT_BEFORE.name: "the weight before it",
    GRADIENT.name: "gradient of the loss by the weight",
    "beta_1": "share of the momentum that is kept",
    "beta_2": "share of the second moment that is kept",
    "n": "number of the step, from 1",
    "eta": "learning rate",
    "lambda": "weight decay",
    "epsilon": "a little, so that nothing is divided by 0",
}


def meanings(*symbols: sympy.Symbol) -> dict[str, Meaning]:
    """Return the meanings of these symbols."""
    return {symbol.name: Meaning(TEXTS[symbol.name]) for symbol in symbols}


def adamw_run(random: np.random.Generator, **changed: Any) -> dict[str, Any]:
    """Return what the last of some steps of AdamW found and left, by the formulas' names, in float64."""
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-2, "weight_decay": 0.3} | changed
    weight = torch.from_numpy(random.standard_normal(7))
    optimizer = AdamW([{"params": [weight], **options}])
    steps = int(random.integers(1, 6))
    before: dict[str, Any] = {}
    for _ in range(steps):
        weight.grad = torch.from_numpy(random.standard_normal(7))
        state = optimizer.state[weight] or {"exp_avg": torch.zeros(7), "exp_avg_sq": torch.zeros(7)}
        before = {
            M_BEFORE.name: state["exp_avg"].clone(),
            V_BEFORE.name: state["exp_avg_sq"].clone(),
            WEIGHT_BEFORE.name: weight.clone(),
        }
        optimizer.step()
    state = optimizer.state[weight]
    return before | {
        M.name: state["exp_avg"],
        V2.name: state["exp_avg_sq"],
        WEIGHT.name: weight,
        GRADIENT.name: weight.grad,
        "beta_1": options["betas"][0],
        "beta_2": options["betas"][1],
        "n": steps,
        "eta": options["lr"],
        "lambda": options["weight_decay"],
        "epsilon": options["eps"],
    }


def chosen(found: dict[str, Any], left: sympy.Symbol, *names: sympy.Symbol) -> tuple[dict[str, Any], Any]:
    """Return the values of some symbols, and of the one on the left."""
    return {symbol.name: found[symbol.name] for symbol in names}, found[left.name]


def sample_momentum_correction(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a momentum and what AdamW makes of it, as its step shows where the second moment is one gradient's."""
    found = adamw_run(random, betas=(0.9, 0.0), eps=0.0, weight_decay=0.0)
    moved = found[WEIGHT_BEFORE.name] - found[WEIGHT.name]
    return chosen(found, M, M, BETA1, STEP)[0], moved * abs(found[GRADIENT.name]) / found["eta"]


def sample_second_correction(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a second moment and what AdamW makes of it, as its step shows where the momentum is the gradient."""
    found = adamw_run(random, betas=(0.0, 0.95), eps=0.0, weight_decay=0.0)
    moved = found[WEIGHT_BEFORE.name] - found[WEIGHT.name]
    return chosen(found, V2, V2, BETA2, STEP)[0], (found["eta"] * found[GRADIENT.name] / moved) ** 2


def sample_adamw_update(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return weights and corrected moments, by the formulas before this one, and the weights after the step."""
    found = adamw_run(random)
    for formula in (MOMENTUM_CORRECTION, SECOND_CORRECTION):
        found[formula.left_name] = formula.evaluate({name: found[name] for name in formula.meanings if name in found})
    return chosen(found, WEIGHT, WEIGHT_BEFORE, M_HAT, V_HAT, RATE, DECAY, EPSILON)


class Watching(torch.optim.Optimizer):
    """Keeps the gradients that it is given and moves nothing."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.seen = torch.empty(0)

    def step(self, closure: None = None) -> None:  # type: ignore[override] # noqa: ARG002
        """Keep the gradients."""
        parameters = self.param_groups[0]["params"]
        self.seen = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


def sample_clipping(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the gradient of a step that is not clipped, and of the same step with a limit that is."""
    model = TransformerModel(
        ModelConfig(vocab_size=7, d_model=6, num_layers=1, num_heads=1, max_seq_len=5, dropout=0.0)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(random.standard_normal(tuple(parameter.shape))))
    texts = torch.from_numpy(random.integers(7, size=(2, 6)))
    batch = MicroBatch(0, texts[:, :-1], texts[:, 1:], 10)
    limit = float(random.choice([0.5, 1.0, 100.0]))  # the last one changes nothing

    def gradient(max_grad_norm: float | None) -> torch.Tensor:
        optimizer = Watching(list(model.parameters()))
        config = Config(model=model.config, training=TrainingConfig(max_grad_norm=max_grad_norm))
        state = TrainingState(total_steps=1, data_fingerprint="")
        learner = Learner(config, model, model, optimizer, FP32, World(), "none", state)
        train_step(learner, [batch], step=0, learning_rate=0.0)
        return optimizer.seen

    return {"g": gradient(None), r"g_{\max}": limit, "epsilon": 1e-6}, gradient(limit)


ADAMW, KERNEL = "sheepop.training.adamw:move", "torch._fused_adamw_("
KINGMA = "Kingma and Ba 2015, Adam, algorithm 1"

MOMENTUM_CORRECTION = Formula(
    name="adamw_momentum_correction",
    title="AdamW: correction of the momentum",
    equation=equals(M_HAT, ratio(M, plus(1, -(BETA1**STEP)))),
    meanings=meanings(M_HAT, M, BETA1, STEP),
    code=ADAMW,
    line=KERNEL,
    kids="""
        At the start of a trip the speedometer shows zero and takes a while to catch up. Whoever knows how sluggish it
        is can tell the true speed from the very first second.
    """,
    scientists="""
        Since the running mean begins at 0, after n steps its weights add up to 1 - β₁ⁿ only. Division by that makes it
        a true weighted mean, without bias if the gradients have a constant expectation. With β₁ = 0.9 the correction
        is a factor of 10 at the first step and below 1.01 from the 44th on.
    """,
    pitfalls="""
        Counting steps from 0, which divides by 0; counting micro-batches instead of steps; beginning to count anew
        after a run was resumed.
    """,
    source=f"{KINGMA} and section 3",
    sample=sample_momentum_correction,
)
SECOND_CORRECTION = Formula(
    name="adamw_second_moment_correction",
    title="AdamW: correction of the second moment",
    equation=equals(V_HAT, ratio(V2, plus(1, -(BETA2**STEP)))),
    meanings=meanings(V_HAT, V2, BETA2, STEP),
    code=ADAMW,
    line=KERNEL,
    kids="""
        The same for the gauge that shows how bumpy the road is: it too starts at zero. Believed as it stands, it would
        tell you that the road is smooth, and you would go much too fast.
    """,
    scientists="""
        As for the momentum, with β₂. Without either correction the first step would be (1 - β₁)/√(1 - β₂) times as
        long: 0.45 times at β₁ = 0.9 and β₂ = 0.95, and 3.2 times at β₂ = 0.999, where the bias stays for thousands of
        steps.
    """,
    pitfalls="""
        Correcting one moment and not the other; taking the root first and then dividing by 1 - β₂ⁿ instead of its root.
    """,
    source=f"{KINGMA} and section 3",
    sample=sample_second_correction,
)

FORMULAS = (
    Formula(
        name="adamw_momentum",
        title="AdamW: momentum",
        equation=equals(M, plus(times(BETA1, M_BEFORE), times(plus(1, -BETA1), GRADIENT))),
        meanings=meanings(M, M_BEFORE, GRADIENT, BETA1),
        code=ADAMW,
        line=KERNEL,
        kids="""
            You walk down a mountain in thick fog and feel the slope under your feet. One step alone can mislead, so you
            keep the direction of the last ones in mind and let the new one turn you only a little.
        """,
        scientists="""
            An exponential moving average: the gradient of k steps ago counts β₁ᵏ times as much as the present one. It
            averages out the noise of small batches over about 1/(1 - β₁) steps, and damps the swinging across narrow
            valleys.
        """,
        pitfalls="""
            Leaving the factor 1 - β₁ out, which is another convention (that of SGD with momentum), with steps ten times
            as long at β₁ = 0.9.
        """,
        source=KINGMA,
        sample=lambda random: chosen(adamw_run(random), M, M_BEFORE, GRADIENT, BETA1),
    ),
    Formula(
        name="adamw_second_moment",
        title="AdamW: second moment",
        equation=equals(V2, plus(times(BETA2, V_BEFORE), times(plus(1, -BETA2), GRADIENT**2))),
        meanings=meanings(V2, V_BEFORE, GRADIENT, BETA2),
        code=ADAMW,
        line=KERNEL,
        kids="""
            Some paths are bumpy and some are smooth. A notebook for each path keeps track of how much it shakes you,
            whichever way, so that later you can take small steps on the rough ones.
        """,
        scientists="""
            A running mean of the squared gradient of each weight by itself. It is the uncentred variance: mean squared
            plus variance, so it is large where gradients are large and where they are noisy alike.
        """,
        pitfalls="""
            Keeping it in a type of 16 bits, where small squares become 0; taking β₂ = 0.999 for a run of a few hundred
            steps, whose second moment then never settles.
        """,
        source=KINGMA,
        sample=lambda random: chosen(adamw_run(random), V2, V_BEFORE, GRADIENT, BETA2),
    ),
    MOMENTUM_CORRECTION,
    SECOND_CORRECTION,
    Formula(
        name="adamw_update",
        title="AdamW: the step",
        equation=equals(
            WEIGHT,
            plus(
                times(plus(1, -times(RATE, DECAY)), WEIGHT_BEFORE),
                -times(RATE, ratio(M_HAT, plus(sympy.sqrt(V_HAT), EPSILON))),
            ),
        ),
        meanings=meanings(WEIGHT, WEIGHT_BEFORE, M_HAT, V_HAT, RATE, DECAY, EPSILON),
        code=ADAMW,
        line=KERNEL,
        kids="""
            Now you make the step: in the direction you have in mind, shorter where the ground shakes. And at each step
            a rubber band pulls you a tiny bit back towards where you set out, so that you do not run off for no reason.
        """,
        scientists="""
            Momentum over the root of the second moment is near ±1 where gradients agree and near 0 where they are
            noise, so η is about the largest step of a weight, whatever the scale of the loss. The decay is decoupled:
            it shrinks the weight by ηλ and does not pass through the moments, unlike a penalty in the loss.
        """,
        pitfalls="""
            Adding λθ to the gradient (Adam with L2), which decays weights with large gradients less; decaying norms and
            biases; ε under the root instead of beside it.
        """,
        source="Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2",
        sample=sample_adamw_update,
    ),
    *muon.FORMULAS,
    Formula(
        name="gradient_clipping",
        title="Gradient clipping",
        equation=equals(
            array(r"\hat{g}", N)[i],
            times(
                array("g", N)[i],
                sympy.Min(
                    1,
                    ratio(sympy.Symbol(r"g_{\max}"), plus(sympy.sqrt(over(array("g", N)[j] ** 2, j, N)), EPSILON)),
                    evaluate=False,
                ),
            ),
        ),
        meanings={
            r"\hat{g}": Meaning("gradient that the optimizer is given"),
            "g": Meaning("gradient of all weights, as one long vector"),
            r"g_{\max}": Meaning("norm that it may have"),
            "N": Meaning("weights of the model"),
            "i": Meaning("one of them"),
            "j": Meaning("one of them, to sum over"),
            "epsilon": Meaning("0.000001, so that nothing is divided by 0"),
        },
        code="sheepop.training.step:train_step",
        line="torch.nn.utils.clip_grads_with_norm_(",
        kids="""
            A dog on a leash may run where it likes, as long as it is not too far. If it pulls, the leash keeps the
            direction and shortens the way.
        """,
        scientists="""
            The whole gradient is scaled down to the norm g_max where it is longer; its direction stays, since all
            weights are scaled alike. It bounds what one odd batch can do, at the price of a bias that is small if few
            steps are clipped.
        """,
        pitfalls="""
            Clipping each micro-batch instead of their sum; clipping before the loss scale of fp16 is taken out;
            measuring the norm of each process's part alone.
        """,
        source="Pascanu et al. 2013, On the difficulty of training recurrent neural networks, algorithm 1",
        sample=sample_clipping,
    ),
)
