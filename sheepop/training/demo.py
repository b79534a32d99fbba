"""The whole path in a few minutes: a corpus that is installed → a trained model → samples → a report."""

from pathlib import Path

from sheepop.data.corpora import installed_files, write_corpus
from sheepop.evaluation.perplexity import evaluate_checkpoint
from sheepop.evaluation.plots import METRICS_FILE
from sheepop.evaluation.report import write_report
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.terminal import load_model_and_tokenizer
from sheepop.models.pretrained import resolve_checkpoint
from sheepop.training.run import start_run
from sheepop.utils.errors import DataError
from sheepop.utils.logging import log


def run_demo(output: Path, *, minutes: float, device: str, data_dir: Path = Path("data")) -> Path:
    """Train the model that the dial chooses for `minutes`, show what it writes, and return the run's folder.

    A folder that already holds a run is left alone; the demo takes the next free name.
    """
    name, text = demo_text(data_dir)
    run = free_name(output)
    log(f"The demo trains a small model on {name} for {minutes:g} minutes. Samples show what it has learned so far.")
    overrides: dict[str, object] = {
        "data.path": str(text),
        "data.data_dir": str(data_dir),
        "training.save_dir": str(run),
        "training.max_minutes": minutes,
        "training.sample_prompt": "ROMEO:\n",
        "training.sample_tokens": 70,
        "data.val_fraction": 0.05,
        "device": device,
    }
    start_run(None, preset=None, overrides=overrides, resume=None)
    checkpoint = resolve_checkpoint(run)
    scores = evaluate_checkpoint(checkpoint, None, device=device)
    report = write_report(run)
    model, tokenizer = load_model_and_tokenizer(checkpoint, device)
    settings = SamplingSettings(temperature=0.7, top_p=0.95)
    generation = complete(model, tokenizer, "", settings, max_new_tokens=150, seed=0, num_samples=2)
    for number, completion in enumerate(generation.completions, start=1):
        print(f"--- sample {number} ---\n{completion.text.strip()}\n")
    print(
        f"On text it has never seen: loss {scores['loss']:.3f} nats per token, perplexity {scores['perplexity']:.1f}, "
        f"{scores['bits_per_byte']:.3f} bits per byte; {scores['accuracy']:.0%} of the next tokens guessed right.\n"
        f"Report with plots: {report}\n\n"
        "Next:\n"
        f'  sheepop generate --checkpoint {run} --prompt "ROMEO:" --temperature 0.8\n'
        f"  sheepop chat --checkpoint {run}\n"
        f"  sheepop evaluate --checkpoint {run}\n"
        "  sheepop train --data my_text.txt --output runs/mine --minutes 10"
    )
    return run


def demo_text(data_dir: Path) -> tuple[str, Path]:
    """Return the name of the demo's corpus and the folder that its text is written to."""
    try:
        installed_files("plays")
    except DataError as error:
        log(f"{error} The demo takes Python's own source instead.")
        name, corpus = "the source of Python's standard library", "python"
    else:
        name, corpus = "Shakespeare's plays", "plays"
    folder = data_dir / corpus
    write_corpus(corpus, folder)
    return name, folder


def free_name(folder: Path) -> Path:
    """Return `folder`, or `folder-2`, `folder-3`, … if it already holds a run."""
    number, candidate = 1, folder
    while (candidate / METRICS_FILE).exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
