"""Examples of how a model learns: loss, optimizers, clipping, schedules, curves."""

import base64
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sheepop.config import TrainingConfig
from sheepop.data.dataset import IGNORE_INDEX
from sheepop.evaluation.perplexity import bits_per_byte, perplexity
from sheepop.evaluation.plots import LIGHT, RunRecord, render
from sheepop.models.transformer import TransformerModel
from sheepop.training.muon import orthogonalize
from sheepop.training.optimizer import make_optimizer
from sheepop.training.schedule import learning_rate_at
from worked_examples.run import TINY_CHARACTERS, ExampleRun, record_by_heart, table

ROWS, LENGTH = 8, 32  # of the small batches of these examples
CONTEXT = 5  # tokens before the three that are predicted


def loss(run: ExampleRun) -> str:
    """Three predictions, their loss and its perplexity."""
    start = start_of_words(run)
    ids = run.held_out[start : start + CONTEXT + 3]
    with torch.inference_mode():
        shares = run.model(ids[None, :-1])[0, CONTEXT - 1 :].softmax(dim=-1)  # (3, V)
        targets = ids[1:].clone()
        targets[: CONTEXT - 1] = IGNORE_INDEX
        summed = float(run.model(ids[None, :-1], targets=targets[None]))
    rows, nats = [], []
    for place, target in enumerate(ids[CONTEXT:].tolist()):
        share = float(shares[place, target])
        nats.append(-math.log(share))
        read = " ".join(run.piece(token) for token in ids[: CONTEXT + place].tolist())
        rows.append((read, run.piece(target), f"{share:.2%}", nats[-1]))
    mean = sum(nats) / 3
    assert math.isclose(sum(nats), summed, rel_tol=1e-4)
    num_bytes = len(run.tokenizer.decode(ids[CONTEXT:].tolist()).encode())
    bits = bits_per_byte(mean, tokens=3, num_bytes=num_bytes)
    assert math.isclose(bits * num_bytes, sum(nats) / math.log(2), rel_tol=1e-6)
    return (
        f"Three predictions in text that was held out, about as hard as most:\n\n"
        f"{table(('has read', 'what comes', 'probability p that it gave', '−ln p'), rows)}\n\n"
        f"The loss is the mean of the last column, **{mean:.3f}** nats per token. Its perplexity is "
        f"e^{mean:.3f} = **{perplexity(mean):.1f}**: as unsure as among so many equally likely tokens. The three "
        f"tokens are {num_bytes} bytes of text, so this is {mean:.3f} / ln 2 · 3 / {num_bytes} = **{bits:.3f}** bits "
        "per byte."
    )


def start_of_words(run: ExampleRun) -> int:
    """Return where in the held-out text tokens begin that are all words or parts of them, and about as hard as most."""
    are_words = [run.tokenizer.token_text(token).strip().isalpha() for token in run.held_out.tolist()]
    starts = [place for place in range(len(are_words) - CONTEXT) if all(are_words[place : place + CONTEXT + 3])]
    ids = torch.stack([run.held_out[start : start + CONTEXT + 3] for start in starts[:100]])
    with torch.inference_mode():
        logarithms = run.model(ids[:, :-1])[:, CONTEXT - 1 :].log_softmax(dim=-1)  # (N, 3, V)
    losses = -logarithms.gather(-1, ids[:, CONTEXT:, None]).mean(dim=(1, 2))
    return starts[int((losses - run.record.val[-1]["loss"]).abs().argmin())]


def gradients(run: ExampleRun, model: TransformerModel, start: int) -> Tensor:
    """Make the gradients of a model for a small batch and return their norm."""
    ids = run.held_out[start : start + ROWS * (LENGTH + 1)].view(ROWS, LENGTH + 1)
    model.zero_grad(set_to_none=True)
    (model(ids[:, :-1], targets=ids[:, 1:]) / (ROWS * LENGTH)).backward()
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])


