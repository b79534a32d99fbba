"""The command line: one function per command, no logic of its own.

Heavy imports wait inside the commands, so that `--help` answers at once.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sheepop.utils.errors import SheepopError
from sheepop.utils.files import full_disk_is_a_clear_error
from sheepop.utils.logging import log
from sheepop.utils.runtime import (
    collecting_rarely,
    end_at_once_among_others,
    end_without_a_search,
    hide_remark_on_norms,
    wait_politely,
)

app = typer.Typer(
    name="sheepop",
    help="From any pile of text to a trained, measured and talking language model, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Checkpoint = Annotated[Path, typer.Option(help="checkpoint folder, or a run's folder (its best checkpoint)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
Data = Annotated[Path | None, typer.Option(help="text files, folders, or a prepared folder")]
ConfigFile = Annotated[Path | None, typer.Option(help="JSON file with settings")]
Preset = Annotated[str | None, typer.Option(help="named settings: classic, modern, gpt2, nano")]
MINUTES = "be done in this time, start and end included; without --config and --preset also choose all else for it"
Bits = Literal["int8", "int4"]
CacheBits = Literal["int8"]
Optimized = Annotated[
    bool, typer.Option("--optimized/--no-optimized", help="with a cache of keys and values, or the naive way")
]
Quantize = Annotated[
    Bits | None, typer.Option(help="round the weights to fewer bits first: less memory, and faster on a CPU")
]
Cache = Annotated[
    CacheBits | None,
    typer.Option(help="keep keys and values in 8 bits: a third of the memory, slower, and the text may differ"),
]
Speculate = Annotated[
    str | None,
    typer.Option(help="guess tokens ahead and check them: lookup, or the checkpoint of a small model (PATH)"),
]
Compiles = Annotated[
    bool,
    typer.Option("--compile", help="compile the whole step of a token first, which takes half a minute and is kept"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON value to standard output")]


class SettingsCommand(typer.core.TyperCommand):
    """A command that also takes every setting as `--section.key value`; its help lists them."""

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """List the settings after the options, from the same descriptions as `docs/settings.md`."""
        from sheepop.config import describe_settings

        with formatter.section("Settings (defaults < preset or file < command line)"):
            formatter.write_dl(
                [(f"--{name}", f"{text} [{kind}; {default}]") for name, kind, default, text in describe_settings()]
            )


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="minutes of training")] = 2.8,
    output: Annotated[Path, typer.Option(help="the run's folder")] = Path("runs/demo"),
    device: Device = None,
) -> None:
    """Train a small model on Shakespeare's plays before your eyes, then show what it learned."""
    from sheepop.training.demo import run_demo

    run_demo(output, minutes=minutes, device=device or "auto")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="name of a corpus, or `list`")],
    version: Annotated[str | None, typer.Option(help="which version, for instance 103 for wiki")] = None,
    data_dir: Annotated[Path, typer.Option(help="folder to write to")] = Path("data"),
    max_bytes: Annotated[int | None, typer.Option(help="a slice: stop after about this many bytes of text")] = None,
    max_documents: Annotated[int | None, typer.Option(help="a slice: stop after this many documents")] = None,
) -> None:
    """Fetch a named corpus as text; `list` shows their names and licences."""
    from sheepop.data.download import download as fetch
    from sheepop.data.download import list_corpora

    if name == "list":
        print(list_corpora())
    else:
        print(fetch(name, version=version, data_dir=data_dir, max_bytes=max_bytes, max_documents=max_documents))


