"""Files of other formats, of prompts and of grammars, damaged in every way that is cheap to think of.

What reading them costs is measured. `damaged_files.py` shows the worst of thousands; `tests/interop/
test_damaged_files.py` tries some hundreds by it. Whole files of llama2.c and nanoGPT are those of the tests beside that
one, and so are the GGUF files that ask for much.
"""

import copy
import io
import json
import random
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sheepop.config import ModelConfig, load_config
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.grammar import Grammar, GrammarCompiler
from sheepop.generation.prompt_file import PromptOptions, read_prompts
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.terminal import read_grammar
from sheepop.interop.convert import export_model, import_model
from sheepop.interop.imported import write_imported
from sheepop.models.pretrained import stored_weights
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError, DataError, SheepopError
from sheepop.utils.memory import forget_peak, peak_resident_bytes, resident_bytes
from sheepop.utils.runtime import return_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/interop"))
from test_llama2c import write_model, write_tokenizer
from test_nanogpt import ARGUMENTS, random_weights

HUGE = 2**31
STRANGE = [None, True, "x", "", -1, 0, 1, 3, HUGE, 2**40, 10**30, 0.5, -1e300, [], [1], {}, [[[]]], "y" * 10_000]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", "", 7, None]
SHAPES = [[], [0], [-1], [HUGE, HUGE], [2**63], [2**64], [10**30], [1] * 5000, "x", [1.5], None]


@dataclass(frozen=True)
class Source:
    """The file that is damaged, what reads it, given a place for output, and the one kind of error that this may be."""

    victim: Path
    read: Callable[[Path], object]
    error: type[SheepopError] = CheckpointError


def imported(path: Path, victim: Path, tokenizer: Path | None = None) -> Source:
    return Source(victim, partial(import_model, path, tokenizer=tokenizer))


@dataclass(frozen=True)
class Outcome:
    """What became of reading a file; `error` is the kind of what was raised, empty for nothing."""

    error: str
    seconds: float
    grown: int  # bytes beyond the file's own size


def a_tokenizer(vocab_size: int = 283) -> Tokenizer:
    texts = ["The sheep sees the dog, and follows it.\n", "No dog at night: 3 sheep. Naïve!"]
    return Tokenizer.train("bpe", texts * 4, vocab_size=vocab_size)


def checkpoint(folder: Path) -> Path:
    tokenizer = a_tokenizer()
    sizes = {"d_model": 40, "num_layers": 2, "num_heads": 4, "d_ff": 44, "max_seq_len": 23, "dropout": 0.0}
    overrides = {f"model.{key}": value for key, value in (sizes | {"vocab_size": tokenizer.vocab_size}).items()}
    config = load_config(preset="modern", overrides=overrides).model
    write_imported(folder / "ours", config, stored_weights(TransformerModel(config)), tokenizer)
    return folder / "ours"


def huggingface(folder: Path, victim: str) -> Source:
    export_model(checkpoint(folder), folder / "hf", file_format="hf")
    if victim == "model.safetensors.index.json":
        part = folder / "hf/part.safetensors"
        (folder / "hf/model.safetensors").rename(part)
        (folder / "hf" / victim).write_text(json.dumps({"weight_map": {"lm_head.weight": part.name, "x": part.name}}))
    if victim == "generation_config.json":
        (folder / "hf" / victim).write_text('{"bos_token_id": 0, "eos_token_id": [0], "_from_model_config": true}')
    return imported(folder / "hf", folder / "hf" / victim)


def gguf(folder: Path) -> Source:
    path = folder / "model.gguf"
    export_model(checkpoint(folder), path, file_format="gguf")
    return imported(path, path)


