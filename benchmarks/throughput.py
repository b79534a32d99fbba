"""Time and memory of a training step at several sizes, and what of a run is not its steps.

    python benchmarks/throughput.py --rounds 3                      # ours, eager and compiled
    python benchmarks/throughput.py --rounds 3 --nanogpt FOLDER     # nanoGPT's model beside it, in turn
    python benchmarks/throughput.py --turns 10 --nanogpt FOLDER     # steps of both in turn, for a noisy machine
    python benchmarks/throughput.py --overhead --text input.txt     # a run of the nano preset
    python benchmarks/throughput.py --device cuda --precision bf16 --batch 32 --ways compiled --nanogpt FOLDER

Each figure is of a process of its own: the median of some steps after the first, and the most memory that it held; with
`--turns` both are in one process and make a step each in turn. On a GPU a figure is of ten steps in a row, and the
memory is that of the GPU's tensors. Both make the same step on random tokens: forward, backward, clipping to 1, AdamW;
nanoGPT's architecture is ours with learned positions and no biases. `of peak` is the share of the operations that the
device can do at best (`peak_flops`), by the same count of the model's operations for both (`training_flops_per_token`).
Idle threads of both wait politely, as the command lets them. `FOLDER` is a checkout of nanoGPT, whose `model.py` is
used as its `train.py` does: on a GPU with TensorFloat-32 for what is left in fp32, and with no loss read from the
device; ours has its loss and its norm queued for Python there, as a run has, which reads them a step later.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch is imported, see `wait_politely`

import torch
from common import alternate, median, on_gpu, seconds_each, show

from sheepop.config import Config, load_config
from sheepop.models.sizing import training_flops_per_token
from sheepop.models.transformer import TransformerModel
from sheepop.training import trainer
from sheepop.training.compiling import keep_compiled_code
from sheepop.training.distributed import World
from sheepop.training.gradient_libraries import WAYS, factors_to_time, faster, make_gradients_by
from sheepop.training.guard import Guard
from sheepop.training.kernels import by_kernels, use_of_kernels
from sheepop.training.late_steps import Refusals
from sheepop.training.optimizer import make_optimizer
from sheepop.training.run import start_run
from sheepop.training.state import Learner, TrainingState
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.devices import BF16, FP32, Precision, peak_flops, resolve_device
from sheepop.utils.memory import peak_resident_bytes
from sheepop.utils.runtime import keep_freed_memory


class Size(NamedTuple):
    """A model, its batch unless another is asked for, and how often its steps are timed."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    entries: int
    timings: int


SIZES = {
    "0.8M": Size(4, 4, 128, 64, 12, 65, 100),
    "10.7M": Size(6, 6, 384, 256, 16, 65, 8),
    "44.6M": Size(6, 8, 512, 512, 8, 50304, 4),
    "124M": Size(12, 12, 768, 1024, 12, 50304, 5),  # GPT-2's smallest, with nanoGPT's batch
}
USUAL_SIZES = {"cpu": ["0.8M", "10.7M", "44.6M"], "cuda": ["124M"]}
PRECISIONS = {precision.name: precision for precision in (FP32, BF16)}
STEPS_BETWEEN_WAITS = {"cpu": 1, "cuda": 10}
OVERHEAD_STEPS = 1000
STEPS_OF_A_RUN = 10**6  # so that what a long run decides is decided


