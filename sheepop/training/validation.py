"""What a run does beside learning: it scores held-out text, and writes some of its own."""

from collections.abc import Callable

from sheepop.evaluation.perplexity import Scores, bits_per_byte, evaluate_tokens, perplexity
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.training.distributed import on_main, release_gathered_weights
from sheepop.training.metrics import RunLog
from sheepop.training.state import Run

SAMPLE_SETTINGS = SamplingSettings(temperature=0.8, top_p=0.95)


def validate(run: Run, before_batch: Callable[[], None] | None = None) -> Scores:
    """Score the validation split, or an even spread of `eval_max_tokens` of it, the same at every call.

    Args:
        run: whose model is scored; every process scores all of it, and gets what the main one found.
        before_batch: as in `evaluate_tokens`.
    """
    config = run.config
    try:
        scores = evaluate_tokens(
            run.model,
            run.corpus.split("val").tokens,
            context=config.data.max_length,
            batch_size=config.training.batch_size,
            max_tokens=config.training.eval_max_tokens,
            end_of_text_id=run.tokenizer.end_of_text_id,
            document_mask=config.data.document_mask,
            autocast_dtype=run.precision.autocast_dtype,
            before_batch=before_batch,
        )
    finally:
        release_gathered_weights(run.model)
    # What follows from the scores must be the same everywhere, and unlike processors round differently.
    return on_main(run.world, lambda: scores)


def log_validation(run: Run, run_log: RunLog, scores: Scores) -> None:
    """Write a validation into the record and show it."""
    split, state = run.corpus.split("val"), run.state
    bits = bits_per_byte(scores.loss, tokens=split.num_tokens, num_bytes=split.num_bytes)
    run_log.metrics(
        type="val",
        step=state.step,
        epoch=state.step / run.sampler.steps_per_epoch,
        tokens=state.tokens,
        loss=scores.loss,
        elapsed_seconds=state.elapsed_seconds,
        perplexity=perplexity(scores.loss),
        bits_per_byte=bits,
        accuracy=scores.accuracy,
    )
    run_log.say(
        f"validation at step {state.step}: loss {scores.loss:.4f}, perplexity {perplexity(scores.loss):.1f}, "
        f"{bits:.3f} bits per byte, {scores.accuracy:.1%} of tokens right"
    )


def sample_text(run: Run) -> str:
    """Return what the model writes now; the seed is fixed, so that samples of different steps compare."""
    training = run.config.training
    try:
        generation = complete(
            run.model,
            run.tokenizer,
            training.sample_prompt,
            SAMPLE_SETTINGS,
            max_new_tokens=training.sample_tokens,
            seed=run.config.seed,
        )
    finally:
        release_gathered_weights(run.model)
    return generation.completions[0].text
