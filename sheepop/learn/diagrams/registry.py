"""All diagrams of the documentation, by name; each is made from the code or from a running model when it is asked for.

`docs/generate.py` writes them into the pages; a page whose diagram is not what the code gives fails the tests.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import sheepop
from sheepop.config import ModelConfig, load_config
from sheepop.data import gather, gathered, prepare
from sheepop.generation.engine import generate_cached
from sheepop.generation.generate import generate_naive
from sheepop.learn.diagrams.control_flow import function_diagram, loop_diagram
from sheepop.learn.diagrams.model_diagrams import attention_diagram, block_diagram, stack_diagram
from sheepop.learn.diagrams.module_map import file_map, package_map
from sheepop.learn.diagrams.steps import steps_diagram
from sheepop.training.batches import batch_loader
from sheepop.training.step import train_step
from sheepop.training.trainer import finish_step, steps_of, train

PACKAGE = Path(sheepop.__file__).parent
# Small, and all different, so that each size has a letter of its own.
SIZES: dict[str, object] = {
    "vocab_size": 97,
    "d_model": 48,
    "num_layers": 4,
    "num_heads": 6,
    "d_ff": 80,
    "max_seq_len": 16,
}
# What stands between files and the tokens of a prepared folder: shown by the steps inside.
OPENED = (
    gathered.gather_all,
    gathered._gather_one,
    gather.gather,
    gather._read,
    gather._clean_and_filter,
    prepare._plan_all,
    prepare._train_tokenizer,
)


def example(preset: str, **settings: object) -> ModelConfig:
    """Return the settings of a small model of a preset, some of them changed."""
    return load_config(
        preset=preset, overrides={f"model.{key}": value for key, value in (SIZES | settings).items()}
    ).model


def input_diagram() -> str:
    """Return the way from files of text to the micro-batches of a step."""
    return steps_diagram(prepare.prepare_corpus, batch_loader, opened=OPENED, end="micro-batches")


def all_diagrams(floors: Sequence[Sequence[str]]) -> dict[str, Callable[[], str]]:
    """Return a function that makes the Mermaid text, for each diagram's name.

    Args:
        floors: which packages stand on each floor, the highest first (`package_map`).
    """
    modern = example("modern")
    return {
        "input": input_diagram,
        "stack": lambda: stack_diagram(modern),
        "block": lambda: block_diagram(modern),
        "block-classic": lambda: block_diagram(example("classic")),
        "block-parallel": lambda: block_diagram(example("classic", parallel_residual=True, dropout=0.0)),
        "attention": lambda: attention_diagram(modern),
        "training-loop": lambda: loop_diagram(train),
        "training-steps": lambda: loop_diagram(steps_of),
        "training-step": lambda: function_diagram(train_step),
        "training-pause": lambda: function_diagram(finish_step),
        "generation-naive": lambda: loop_diagram(generate_naive),
        "generation-cached": lambda: loop_diagram(generate_cached),
        "packages": lambda: package_map(PACKAGE, floors),
        **{f"files-{package}": partial(file_map, PACKAGE, package) for package in ("models", "training", "generation")},
    }