def adamw(run: ExampleRun) -> str:
    """One weight through three steps of AdamW, by the formulas and by the optimizer."""
    model = copy.deepcopy(run.model).train()
    settings = TrainingConfig(learning_rate=1e-3, weight_decay=0.1)
    optimizer = make_optimizer(model, settings)
    weights = model.blocks[0].feed_forward.input.weight
    m = v = 0.0
    rows = []
    for step in (1, 2, 3):
        gradients(run, model, start=300 * step)
        assert weights.grad is not None
        weight, gradient = weights[3, 5].item(), weights.grad[3, 5].item()
        m = settings.beta1 * m + (1 - settings.beta1) * gradient
        v = settings.beta2 * v + (1 - settings.beta2) * gradient**2
        m_hat, v_hat = m / (1 - settings.beta1**step), v / (1 - settings.beta2**step)
        move = m_hat / (math.sqrt(v_hat) + settings.adam_epsilon)
        expected = weight - settings.learning_rate * (move + settings.weight_decay * weight)
        optimizer.step()
        assert math.isclose(weights[3, 5].item(), expected, abs_tol=1e-6)
        numbers = (weight, gradient, m, v, m_hat, v_hat, move, expected)
        rows.append((step, *(f"{number:.4g}".replace("-", "−") for number in numbers)))
    header = ("step", "weight", "gradient g", "m", "v", "m̂", "v̂", "m̂ / √v̂", "weight after")
    return (
        "One weight of the first feed-forward through three steps at rate 0.001 and decay 0.1. In the first step "
        "m̂ / √v̂ is 1 or −1 whatever the gradient: a step of AdamW has the size of the rate, not of the gradient. The "
        f"last column is what the optimizer itself came to, within 1e-6:\n\n{table(header, rows)}"
    )