@app.command()
def inspect(
    sources: Annotated[list[Path], typer.Argument(help="files of text of many kinds, and folders that hold some")],
    tokenizer: Annotated[
        list[Path] | None, typer.Option(help="PATH of a tokenizer to compare with; may be repeated")
    ] = None,
    document_separator: Annotated[str, typer.Option(help="text that ends a document in a file")] = "<|endoftext|>",
    val_fraction: Annotated[float, typer.Option(help="share of the text that would be held out")] = 0.1,
    max_bytes: Annotated[int | None, typer.Option(help="stop after about this many bytes of text")] = None,
    include: Annotated[list[str] | None, typer.Option(help="only files of folders that match, such as *.md")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="no files of folders that match")] = None,
    seed: Annotated[int, typer.Option(help="seed of the split")] = 42,
    html: Annotated[Path | None, typer.Option(help="write a page with plots to this file too")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a text before training: sizes, duplicates, languages, tokens, and what model it can feed."""
    from sheepop.data.inspection import inspect_sources
    from sheepop.data.inspection_table import format_inspection

    result = inspect_sources(
        sources,
        tokenizers=tokenizer or (),
        separator=document_separator or None,
        max_bytes=max_bytes,
        include=include or (),
        exclude=exclude or (),
        val_fraction=val_fraction,
        seed=seed,
    )
    if html is not None:
        from sheepop.evaluation.inspection_page import write_inspection_page

        write_inspection_page(result, html)
        log(f"the page: {html}")
    print(json.dumps(result, ensure_ascii=False) if as_json else format_inspection(result))


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="files of text of many kinds, and folders that hold some")],
    output: Annotated[Path, typer.Option(help="the prepared folder")],
    tokenizer: Annotated[str, typer.Option(help="bpe, char, word, or the PATH of a tokenizer")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="entries of a tokenizer that is trained")] = 8192,
    val_fraction: Annotated[float, typer.Option(help="share of the text held out to validate")] = 0.1,
    document_separator: Annotated[str, typer.Option(help="text that ends a document in a file")] = "<|endoftext|>",
    cleaning: Annotated[
        str,
        typer.Option(help="none; standard: line ends, control characters, spaces; repair: wrongly decoded text too"),
    ] = "standard",
    deduplicate: Annotated[
        str, typer.Option(help="none; exact: drop identical documents; near: drop similar ones too")
    ] = "exact",
    near_threshold: Annotated[
        float, typer.Option(help="share of common word sequences from which texts are similar")
    ] = 0.8,
    min_characters: Annotated[int, typer.Option(help="drop shorter documents")] = 0,
    max_characters: Annotated[int | None, typer.Option(help="drop longer documents")] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="drop documents that read like lists, menus or noise")
    ] = False,
    language: Annotated[list[str] | None, typer.Option(help="keep this language, such as en; may be repeated")] = None,
    pii: Annotated[str, typer.Option(help="personal data: keep, replace, or drop the document")] = "keep",
    weight: Annotated[
        list[str] | None, typer.Option(help="SOURCE=W: use its documents W times, such as 2 or 0.5; may be repeated")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="only files of folders that match, such as *.md")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="no files of folders that match")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="a file that cannot be read is an error")] = False,
    seed: Annotated[int, typer.Option(help="seed of the split")] = 42,
    workers: Annotated[int | None, typer.Option(help="processes (default: one a core, one for little text)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a prepared folder")] = False,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="keep the work, so that with more files only these are worked on")
    ] = False,
) -> None:
    """Turn documents into token shards, a tokenizer and a manifest."""
    from sheepop.data.filters import FilterSettings
    from sheepop.data.prepare import prepare_corpus
    from sheepop.data.selection import Selection, parse_weights

    # FilterSettings and Selection check the words themselves, and say which are allowed.
    filters = FilterSettings(min_characters, max_characters, quality, tuple(language or ()), pii)  # type: ignore[arg-type]
    selection = Selection(
        cleaning=cleaning,  # type: ignore[arg-type]
        deduplicate=deduplicate,  # type: ignore[arg-type]
        near_threshold=near_threshold,
        filters=filters,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        strict=strict,
        weights=parse_weights(weight or []),
    )
    corpus = prepare_corpus(
        sources,
        output,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        seed=seed,
        separator=document_separator or None,
        selection=selection,
        overwrite=overwrite,
        incremental=incremental,
        num_workers=workers,
    )
    print(corpus.path)


@app.command(cls=SettingsCommand, context_settings=SETTINGS)
def train(
    context: typer.Context,
    data: Data = None,
    config: ConfigFile = None,
    preset: Preset = None,
    output: Annotated[Path | None, typer.Option(help="the run's folder")] = None,
    resume: Annotated[str | None, typer.Option(help="auto, or the PATH of a checkpoint or run")] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="resume even though settings or text differ")
    ] = False,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="seed of every random choice")] = None,
    minutes: Annotated[float | None, typer.Option(help=MINUTES)] = None,
    init_from: Annotated[Path | None, typer.Option(help="begin with the model of this checkpoint or run")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="show where the time of some steps goes, with a trace in RUN/profile")
    ] = False,
) -> None:
    """Train a model on text; every setting can be given as --section.key VALUE."""
    from sheepop.config import parse_overrides
    from sheepop.training.distributed import is_main_process
    from sheepop.training.run import start_run
    from sheepop.utils.runtime import perf_counter_at_start

    named = {
        "data.path": data and str(data),
        "training.save_dir": output and str(output),
        "device": device,
        "seed": seed,
        "training.max_minutes": minutes,
        "training.init_from": init_from and str(init_from),
    }
    overrides = parse_overrides(context.args) | {key: value for key, value in named.items() if value is not None}
    run = start_run(
        config,
        preset=preset,
        overrides=overrides,
        resume=resume,
        accept_changes=accept_changes,
        profile=profile,
        began=perf_counter_at_start(),
    )
    if is_main_process():
        print(run)


@app.command(cls=SettingsCommand, context_settings=SETTINGS)
def plan(
    context: typer.Context,
    data: Data = None,
    config: ConfigFile = None,
    preset: Preset = None,
    output: Annotated[Path | None, typer.Option(help="the run's folder, for the disk that it is on")] = None,
    device: Device = None,
    minutes: Annotated[float | None, typer.Option(help=MINUTES)] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate parameters, FLOPs, memory, time and disk of a run before it, in some seconds."""
    from sheepop.config import parse_overrides
    from sheepop.training.plan_table import format_plan
    from sheepop.training.rehearsal import make_plan

    named = {
        "data.path": data and str(data),
        "training.save_dir": output and str(output),
        "device": device,
        "training.max_minutes": minutes,
    }
    overrides = parse_overrides(context.args) | {key: value for key, value in named.items() if value is not None}
    result = make_plan(config, preset=preset, overrides=overrides)
    print(json.dumps(result.to_json(), ensure_ascii=False) if as_json else format_plan(result))


@app.command(name="verify-resume", cls=SettingsCommand, context_settings=SETTINGS)
def verify_resume(
    context: typer.Context,
    data: Data = None,
    config: ConfigFile = None,
    preset: Preset = None,
    steps: Annotated[int, typer.Option(help="steps of the straight run")] = 20,
    output: Annotated[Path | None, typer.Option(help="folder to keep the runs in (default: they are removed)")] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="seed of every random choice")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove on your own settings and text that an interrupted run ends like an undisturbed one."""
    from sheepop.config import parse_overrides
    from sheepop.training.verify import format_verdict, prove_resume

    named = {"data.path": data and str(data), "device": device, "seed": seed}
    overrides = parse_overrides(context.args) | {key: value for key, value in named.items() if value is not None}
    result = prove_resume(config, preset=preset, overrides=overrides, steps=steps, output=output)
    print(json.dumps(result, ensure_ascii=False) if as_json else format_verdict(result))
    sys.exit(0 if result["equal"] else 1)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Data = None,
    context: Annotated[
        int | None, typer.Option(help="tokens of a window (default: as in training, or all that the model sees)")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="score with overlapping windows this far apart (default: no overlap)")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="windows per forward pass")] = 16,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on the whole held-out split, or on other text."""
    from sheepop.evaluation.perplexity import evaluate_checkpoint
    from sheepop.models.pretrained import resolve_checkpoint

    result = evaluate_checkpoint(
        resolve_checkpoint(checkpoint),
        data,
        device=device or "auto",
        context=context,
        stride=stride,
        batch_size=batch_size,
    )
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for key, value in result.items():
            print(f"{key:>16}  {f'{value:.4f}' if isinstance(value, float) else value}")


@app.command()
@collecting_rarely()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="text to continue (default: begin a document)")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL file of prompts, each line {"prompt": TEXT} and options of its own')
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSONL file for the completions of --prompts; the folder of --benchmark")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "--max-length", help="tokens to write")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="choose among this many tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="choose among tokens that hold this share of probability")] = 0.95,
    min_p: Annotated[float, typer.Option(help="drop tokens below this share of the likeliest one's probability")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1: avoid tokens that were used")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be repeated")] = None,
    seed: Annotated[int, typer.Option(help="same seed, same text")] = 42,
    num_samples: Annotated[int, typer.Option(help="number of completions")] = 1,
    optimized: Optimized = True,
    compiles: Compiles = False,
    quantize: Quantize = None,
    cache: Cache = None,
    speculate: Speculate = None,
    json_schema: Annotated[Path | None, typer.Option(help="file of a JSON schema that the output follows")] = None,
    regex: Annotated[str | None, typer.Option(help="regular expression that the whole output follows")] = None,
    grammar: Annotated[Path | None, typer.Option(help="file of a Lark grammar that the output follows")] = None,
    batch_size: Annotated[int, typer.Option(help="completions of --prompts that are written at the same time")] = 16,
    benchmark: Annotated[
        bool,
        typer.Option(
            "--benchmark",
            help="compare the naive way with the optimized one; table and plots go to the folder --output",
        ),
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Let a model continue a text, or every text of a file (which goes on where it was interrupted)."""
    from sheepop.generation.sampling import SamplingSettings
    from sheepop.generation.terminal import check_combination, generate_from_file, generate_text, read_grammar

    if benchmark:
        folder = output or Path("generation_benchmark")
        compare_generation(checkpoint, folder, max_new_tokens, quantize, device, compiles=compiles)
        return
    settings = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    followed = read_grammar(json_schema, regex, grammar)
    check_combination(
        prompt=prompt,
        prompts=prompts,
        output=output,
        optimized=optimized,
        speculate=speculate,
        grammar=followed,
        int8_cache=cache is not None,
        compiles=compiles,
    )
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "num_samples": num_samples,
        "stop": stop or [],
        "quantization": quantize,
        "speculate": speculate,
        "grammar": followed,
        "int8_cache": cache is not None,
        "device": device or "auto",
        "as_json": as_json,
    }
    if prompts is not None and output is not None:
        generate_from_file(checkpoint, prompts, output, settings, batch_size=batch_size, **common)
    else:
        generate_text(checkpoint, prompt or "", settings, optimized=optimized, compiles=compiles, **common)


def compare_generation(
    checkpoint: Path,
    output: Path,
    max_new_tokens: int,
    quantize: Bits | None,
    device: str | None,
    *,
    compiles: bool,
) -> None:
    """Print the table of `generate --benchmark`, and write it and its pictures to a folder."""
    from sheepop.evaluation.generation_plots import write_generation_plots
    from sheepop.generation.comparison import compare_ways, format_measurements
    from sheepop.generation.terminal import load_model_and_tokenizer
    from sheepop.utils.files import write_atomic

    model, _ = load_model_and_tokenizer(checkpoint, device or "auto", quantize)
    measurements = compare_ways(model, new_tokens=max_new_tokens, compiles=compiles)
    table = format_measurements(measurements)
    paths = write_generation_plots(measurements, output)
    write_atomic(output / "table.txt", table + "\n")
    print(table)
    log(f"plots: {', '.join(map(str, paths))}")


@app.command()
@collecting_rarely()
def chat(
    checkpoint: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of one turn")] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="choose among tokens that hold this share of probability")] = 0.95,
    seed: Annotated[int, typer.Option(help="same seed, same text")] = 42,
    compiles: Compiles = False,
    device: Device = None,
) -> None:
    """Write a text together with a model, line by line."""
    from sheepop.generation.sampling import SamplingSettings
    from sheepop.generation.terminal import chat as start_chat

    start_chat(
        checkpoint,
        SamplingSettings(temperature=temperature, top_p=top_p),
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device or "auto",
        compiles=compiles,
    )


@app.command()
@collecting_rarely()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0: every one of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's name for clients (default: its folder's)")] = None,
    batch_size: Annotated[int, typer.Option(help="texts that are written at the same time")] = 16,
    max_queue: Annotated[int, typer.Option(help="texts that may wait; more are refused")] = 64,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="the most tokens of a text (default: the model's context, and at least 4096)")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SHEEPOP_API_KEY", help="clients have to send it (default: none is asked for)")
    ] = None,
    grace: Annotated[float, typer.Option(help="seconds for what is being written when a signal ends the server")] = 5.0,
    optimized: Optimized = True,
    quantize: Quantize = None,
    cache: Cache = None,
    speculate: Speculate = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON value when ready: url and model")] = False,
) -> None:
    """Answer over HTTP as OpenAI's API does, for many clients at once, with a page to try the model."""
    from sheepop.serving.server import serve as start_server

    status = start_server(
        checkpoint,
        host=host,
        port=port,
        name=name,
        batch_size=batch_size,
        max_queue=max_queue,
        max_new_tokens=max_new_tokens,
        api_key=api_key,
        grace_seconds=grace,
        optimized=optimized,
        quantization=quantize,
        int8_cache=cache is not None,
        speculate=speculate,
        device=device or "auto",
        as_json=as_json,
    )
    sys.exit(status)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="the run's folder")]) -> None:
    """Write plots and report.html for a run."""
    from sheepop.evaluation.report import write_report

    print(write_report(run))


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="the folder, or for gguf the file, to write")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="hf: a folder that transformers loads; gguf: a file for llama.cpp")
    ] = "hf",
    weights: Annotated[str, typer.Option(help="of a gguf file: f32, or rounded to f16 or q8_0 (8 bits)")] = "f32",
) -> None:
    """Write a model for other engines, and prove that it computes the same there."""
    from sheepop.interop.convert import export_model

    export_model(checkpoint, output, file_format=format, encoding=weights)


