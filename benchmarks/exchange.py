"""A GGUF file of others here: logits and greedy tokens of `transformers`, and the tokens of three other tokenizers.

For `transformers` the file, a `llama`, is read and unpacked by the library `gguf` and put in order by this script.
Texts are lines of the files under --texts, evenly from all of them, and a fifth of random Unicode. All are encoded by
`sheepop`, by llama.cpp where `llama_cpp` is installed, and by what `transformers` makes of the file's tokenizer, as it
is and with the splitting that the file names. Greedy tokens continue prompts in fp32.

python benchmarks/exchange.py FILE.gguf --texts FILE_OR_FOLDER ...
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import tokenizers
import torch
from common import show
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.interop.gguf import import_gguf
from sheepop.models.pretrained import load_pretrained
from sheepop.models.transformer import TransformerModel
from sheepop.utils.memory import peak_resident_bytes

PROMPTS = ("The capital of France is", "Once upon a time there was a sheep who", "def fibonacci(n):\n")
NAMES = (
    ("blk.", "model.layers."),
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    *((f"attn_{part}.", f"self_attn.{part}_proj.") for part in "qkv"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    *((f"ffn_{part}", f"mlp.{part}_proj") for part in ("gate", "up", "down")),
    ("output.", "lm_head."),
)
CONTEXT = 512
GREEDY = 128


def lines_of(sources: list[Path], count: int) -> list[str]:
    """Return so many lines, as many from each source if it has them, evenly from all of it."""
    texts: list[str] = []
    for source in sources:
        files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        lines = [
            line for file in files for line in file.read_text("utf-8", errors="ignore").splitlines() if line.strip()
        ]
        share = -(-count // len(sources))
        texts += [lines[int(n * len(lines) / share)] for n in range(min(share, len(lines)))]
    return texts[:count]


def random_texts(count: int) -> list[str]:
    """Return texts of characters from all of Unicode, the first planes more often, and white space among them."""
    numbers = random.Random(5)
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(numbers.randrange(1, 40)):
            highest = numbers.choice((0x7F, 0x7F, 0x24F, 0x24F, 0xFFFF, 0x10FFFF))
            character = chr(numbers.randrange(1, highest + 1))
            text += (
                numbers.choice((character, character, character, " ", "\n", "  ")) if character.isprintable() else " "
            )
        texts.append(text)
    return texts


def llama_cpp_tokens(file: Path) -> Callable[[str], list[int]]:
    """Return what encodes a text as llama.cpp does, without a token before it."""
    from llama_cpp import Llama

    engine = Llama(str(file), vocab_only=True, verbose=False)
    return lambda text: engine.tokenize(text.encode("utf-8"), add_bos=False)


def with_splitting(theirs: tokenizers.Tokenizer, ours: Tokenizer) -> tokenizers.Tokenizer:
    """Return their tokenizer with our way to split text, for where they take every file for Llama 3's."""
    layout = json.loads(theirs.to_str()) | {"pre_tokenizer": json.loads(ours.to_json())["pre_tokenizer"]}
    layout["model"]["ignore_merges"] = json.loads(ours.to_json())["model"]["ignore_merges"]
    return tokenizers.Tokenizer.from_str(json.dumps(layout))


def compare_tokenizers(file: Path, ours: Tokenizer, texts: list[str]) -> list[dict[str, object]]:
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    others: dict[str, Callable[[str], list[int]]] = {}
    for name, backend in (("transformers", theirs), ("transformers, split as named", with_splitting(theirs, ours))):
        backend.encode_special_tokens = True
        others[name] = lambda text, backend=backend: backend.encode(text, add_special_tokens=False).ids
    if importlib.util.find_spec("llama_cpp") is not None:
        others["llama.cpp"] = llama_cpp_tokens(file)
    rows = []
    expected = [ours.encode(text) for text in texts]
    for name, encode in others.items():
        different = [text for text, ids in zip(texts, expected, strict=True) if encode(text) != ids]
        rows.append(
            {
                "tokenizer": name,
                "texts": len(texts),
                "different": len(different),
                "first": repr("".join(different[:1]))[:40],
            }
        )
    lost = sum(ours.decode(ids) != text for ids, text in zip(expected, texts, strict=True))
    rows.append({"tokenizer": "sheepop, decoded again", "texts": len(texts), "different": lost, "first": ""})
    return rows


def theirs_of(file: Path) -> LlamaForCausalLM:
    """Return a file as a model of `transformers`, whose rotary positions turn halves of a head, not neighbours."""
    reader = gguf.GGUFReader(file)
    said = {key.removeprefix("llama."): field.contents() for key, field in reader.fields.items()}
    heads, kv_heads = said["attention.head_count"], said["attention.head_count_kv"]
    weights = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=len(weights["token_embd.weight"]),
        hidden_size=said["embedding_length"],
        intermediate_size=said["feed_forward_length"],
        num_hidden_layers=said["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=said["context_length"],
        rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": said["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in weights,
        eos_token_id=said["tokenizer.ggml.eos_token_id"],
    )
    moved = {}
    for name, tensor in weights.items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                tensor = tensor.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        moved[name] = tensor
    model = LlamaForCausalLM(config).eval()
    lacking, strange = model.load_state_dict(moved, strict=False)
    assert not strange, strange
    assert set(lacking) <= {"lm_head.weight"}, lacking
    model.tie_weights()
    return model


def compare_logits(file: Path, model: TransformerModel, tokenizer: Tokenizer, text: str) -> list[dict[str, object]]:
    theirs = theirs_of(file)
    token_ids = torch.tensor([tokenizer.encode(text)[:CONTEXT]])
    with torch.inference_mode():
        own, other = model(token_ids), theirs(token_ids).logits
    rows = []
    for prompt in PROMPTS:
        settings = SamplingSettings(temperature=0.0)
        done = complete(model, tokenizer, prompt, settings, max_new_tokens=GREEDY, seed=0).completions[0]
        ids = torch.tensor([[*tokenizer.start_ids, *tokenizer.encode(prompt)]])
        mask = torch.ones_like(ids)
        written = theirs.generate(ids, attention_mask=mask, max_new_tokens=GREEDY, do_sample=False)[0, ids.shape[1] :]
        ours = done.token_ids + [tokenizer.end_of_text_id] * (done.finish_reason == "stop")
        rows.append({"prompt": repr(prompt), "greedy tokens": len(ours), "the same": ours == written.tolist()})
    show("greedy tokens", rows)
    difference, largest = float((own - other).abs().max()), float(own.abs().max())
    return [{"tokens": token_ids.shape[1], "largest difference": difference, "largest logit": largest}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="text files and folders")
    parser.add_argument("--count", type=int, default=10_000, help="texts to encode, a fifth of them random")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "imported"
        begin = time.perf_counter()
        import_gguf(arguments.file, checkpoint)
        seconds = time.perf_counter() - begin
        peak = peak_resident_bytes() / 2**20
        size = arguments.file.stat().st_size / 2**20
        show("import", [{"MiB": size, "seconds": seconds, "peak MiB of the process": peak}])
        tokenizer, model = Tokenizer.load(checkpoint), load_pretrained(checkpoint)
    texts = lines_of(arguments.texts, arguments.count * 4 // 5)
    prose = "\n".join(texts[: len(texts) // 4])
    texts += random_texts(arguments.count - len(texts))
    show("tokens", compare_tokenizers(arguments.file, tokenizer, texts))
    show("logits", compare_logits(arguments.file, model, tokenizer, prose))


if __name__ == "__main__":
    main()