def muon(run: ExampleRun) -> str:
    """Singular values of a gradient before and behind the Newton–Schulz rounds."""
    model = copy.deepcopy(run.model).train()
    gradients(run, model, start=900)
    gradient = model.blocks[0].attention.output.weight.grad
    assert gradient is not None
    before = torch.linalg.svdvals(gradient)
    after = torch.linalg.svdvals(orthogonalize(gradient[None])[0])
    assert float(after.max()) < 1.3
    assert float(after.max() / after.median()) < float(before.max() / before.median())
    rows = [
        (name, *(f"{float(value):.3g}" for value in (values[0], values[4], values[len(values) // 2])))
        for name, values in (("gradient", before), ("what Muon moves along", after))
    ]
    return (
        f"The gradient of the first attention's output matrix, {gradient.shape[0]} × {gradient.shape[1]}. Few "
        f"directions hold most of it; after five rounds all that hold something count about the same:\n\n"
        f"{table(('singular values', 'largest', 'fifth', 'middle'), rows)}"
    )


def clipping(run: ExampleRun) -> str:
    """Gradients scaled down to a norm."""
    model = copy.deepcopy(run.model).train()
    norm = gradients(run, model, start=1500)
    limit = float(norm) / 2
    weight = model.blocks[0].feed_forward.input.weight
    assert weight.grad is not None
    one_before = float(weight.grad[3, 5])
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert math.isclose(float(after), limit, rel_tol=1e-3)
    rows = [
        ("before", f"{float(norm):.4g}", f"{one_before:.4g}".replace("-", "−")),
        ("after", f"{float(after):.4g}", f"{float(weight.grad[3, 5]):.4g}".replace("-", "−")),
    ]
    return (
        f"A batch's gradients, clipped to half of their norm, {limit:.4g}. All numbers shrink alike, so the direction "
        f"stays:\n\n{table(('', 'norm of all gradients', 'one of them'), rows)}"
    )


def schedule(run: ExampleRun) -> str:
    """The rate of this run at five steps, beside those of other schedules."""
    training, steps = run.config.training, int(run.config.training.max_steps or 0)
    warmup = training.warmup_steps
    places = (0, warmup // 2, warmup, (warmup + steps) // 2, steps - 1)
    kinds = ("cosine", "linear", "wsd")
    rows = []
    for step in places:
        rates = [learning_rate_at(step, steps, training.model_copy(update={"schedule": kind})) for kind in kinds]
        rows.append((step, *(f"{rate:.2e}".replace("-", "−") for rate in rates)))
    peak = training.learning_rate
    assert math.isclose(learning_rate_at(warmup, steps, training), peak)
    assert math.isclose(learning_rate_at(steps - 1, steps, training), peak * training.min_learning_rate_ratio)
    recorded = {line["step"]: line["learning_rate"] for line in run.record.train}
    for step, rate in recorded.items():  # what the run wrote down is what the formula says
        assert math.isclose(rate, learning_rate_at(step - 1, steps, training), rel_tol=1e-6)
    return (
        f"The run behind these pages has {steps} steps, {warmup} of them warm-up, and a peak of {peak:g}. Its schedule "
        f"was cosine; the others would have gone like this:\n\n{table(('step', *kinds), rows)}"
    )


def curves(run: ExampleRun) -> str:
    """Pictures of the run."""
    first, last = run.record.val[0], run.record.val[-1]
    assert last["loss"] < first["loss"] < math.log(run.config.model.vocab_size)
    blind = math.log(run.config.model.vocab_size)
    captions = {
        "loss": f"It begins near ln {run.config.model.vocab_size:,} = {blind:.2f}, blind guessing, and the validation "
        f"ends at {last['loss']:.3f}.",
        "learning_rate": "Up during warm-up, then down along half a cosine.",
        "grad_norm": "High and uneven at first, then quiet.",
    }
    parts = []
    for name, caption in captions.items():
        parts.append(f"{picture(name, run.record)}\n\n*{name.replace('_', ' ')}*: {caption}")
    return f"The curves of a run of seconds, trained on {run.learned_from}:\n\n" + "\n\n".join(parts)


def by_heart(_run: ExampleRun) -> str:
    """The curves of a run on a tiny text."""
    record = record_by_heart()
    steps, losses = zip(*((line["step"], line["loss"]) for line in record.val), strict=True)
    best = losses.index(min(losses))
    trained = record.train[-1]["loss"]
    assert 0 < best < len(losses) - 1  # it turns
    assert losses[-1] > min(losses) + 0.1
    assert trained < losses[-1] - 0.5
    return (
        f"The same model on {TINY_CHARACTERS:,} characters alone, which it reads again and again:\n\n"
        f"{picture('loss', record)}\n\n"
        f"The validation is best at step {steps[best]}, {losses[best]:.3f}, and ends at {losses[-1]:.3f}, while the "
        f"training loss comes down to {trained:.3f}. The run keeps both checkpoints; `--checkpoint` with the run's "
        "folder takes the best."
    )


def picture(name: str, record: RunRecord) -> str:
    """Return one of a run's pictures for a page, inside of it."""
    drawn = base64.b64encode(render(name, record, LIGHT)).decode()
    return f'<img src="data:image/png;base64,{drawn}" alt="{name.replace("_", " ")} of the run">'


EXAMPLES: dict[str, tuple[str, Callable[[ExampleRun], str]]] = {
    "loss": ("three predictions, their loss, perplexity and bits per byte", loss),
    "adamw": ("one weight through three steps of AdamW", adamw),
    "muon": ("the singular values of a gradient before and behind Muon's rounds", muon),
    "clipping": ("a batch's gradients before and behind clipping", clipping),
    "schedule": ("the learning rate of a run at five steps, under three schedules", schedule),
    "by_heart": ("the loss of a run that learns a tiny text by heart", by_heart),
    "curves": ("loss, learning rate and gradient norm of a whole run, drawn", curves),
}