@app.command()
def quantize(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="the checkpoint to write")],
    to: Annotated[Bits, typer.Option(help="bits of a weight")] = "int8",
    data: Annotated[Path | None, typer.Option(help="text to score before and after")] = None,
) -> None:
    """Write a model with its weights in fewer bits, and say what that costs in quality."""
    from sheepop.evaluation.comparison import compare_checkpoints
    from sheepop.interop.quantized import quantize_checkpoint

    quantize_checkpoint(checkpoint, output, to)
    if data is not None:
        print(compare_checkpoints(checkpoint, output, data))


@app.command(name="import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="a Hugging Face folder, a .gguf file, a .bin of llama2.c, or a .pt of nanoGPT")
    ],
    output: Annotated[Path, typer.Option(help="the checkpoint to write")],
    tokenizer: Annotated[Path | None, typer.Option(help="PATH of a tokenizer, in place of the model's own")] = None,
) -> None:
    """Turn a model that was trained elsewhere into a checkpoint that every command takes."""
    from sheepop.interop.convert import import_model

    import_model(source, output, tokenizer=tokenizer)


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with the contract's status; `--debug` anywhere shows the trace of an error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    wait_politely()
    hide_remark_on_norms()
    end_without_a_search()
    with end_at_once_among_others():
        run_guarded(lambda: app(args=[word for word in words if word != "--debug"], prog_name="sheepop"), debug=debug)


def run_guarded(command: Callable[[], object], *, debug: bool) -> None:
    """Turn what a user can mend into one paragraph and an exit status; a defect of ours keeps its traceback."""
    try:
        with full_disk_is_a_clear_error(Path.cwd()):
            command()
    except SheepopError as error:
        if debug:
            traceback.print_exc()
        log(f"error: {error}")
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        log("Interrupted.")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, for instance `| head`
        sys.stderr.close()
        sys.exit(141)