def llama2c(folder: Path, victim: str) -> Source:
    vocab_size = write_tokenizer(folder / "tokenizer.bin")
    sizes = {"d_model": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 20, "max_seq_len": 13}
    family = {"norm": "rmsnorm", "activation": "swiglu", "dropout": 0.0}
    write_model(folder / "model.bin", TransformerModel(ModelConfig(vocab_size=vocab_size, **sizes | family)))
    return imported(folder / "model.bin", folder / victim)


def nanogpt(folder: Path) -> Source:
    a_tokenizer(270).save(folder / "tokenizer.json")
    torch.save({"model": random_weights(True), "model_args": ARGUMENTS}, folder / "ckpt.pt")
    return imported(folder / "ckpt.pt", folder / "ckpt.pt", folder / "tokenizer.json")


def prompts(folder: Path) -> Source:
    path, defaults = folder / "prompts.jsonl", PromptOptions(SamplingSettings(), max_new_tokens=20, seed=7)
    own = {"temperature": 0.5, "top_k": 3, "max_new_tokens": 2, "seed": 5, "num_samples": 2, "stop": ["x", "y"]}
    records = [{"prompt": "The old ewe", "id": 17}, {"prompt": "The young dog", **own}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(path, lambda _: read_prompts(path, defaults), DataError)


def json_schema(folder: Path) -> Source:
    path = folder / "schema.json"
    name = {"type": "string", "minLength": 2, "maxLength": 9, "pattern": "^[a-z]+$"}
    ages = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3}
    parts = {"name": name, "ages": ages, "kind": {"enum": ["sheep", "dog", 3]}, "more": {"$ref": "#/$defs/more"}}
    more = {"anyOf": [{"type": "number"}, {"type": "object", "properties": {"more": {"$ref": "#/$defs/more"}}}]}
    schema = {"type": "object", "properties": parts, "required": ["name"], "$defs": {"more": more}}
    path.write_text(json.dumps(schema))
    return grammar_file(path, lambda: read_grammar(path, None, None))


def lark(folder: Path) -> Source:
    path = folder / "grammar.lark"
    path.write_text('start: noun (" and " noun)* "."\nnoun: ARTICLE " " /[a-z]{2,9}/\nARTICLE: "the" | "a"\n')
    return grammar_file(path, lambda: read_grammar(None, None, path))


def grammar_file(path: Path, read: Callable[[], Grammar | None]) -> Source:
    compiler = GrammarCompiler(a_tokenizer(), 283)

    def compiled(_: Path) -> None:
        grammar = read()
        assert grammar is not None
        constraint = compiler.compile(grammar.kind, grammar.text)()
        constraint.allowed([])

    return Source(path, compiled, ConfigError)


KINDS: dict[str, Callable[[Path], Source]] = {
    "safetensors": lambda folder: huggingface(folder, "model.safetensors"),
    "config.json": lambda folder: huggingface(folder, "config.json"),
    "tokenizer.json": lambda folder: huggingface(folder, "tokenizer.json"),
    "tokenizer_config.json": lambda folder: huggingface(folder, "tokenizer_config.json"),
    "generation_config.json": lambda folder: huggingface(folder, "generation_config.json"),
    "index": lambda folder: huggingface(folder, "model.safetensors.index.json"),
    "llama2.c": lambda folder: llama2c(folder, "model.bin"),
    "llama2.c tokenizer": lambda folder: llama2c(folder, "tokenizer.bin"),
    "nanoGPT": nanogpt,
    "GGUF": gguf,
    "prompts": prompts,
    "JSON schema": json_schema,
    "Lark grammar": lark,
}


def attempt(source: Source, content: bytes, output: Path) -> Outcome:
    """Read the source with its victim's content replaced; put it back afterwards."""
    good = source.victim.read_bytes()
    source.victim.write_bytes(content)
    return_freed_memory()
    forget_peak()
    before, begin, error = resident_bytes(), time.process_time(), ""
    try:
        source.read(output)
    except Exception as raised:
        error = type(raised).__name__
    seconds, grown = time.process_time() - begin, peak_resident_bytes() - before - len(content)
    source.victim.write_bytes(good)
    assert not error or not output.exists()
    return Outcome(error, seconds, grown)


