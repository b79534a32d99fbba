"""Two checkpoints on the same text."""

from pathlib import Path

from sheepop.evaluation.perplexity import evaluate_checkpoint


def compare_checkpoints(before: Path, after: Path, data: Path) -> str:
    """Score two checkpoints over a text and return a table: what the first has, what the second, and the change.

    Raises:
        CheckpointError, DataError: as `evaluate_checkpoint`.
    """
    scores = [evaluate_checkpoint(checkpoint, data) for checkpoint in (before, after)]
    lines = [f"{'':>16}  {'before':>10}  {'after':>10}  {'change':>9}"]
    for figure in ("perplexity", "bits_per_byte", "accuracy"):
        first, second = (score[figure] for score in scores)
        if first is None or second is None:  # not finite
            lines.append(f"{figure:>16}  {first}  {second}")
            continue
        change = f"{second - first:+.4f}" if figure == "accuracy" else f"{second / first - 1:+.2%}"
        lines.append(f"{figure:>16}  {first:>10.4f}  {second:>10.4f}  {change:>9}")
    return "\n".join(lines)