@dataclass(frozen=True)
class Task:
    """A step to be made: of which model, on how many sequences, where and how."""

    size: Size
    batch: int
    device: torch.device
    precision: Precision
    compiled: bool

    def random_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and targets, (B, T) each."""
        shape = (2, self.batch, self.size.context)
        token_ids, targets = torch.randint(0, self.size.entries, shape, device=self.device)
        return token_ids, targets

    def config(self) -> Config:
        """Return our settings for the model."""
        settings = {
            "num_layers": self.size.layers,
            "num_heads": self.size.heads,
            "d_model": self.size.width,
            "max_seq_len": self.size.context,
            "vocab_size": self.size.entries,
            "positions": "learned",
            "dropout": 0.0,
        }
        overrides: dict[str, object] = {f"model.{key}": value for key, value in settings.items()}
        return load_config(overrides=overrides | {"training.precision": self.precision.name})


def task_of(size: str, way: str, options: argparse.Namespace) -> Task:
    """Return the task that the command line means."""
    sizes, device, precision = SIZES[size], resolve_device(options.device), PRECISIONS[options.precision]
    return Task(sizes, options.batch or sizes.batch, device, precision, way == "compiled")


def our_step(task: Task) -> Callable[[], object]:
    """Return a training step of ours."""
    keep_freed_memory()
    config = task.config()
    model = TransformerModel(config.model).to(task.device)
    token_ids, targets = task.random_tokens()
    factors = factors_to_time(model, token_ids.numel()) if task.precision is FP32 else None
    if factors is not None:
        make_gradients_by({setting: faster(setting, factors) for setting in WAYS}, model)
    kernels = use_of_kernels(config, task.device, steps=STEPS_OF_A_RUN)
    model.learn_by_kernels(**by_kernels(kernels))
    if task.compiled:
        keep_compiled_code()
        model.compile_blocks(True)
    learner = Learner(
        config,
        model,
        model,
        make_optimizer(model, config.training),
        task.precision,
        World(),
        "none",
        TrainingState(total_steps=1, data_fingerprint=""),
    )
    micro_batch = MicroBatch(0, token_ids, targets, targets.numel())
    refusals = Refusals(Guard(), config.training, task.device) if task.device.type == "cuda" else None
    return lambda: train_step(learner, [micro_batch], step=0, learning_rate=1e-3, refusals=refusals)


def nanogpt_step(task: Task, checkout: Path) -> Callable[[], object]:
    """Return a training step of nanoGPT, as in its `train.py`."""
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    if task.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    layers, heads, width, context, _, entries, _ = task.size
    config = GPTConfig(
        n_layer=layers, n_head=heads, n_embd=width, block_size=context, vocab_size=entries, dropout=0.0, bias=False
    )
    model = GPT(config).to(task.device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), task.device.type)
    if task.compiled:
        model = torch.compile(model)
    token_ids, targets = task.random_tokens()
    dtype = task.precision.autocast_dtype
    autocast = torch.autocast(task.device.type, dtype, enabled=dtype is not None)

    def step() -> None:
        with autocast:
            _, loss = model(token_ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_here(task: Task, checkout: Path | None) -> None:
    """Print the seconds of a step, the share of the device's peak, and the peak of this process's memory as JSON."""
    torch.manual_seed(0)
    step = our_step(task) if checkout is None else nanogpt_step(task, checkout)
    on_cuda, group = task.device.type == "cuda", STEPS_BETWEEN_WAITS[task.device.type]
    first = seconds_each(step, 1, task.device)
    seconds_each(step, group, task.device)  # still warming up
    seconds = median([seconds_each(step, group, task.device) for _ in range(task.size.timings)])
    peak = torch.cuda.max_memory_allocated(task.device) if on_cuda else peak_resident_bytes()
    flops = task.batch * task.size.context * training_flops_per_token(task.config().model, task.size.context)
    share = flops / seconds / peak_flops(task.device, task.precision.autocast_dtype)
    print(json.dumps({"seconds": seconds, "first": first, "share": share, "peak": peak}))


def measure(size: str, way: str, checkout: Path | None, options: argparse.Namespace) -> dict[str, float]:
    """Return what `measure_here` prints in a process of its own."""
    command = [sys.executable, __file__, "--here", "--sizes", size, "--ways", way]
    command += ["--device", options.device, "--precision", options.precision]
    command += ["--batch", str(options.batch)] if options.batch else []
    command += ["--nanogpt", str(checkout)] if checkout else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def compare(size: str, options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {}

    def contestant(who: str, way: str, checkout: Path | None) -> Callable[[], float]:
        def run() -> float:
            found.setdefault(f"{who} {way}", []).append(measure(size, way, checkout, options))
            return found[f"{who} {way}"][-1]["seconds"]

        return run

    contestants = {}
    for way in options.ways:
        contestants[f"sheepop {way}"] = contestant("sheepop", way, None)
        if options.nanogpt:
            contestants[f"nanoGPT {way}"] = contestant("nanoGPT", way, options.nanogpt)
    results = alternate(contestants, options.rounds)
    context, batch = SIZES[size].context, options.batch or SIZES[size].batch
    rows: list[dict[str, object]] = []
    for who, seconds in results.items():
        peer = results.get(who.replace("sheepop", "nanoGPT")) if "sheepop" in who else None
        ratios = [theirs / ours for ours, theirs in zip(seconds, peer, strict=True)] if peer else []
        rows.append(
            {
                "who": who,
                "ms a step": median(seconds) * 1000,
                "tokens/s": batch * context / median(seconds),
                "of peak": median([one["share"] for one in found[who]]),
                "first step, s": median([one["first"] for one in found[who]]),
                "peak, MiB": median([one["peak"] for one in found[who]]) / 2**20,
                "times nanoGPT": median(ratios) if ratios else "",
                "all": " ".join(f"{value * 1000:.4g}" for value in seconds),
            }
        )
    on = on_gpu(resolve_device(options.device))
    show(f"a training step of {size} parameters, {batch} x {context} tokens, {options.precision}{on}", rows)


def compare_in_turn(size: str, options: argparse.Namespace) -> None:
    """Show the medians of steps of ours and of nanoGPT's made in turn in this process, and that of their ratios."""
    rows: list[dict[str, object]] = []
    for way in options.ways:
        task = task_of(size, way, options)
        torch.manual_seed(0)
        steps = {"sheepop": our_step(task), "nanoGPT": nanogpt_step(task, options.nanogpt)}
        group = STEPS_BETWEEN_WAITS[task.device.type]

        def seconds(step: Callable[[], object], device: torch.device, group: int) -> Callable[[], float]:
            seconds_each(step, 1 + group, device)  # compiles, and warms up
            return lambda: seconds_each(step, group, device)

        results = alternate({who: seconds(step, task.device, group) for who, step in steps.items()}, options.turns)
        ratio = median([theirs / ours for ours, theirs in zip(*results.values(), strict=True)])
        rows += [
            {
                "who": f"{who} {way}",
                "ms a step": median(times) * 1000,
                "tokens/s": task.batch * task.size.context / median(times),
                "times nanoGPT": ratio if who == "sheepop" else "",
            }
            for who, times in results.items()
        ]
    show(f"training steps of {size} parameters in turn, {options.precision}", rows)


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
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: 124M on a GPU, else all but that")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to run in turn with ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch", type=int, help="sequences of a step, instead of the size's own number")
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--turns", type=int, default=0, help="make so many steps each in turn in this process")
    parser.add_argument("--overhead", action="store_true", help="measure a run instead of steps; needs --text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--here", action="store_true", help="measure one contestant in this process")
    options = parser.parse_args()
    sizes = options.sizes or USUAL_SIZES[options.device]
    if options.here:
        measure_here(task_of(sizes[0], options.ways[0], options), options.nanogpt)
    elif options.turns:
        if options.nanogpt is None:
            parser.error("--turns needs --nanogpt")
        for size in sizes:
            compare_in_turn(size, options)
    elif options.overhead:
        if options.text is None:
            parser.error("--overhead needs --text")
        show_overhead(options.text)
    else:
        for size in sizes:
            compare(size, options)


if __name__ == "__main__":
    main()
