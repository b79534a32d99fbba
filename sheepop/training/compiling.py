"""Whether a run's blocks are compiled by torch.compile: where that can be done and the run is long enough to repay it.

Decided once, before the first step, and written into the run's settings as `on` or `off`: compiled code rounds in other
places, so that a resumed run must go the way it began.
"""

from sheepop.models.sizing import training_flops_per_token
from sheepop.training.batches import batch_loader
from sheepop.training.distributed import on_main
from sheepop.training.length import measure_seconds_per_step, total_steps_without_clock
from sheepop.training.state import Run
from sheepop.training.step import train_step
from sheepop.utils.compiled_code import keep_compiled_code, missing_compiler
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import log

# Measured on two cores (`docs/log.md`): a block takes 9 to 15 seconds to compile, whatever its width and the number of
# layers, 2.5 from the cache; a step then takes 0.75 to 1.04 of its time. On a GPU estimates, not measured.
COMPILE_SECONDS = {"cpu": 15.0, "cuda": 40.0}
MOST_SAVED = {"cpu": 0.25, "cuda": 0.5}  # of a step
LEAST_SAVED = 0.03  # else the difference is noise
# A run of fewer operations is over before it is repaid, so that not even a step of it is measured.
LEAST_FLOPS = {"cpu": 2e12, "cuda": 1e15}
MEASURED_STEPS = 5


def decide_compiling(run: Run) -> None:
    """Settle `training.compile`: say what is done and why, and compile the blocks where that is it.

    Raises:
        ConfigError: `on` without a compiler.
    """
    asked, device = run.config.training.compile, run.model.device
    missing = on_main(run.world, lambda: missing_compiler(device))
    if asked == "on" and missing:
        raise ConfigError(
            f"training.compile is on, but {missing}. Install it, or say --training.compile off (auto compiles where it "
            "can). A run that began with compiled code needs --accept-changes for that: it will round in other places."
        )
    decision = not missing and (asked == "on" or (asked == "auto" and pays(run)))
    if decision:
        keep_compiled_code()
    run.model.compile_blocks(decision)
    run.config = run.config.with_training(compile="on" if decision else "off")


def pays(run: Run) -> bool:
    """Say whether the run ends earlier with compiled blocks, by some of its steps made both ways without an update."""
    training, device = run.config.training, run.model.device.type
    steps = steps_left(run)
    if is_over_soon(run):
        return say(run, False, f"{steps} steps of this size are over before it pays")
    eager = measure(run)
    seconds = 60 * (training.max_minutes or 0.0) if steps is None else steps * eager
    if seconds * MOST_SAVED[device] <= COMPILE_SECONDS[device]:
        return say(run, False, f"a run of some {seconds:.0f} seconds is too short to repay it")
    keep_compiled_code()
    run.model.compile_blocks(True)
    try:
        compiled = measure(run)
    except Exception as error:  # a compiler may fail in many ways, and none of them is the user's concern
        return say(run, False, f"the compiler failed: {str(error).strip().splitlines()[0]}")
    times = f"a step takes {compiled * 1000:.3g} ms compiled and {eager * 1000:.3g} ms not"
    return say(run, compiled < (1 - LEAST_SAVED) * eager, times)


def steps_left(run: Run) -> int | None:
    """Return how many steps the run still makes; None where the clock decides."""
    total_steps = total_steps_without_clock(run.config.training, run.sampler.steps_per_epoch)
    return None if total_steps is None else total_steps - run.state.step


def is_over_soon(run: Run) -> bool:
    """Say whether the run has so few operations left that not even a measurement is repaid."""
    training, context, steps = run.config.training, run.config.data.max_length, steps_left(run)
    tokens = training.batch_size * training.gradient_accumulation_steps * context
    flops = tokens * training_flops_per_token(run.config.model, context)
    return steps is not None and steps * flops < LEAST_FLOPS[run.model.device.type]


def measure(run: Run) -> float:
    """Return the median seconds of a step without its update, which changes nothing; on all processes together."""
    batches = batch_loader(run)(run.state.step)
    return measure_seconds_per_step(
        lambda step: train_step(run, batches, step=step, learning_rate=0.0, update=False),
        device=run.model.device,
        first_step=run.state.step,
        seconds=0.0,
        at_least=MEASURED_STEPS,
    )


def say(run: Run, decision: bool, reason: str) -> bool:
    """Return the main process's decision, after it has told it with its reason: clocks differ."""
    decision = on_main(run.world, lambda: decision)
    if run.world.is_main:
        log(f"compile: {'on' if decision else 'off'} ({reason})")
    return decision
