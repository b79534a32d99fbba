"""Time and memory of a training step at several sizes, and what of a run is not its steps.

    python benchmarks/throughput.py --rounds 3                      # ours, eager and compiled
    python benchmarks/throughput.py --rounds 3 --nanogpt FOLDER     # nanoGPT's model beside it, in turn
    python benchmarks/throughput.py --overhead --text input.txt     # a run of the nano preset

Each figure is of a process of its own: the median of some steps after the first two, and the most memory that it held.
Both make the same step in fp32 on random tokens: forward, backward, clipping to 1, AdamW; nanoGPT's architecture is
ours with learned positions and no biases. Idle threads of both wait politely, as the command lets them. `FOLDER` is a
checkout of nanoGPT, whose `model.py` is used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch is imported, see `wait_politely`

import torch
from common import alternate, median, show

from sheepop.config import load_config
from sheepop.models.transformer import TransformerModel
from sheepop.training import trainer
from sheepop.training.compiling import keep_compiled_code
from sheepop.training.distributed import World
from sheepop.training.optimizer import make_optimizer
from sheepop.training.run import start_run
from sheepop.training.state import Learner, TrainingState
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.devices import FP32
from sheepop.utils.memory import peak_resident_bytes
from sheepop.utils.runtime import keep_freed_memory

# Layers, heads, width, context, batch, entries, and how many steps are timed.
SIZES = {
    "0.8M": (4, 4, 128, 64, 12, 65, 100),
    "10.7M": (6, 6, 384, 256, 16, 65, 8),
    "44.6M": (6, 8, 512, 512, 8, 50304, 4),
}
OVERHEAD_STEPS = 1000


def our_step(size: str, compiled: bool) -> Callable[[], object]:
    """Return a training step of ours."""
    layers, heads, width, context, batch, entries, _ = SIZES[size]
    keep_freed_memory()
    settings = {
        "num_layers": layers,
        "num_heads": heads,
        "d_model": width,
        "max_seq_len": context,
        "vocab_size": entries,
        "positions": "learned",
        "dropout": 0.0,
    }
    config = load_config(overrides={f"model.{key}": value for key, value in settings.items()})
    model = TransformerModel(config.model)
    if compiled:
        keep_compiled_code()
        model.compile_blocks(True)
    learner = Learner(
        config,
        model,
        model,
        make_optimizer(model, config.training),
        FP32,
        World(),
        "none",
        TrainingState(total_steps=1, data_fingerprint=""),
    )
    token_ids, targets = torch.randint(0, entries, (2, batch, context))
    micro_batch = MicroBatch(0, token_ids, targets, targets.numel())
    return lambda: train_step(learner, [micro_batch], step=0, learning_rate=1e-3)


def nanogpt_step(checkout: Path, size: str, compiled: bool) -> Callable[[], object]:
    """Return a training step of nanoGPT, as in its `train.py`."""
    layers, heads, width, context, batch, entries, _ = SIZES[size]
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    config = GPTConfig(
        n_layer=layers, n_head=heads, n_embd=width, block_size=context, vocab_size=entries, dropout=0.0, bias=False
    )
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    if compiled:
        model = torch.compile(model)
    token_ids, targets = torch.randint(0, entries, (2, batch, context))

    def step() -> float:
        _, loss = model(token_ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure_here(size: str, compiled: bool, checkout: Path | None) -> None:
    """Print the seconds of a step and the peak of this process as JSON."""
    torch.manual_seed(0)
    step = our_step(size, compiled) if checkout is None else nanogpt_step(checkout, size, compiled)
    durations = []
    for _ in range(2 + SIZES[size][-1]):
        began = time.perf_counter()
        step()
        durations.append(time.perf_counter() - began)
    result = {"seconds": statistics.median(durations[2:]), "first": durations[0], "peak": peak_resident_bytes()}
    print(json.dumps(result))


def measure(size: str, compiled: bool, checkout: Path | None) -> dict[str, float]:
    """Return what `measure_here` prints in a process of its own."""
    command = [sys.executable, __file__, "--here", "--sizes", size]
    command += ["--compiled"] if compiled else []
    command += ["--nanogpt", str(checkout)] if checkout else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def compare(sizes: list[str], rounds: int, checkout: Path | None) -> None:
    for size in sizes:
        found: dict[str, list[dict[str, float]]] = {}

        def contestant(name: str, compiled: bool, folder: Path | None, size: str = size, found=found):
            def run() -> float:
                found.setdefault(name, []).append(measure(size, compiled, folder))
                return found[name][-1]["seconds"]

            return run

        contestants = {}
        for way in ("eager", "compiled"):
            contestants[f"sheepop {way}"] = contestant(f"sheepop {way}", way == "compiled", None)
            if checkout:
                contestants[f"nanoGPT {way}"] = contestant(f"nanoGPT {way}", way == "compiled", checkout)
        results = alternate(contestants, rounds)
        _, _, _, context, batch, _, _ = SIZES[size]
        rows: list[dict[str, object]] = []
        for who, seconds in results.items():
            peer = results.get(who.replace("sheepop", "nanoGPT")) if checkout and "sheepop" in who else None
            ratios = [theirs / ours for ours, theirs in zip(seconds, peer, strict=True)] if peer else []
            rows.append(
                {
                    "who": who,
                    "ms a step": median(seconds) * 1000,
                    "tokens/s": batch * context / median(seconds),
                    "first step, s": median([one["first"] for one in found[who]]),
                    "peak, MiB": median([one["peak"] for one in found[who]]) / 2**20,
                    "times nanoGPT": median(ratios) if ratios else "",
                    "all": " ".join(f"{value * 1000:.0f}" for value in seconds),
                }
            )
        show(f"a training step of {size} parameters, fp32", rows)


def show_overhead(text: Path) -> None:
    """Train with the nano preset and compare the time in steps with that of the loop around them."""
    in_steps = 0.0
    original = trainer.train_step

    def timed(*values: object, **options: object) -> object:
        nonlocal in_steps
        began = time.perf_counter()
        result = original(*values, **options)  # type: ignore[arg-type]
        in_steps += time.perf_counter() - began
        return result

    trainer.train_step = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.path": str(text),
            "data.data_dir": folder,
            "training.save_dir": f"{folder}/run",
            "training.max_steps": OVERHEAD_STEPS,
            "training.eval_interval": OVERHEAD_STEPS,
            "training.sample_tokens": 0,
            "training.compile": "off",
            "device": "cpu",
        }
        start_run(None, preset="nano", overrides=settings, resume=None)
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    whole = [line["elapsed_seconds"] for line in lines if line["type"] == "train"][-1]
    row = {"steps": OVERHEAD_STEPS, "seconds": whole, "in steps": in_steps, "rest": f"{1 - in_steps / whole:.2%}"}
    show("what of a run is not its steps: loading and logging, without validation", [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to run in turn with ours")
    parser.add_argument("--overhead", action="store_true", help="measure a run instead of steps; needs --text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--here", action="store_true", help="measure one contestant in this process")
    parser.add_argument("--compiled", action="store_true", help="with --here")
    options = parser.parse_args()
    if options.here:
        measure_here(options.sizes[0], options.compiled, options.nanogpt)
    elif options.overhead:
        if options.text is None:
            parser.error("--overhead needs --text")
        show_overhead(options.text)
    else:
        compare(options.sizes, options.rounds, options.nanogpt)


if __name__ == "__main__":
    main()
