"""The exercises of the chapters: the solution passes the check, and a plausible mistake does not."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

CHAPTERS = Path(__file__).parents[2] / "docs" / "chapters"


class Exercise(NamedTuple):
    """The three blocks of code of a chapter's exercise."""

    skeleton: str
    check: str
    solution: str


def exercise_of(page: str) -> Exercise:
    section = page.partition("\n## Exercise\n")[2]
    before, _, hidden = section.partition("<details")
    skeleton, check = re.findall(r"^```py\n(.*?)^```", before, re.DOTALL | re.MULTILINE)
    [solution] = re.findall(r"^```py\n(.*?)^```", hidden, re.DOTALL | re.MULTILINE)
    return Exercise(skeleton, check, solution)


def passes(*parts: str) -> bool:
    """Run the parts behind each other and say whether every `assert` held."""
    try:
        exec(compile("\n".join(parts), "exercise", "exec"), {})
    except (AssertionError, NotImplementedError):
        return False
    return True


# What somebody would write who has fallen into the trap: from the solution, what is replaced and by what.
MISTAKES = {
    "attention": ("/ math.sqrt(queries.shape[-1])", "/ math.sqrt(len(keys))"),
    "block": ("attended + feed_forward(norm(attended))", "attended + feed_forward(norm(stream))"),
    "costs": ("config.num_kv_heads", "config.num_heads"),
    "embedding": ("token_ids == token_id", "token_ids[:1] == token_id"),
    "feed_forward": ("silu(gate) * linear", "silu(gate) * gate"),
    "generation": ("kept = before < p", "kept = before + ordered < p"),
    "loss": ("total / count", "sum(losses) / len(losses)"),
    "normalization": ("numbers.var(correction=0)", "numbers.var()"),
    "optimization": ("m / (1 - beta1**step)", "m"),
    "schedules": ("(step + 1) / warmup", "step / warmup"),
}


@pytest.mark.parametrize("page", sorted(CHAPTERS.glob("*.md")), ids=lambda page: page.stem)
def test_the_solution_passes_and_a_mistake_does_not(page: Path) -> None:
    exercise = exercise_of(page.read_text(encoding="utf-8"))
    right, wrong = MISTAKES[page.stem]
    assert exercise.solution.count(right) == 1
    assert passes(exercise.solution, exercise.check)
    assert not passes(exercise.solution.replace(right, wrong), exercise.check)
    assert not passes(exercise.skeleton, exercise.check)


def test_every_chapter_has_an_exercise_with_a_mistake() -> None:
    assert {page.stem for page in CHAPTERS.glob("*.md")} == set(MISTAKES)