def is_within_bounds(source: Source, outcome: Outcome) -> bool:
    """Say whether reading succeeded or failed as it should: one kind of error, one second, 200 megabytes."""
    return outcome.error in ("", source.error.__name__) and outcome.seconds < 1 and outcome.grown < 200e6


def mutations(kind: str, good: bytes, count: int, seed: int = 8) -> Iterator[bytes]:
    """Yield damaged contents of a file: those that ask for much, then random ones."""
    yield from greedy(kind, good)
    numbers = random.Random(seed)
    for number in range(count):
        if number % 2 and kind in CHANGES:
            yield CHANGES[kind](good, numbers)
        else:
            yield spoiled(good, numbers)


def spoiled(good: bytes, numbers: random.Random) -> bytes:
    """Return a file with some other bytes, near its ends more often; cut off; or with a part of it repeated."""
    content = bytearray(good)
    for _ in range(numbers.randint(1, 4)):
        reach = numbers.choice((28, 1200, len(good)))
        content[numbers.randrange(min(reach, len(good))) * numbers.choice((1, -1))] = numbers.randrange(256)
    way = numbers.randrange(5)
    if way == 0:
        del content[numbers.randrange(len(content)) :]
    elif way == 1:
        at, size = numbers.randrange(len(content)), numbers.randrange(1, 300)
        content[at:at] = content[at : at + size]
    return bytes(content)


def places(value: object) -> list[tuple[object, object]]:
    """Return where a JSON value has values: (object or list, key or index)."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in items] + [place for _, inner in items for place in places(inner)]


def other_json(good: bytes, numbers: random.Random) -> bytes:
    """Return JSON with a few values missing, strange, or nested in themselves."""
    value = json.loads(good)
    for _ in range(numbers.randint(1, 3)):
        found = places(value)
        if not found:
            break
        container, key = numbers.choice(found)
        if numbers.random() < 0.2:
            del container[key]
        elif numbers.random() < 0.1:
            container[key] = {"x": copy.deepcopy(value)}
        else:
            container[key] = numbers.choice(STRANGE)
    return json.dumps(value).encode()


def other_safetensors(good: bytes, numbers: random.Random) -> bytes:
    """Return safetensors whose header says other types, shapes and places, or another length of itself."""
    size = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    if numbers.random() < 0.2:
        claimed = numbers.choice([0, 1, size - 1, size + 1, len(good), 10**8, 10**8 + 1, HUGE, 2**63, 2**64 - 1])
        return struct.pack("<Q", claimed) + good[8:]
    for name in numbers.sample(sorted(set(header) - {"__metadata__"}), numbers.randint(1, 3)):
        entry, way = header[name], numbers.randrange(4)
        if way == 0:
            entry["dtype"] = numbers.choice(DTYPES)
        elif way == 1:
            entry["shape"] = numbers.choice(SHAPES)
        elif way == 2:
            ends = [0, 1, -1, len(body), len(body) * 2, HUGE, 2**63, 10**30, *entry["data_offsets"]]
            entry["data_offsets"] = [numbers.choice(ends) for _ in range(numbers.choice((2, 2, 2, 1, 3)))]
        else:
            header[name] = numbers.choice(STRANGE)
    return safetensors(header, body)


def safetensors(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def other_llama2c(good: bytes, numbers: random.Random) -> bytes:
    """Return a model with other numbers in its header."""
    header = list(struct.unpack("<7i", good[:28]))
    for _ in range(numbers.randint(1, 3)):
        header[numbers.randrange(7)] = numbers.choice([0, 1, -1, 2**24 - 2, HUGE - 1, -HUGE, *header])
    return struct.pack("<7i", *header) + good[28:]


def other_pt(good: bytes, numbers: random.Random) -> bytes:  # noqa: ARG001 - as the others
    """Return a checkpoint of nanoGPT with other arguments, or weights of other kinds."""
    weights, arguments = random_weights(True), dict(ARGUMENTS)
    for name in numbers.sample(sorted(weights), numbers.randint(1, 2)):
        tensor, way = weights[name], numbers.randrange(9)
        changed = [
            lambda tensor: tensor.to(numbers.choice([torch.float16, torch.float64, torch.int8, torch.bool])),
            lambda tensor: tensor.to(torch.complex64),
            lambda tensor: tensor.t() if tensor.dim() == 2 else tensor[:0],
            lambda tensor: torch.zeros(1).expand(*(HUGE for _ in tensor.shape)),
            lambda tensor: torch.zeros(1, dtype=torch.float16).expand(tensor.shape),
            lambda tensor: tensor.to_sparse(),
            lambda tensor: torch.empty(tensor.shape, device="meta"),
            lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            lambda _: numbers.choice(STRANGE),
        ][way]
        weights[name] = changed(tensor)
        if numbers.random() < 0.5:
            arguments[numbers.choice(sorted(arguments))] = numbers.choice(STRANGE)
    return pt({"model": weights, "model_args": arguments})


def pt(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def other_gguf(good: bytes, numbers: random.Random) -> bytes:
    """Return a GGUF file with absurd numbers where its header has counts, lengths and types."""
    content, end = bytearray(good), good.index(b"token_embd.weight") + 4000
    for _ in range(numbers.randint(1, 3)):
        at, form = numbers.choice((4, 8, 16, 24, numbers.randrange(4, end))), numbers.choice("<I <Q".split())
        value = numbers.choice([0, 1, HUGE - 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 10**12, len(good), len(good) * 8])
        content[at : at + struct.calcsize(form)] = struct.pack(form, value & (2 ** (8 * struct.calcsize(form)) - 1))
    return bytes(content)


def other_prompts(good: bytes, numbers: random.Random) -> bytes:
    """Return prompts of which one line has other values."""
    lines = good.splitlines(keepends=True)
    chosen = numbers.randrange(len(lines))
    lines[chosen] = other_json(lines[chosen], numbers) + b"\n"
    return b"".join(lines)


CHANGES = {
    "safetensors": other_safetensors,
    "config.json": other_json,
    "tokenizer.json": other_json,
    "tokenizer_config.json": other_json,
    "generation_config.json": other_json,
    "index": other_json,
    "llama2.c": other_llama2c,
    "nanoGPT": other_pt,
    "GGUF": other_gguf,
    "prompts": other_prompts,
    "JSON schema": other_json,
}
IS_JSON = ("index", "prompts", "JSON schema")  # and what is called so


def greedy(kind: str, good: bytes) -> Iterator[bytes]:
    """Yield files that ask for much memory or time, or for a deep stack."""
    yield from (b"", b"\0", good[:-1], good + b"\0", good * 2)
    if kind.endswith(".json") or kind in IS_JSON:
        yield from (b"[" * 10**6, b'{"a":' * 10**5, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}")
        yield b'{"vocab_size": ' + b"9" * 10**6 + b"}"
        yield b'{"model_type": "llama", "vocab_size": 1e999, "hidden_size": NaN}'
        yield b'{"a": [' + b"[]," * 10**7 + b"[]]}"  # thirty megabytes of text, twenty times as much as objects
        yield b'{"a": "' + b"\\u0000" * 5 * 10**6 + b'"}'
        yield b"\xff\xfe" + good
    if kind == "GGUF":
        from test_gguf import GREEDY_FILES  # which needs the package gguf

        yield from (make() for make in GREEDY_FILES.values())
    if kind == "prompts":
        yield b"{}\n" * 10**7
        yield b'{"prompt": "", "num_samples": ' + b"9" * 4000 + b"}"
    if kind == "Lark grammar":
        yield b"start: " + b"(" * 10**5 + b'"a"' + b")" * 10**5
        yield b"start: " + b'"a" ' * 10**6
        yield b"start: /" + b"(a{1,1000}){1,1000}" * 20 + b"/"
        yield b'start: start start | "a"\n' * 10**4
    if kind == "tokenizer.json":
        for change in (
            lambda layout: layout["added_tokens"][0].update(id=2**32 - 1),
            lambda layout: layout["model"]["vocab"].update(zz=2**32 - 1),
            lambda layout: layout["model"]["vocab"].update({f"z{number}": number for number in range(10**6)}),
            lambda layout: layout["model"].update(merges=[["t", "h"]] * 10**6),
        ):
            layout = json.loads(good)
            change(layout)
            yield json.dumps(layout).encode()
    if kind == "safetensors":
        yield safetensors(b"[" * 10**6, b"")
        yield safetensors(b" " * 10**8, b"")
        yield safetensors(b" " * (10**8 + 1), b"")
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        yield safetensors({f"t{number}": empty for number in range(10**6)}, b"")
        yield safetensors({"a": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}}, b"1234")
    if kind == "llama2.c":
        for numbers in ((24, 20, 2, 4, 2, HUGE - 1, 13), (2, 1, 2**24 - 1, 1, 1, 1, 1), (2, 1, 1, 1, 1, 1, 2**24 - 1)):
            yield struct.pack("<7i", *numbers) + good[28:]
        layers = 10**5  # of width 2, the table, the last norm and the rotation besides
        yield struct.pack("<7i", 2, 1, layers, 1, 1, 1, 1) + bytes(4 * (2 + 2 + 2 + layers * (4 + 4 * 4 + 3 * 2)))
    if kind == "llama2.c tokenizer":
        yield struct.pack("<i", 7) + struct.pack("<fi", 0.0, HUGE - 1) * 269
        long = b"".join(struct.pack("<fi", -float(number), 60_000) + b"ab" * 30_000 for number in range(269))
        yield struct.pack("<i", 7) + long
    if kind == "nanoGPT":
        yield from greedy_pt(good)


def greedy_pt(good: bytes) -> Iterator[bytes]:
    """Yield checkpoints that are small and become large: packed entries, and tensors that share their memory."""
    for victim in ("data.pkl", "data/0"):
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                is_bomb = name.endswith(victim)
                packing = zipfile.ZIP_DEFLATED if is_bomb else zipfile.ZIP_STORED
                new.writestr(name, bytes(10**9) if is_bomb else old.read(name), packing)
        yield file.getvalue()
    weights, wide = random_weights(True), torch.zeros(1, dtype=torch.float16)
    for table in (HUGE, 2**24):
        expanded = wide.expand(table, 24)
        changed = weights | {"transformer.wte.weight": expanded, "lm_head.weight": expanded}
        yield pt({"model": changed, "model_args": ARGUMENTS | {"vocab_size": table}})
    rest = {name: tensor for name, tensor in weights.items() if ".h." not in name}
    shared = {
        name.replace(".h.0.", f".h.{layer}."): torch.zeros(1).expand(tensor.shape) if layer else tensor
        for name, tensor in weights.items()
        if ".h.0." in name
        for layer in range(300)
    }
    yield pt({"model": rest | shared, "model_args": ARGUMENTS | {"n_layer": 300}})
    same = {
        name.replace(".h.0.", f".h.{layer}."): tensor
        for name, tensor in weights.items()
        if ".h.0." in name
        for layer in range(300)
    }
    yield pt({"model": rest | same, "model_args": ARGUMENTS | {"n_layer": 300}})
    yield pt({"model": weights, "model_args": ARGUMENTS | {"n_layer": 10**6}})
    nested: object = 0
    for _ in range(100):
        nested = [nested]
    yield pt({"model": weights, "model_args": ARGUMENTS | {"n_head": nested}})
