"""What the figures of an inspection mean: what the text can feed, and what to mend first."""

from typing import Any

from sheepop.utils.logging import format_count

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 ("Training compute-optimal large language models"), table 3
USEFUL_EPOCHS = 4  # Muennighoff et al. 2023 ("Scaling data-constrained language models"): almost as good as new text
# The entries of a vocabulary are learned from their occurrences, and frequent ones take most of them.
TOKENS_PER_ENTRY = 200
MOST_OF_THE_MODEL = 0.5  # that the embedding may be
# Width and layers: about GPT-2's and Llama's proportions, smaller ones wider for their depth.
SHAPES = (
    (32, 2), (48, 3), (64, 4), (96, 4), (128, 4), (128, 6), (192, 6), (256, 6), (256, 8), (384, 8), (512, 8),
    (512, 12), (768, 12), (1024, 16), (1024, 24), (1536, 24), (2048, 24), (2560, 32), (4096, 32),
)  # fmt: skip
TINY_BYTES = 1_000_000
MANY_DUPLICATES = 0.05
ONE_LANGUAGE = 0.9
MUCH_BOILERPLATE = 0.03
MUCH_CROSSING = 0.01
REPETITIVE, RANDOM = 5.0, 1.5  # compression of prose by zlib: 2.2 to 3.2
MANY_FAIL = 0.3


def parameters_of(vocab_size: int, d_model: int, num_layers: int) -> int:
    """Return about how many parameters a model has: its embedding, tied to the head, and 12 d_model² a layer.

    Kaplan et al. 2020, section 2.1, with a feed-forward of four times the width.
    """
    return vocab_size * d_model + 12 * num_layers * d_model**2


def advise(result: dict[str, Any]) -> dict[str, Any]:
    """Return vocabulary and size of a model that the text can feed, and the same in words.

    The largest vocabulary, and for it the largest model, that stay within 20 tokens a parameter when the different
    text is read up to four times; the embedding at most half of the model, and 200 tokens for each entry. A text too
    small for any gets the smallest.
    """
    unique_share = 1 - result["duplicates"]["exact"]["bytes"] / max(1, result["bytes"])
    trained = [row for row in result["tokenizers"] if row["trained_here"]]
    choices = []
    for row in trained:
        tokens = row["tokens"] * unique_share
        budget = tokens * USEFUL_EPOCHS / TOKENS_PER_PARAMETER
        fitting = [
            shape
            for shape in SHAPES
            if parameters_of(row["vocab_size"], *shape) <= budget
            and row["vocab_size"] * shape[0] <= MOST_OF_THE_MODEL * parameters_of(row["vocab_size"], *shape)
        ]
        if fitting and tokens >= TOKENS_PER_ENTRY * row["vocab_size"]:
            choices.append((row, fitting[-1]))
    row, shape = choices[-1] if choices else (trained[0], SHAPES[0])
    tokens = round(row["tokens"] * unique_share)
    parameters = parameters_of(row["vocab_size"], *shape)
    budget = round(tokens * USEFUL_EPOCHS / TOKENS_PER_PARAMETER)
    kind = "char" if row["name"] == "char" else "bpe"
    settings = f"--data.tokenizer {kind} --model.vocab_size {row['vocab_size']}"
    heads = max(1, shape[0] // (64 if shape[0] >= 512 else 32 if shape[0] % 32 == 0 else 16))
    settings += f" --model.d_model {shape[0]} --model.num_layers {shape[1]} --model.num_heads {heads}"
    text = [
        f"With the tokenizer '{row['name']}' this is about {format_count(tokens)} tokens without the exact duplicates.",
        f"At {TOKENS_PER_PARAMETER} tokens a parameter (Hoffmann et al. 2022) they feed a model of "
        f"{format_count(tokens / TOKENS_PER_PARAMETER)} parameters in one epoch, and of {format_count(budget)} in "
        f"{USEFUL_EPOCHS}; up to there, repeated text is almost as good as new (Muennighoff et al. 2023).",
        f"That is about {shape[1]} layers of width {shape[0]}, {format_count(parameters)} parameters: {settings}",
    ]
    if not choices:
        text.append("That is less than the smallest model needs: it will learn much of the text by heart. Add text.")
    else:
        text.append("A larger model can still score better for a while; stop when the validation loss rises.")
    return {
        "vocab_size": row["vocab_size"],
        "tokenizer": kind,
        "tokens": tokens,
        "parameters_one_epoch": tokens // TOKENS_PER_PARAMETER,
        "parameters": budget,
        "d_model": shape[0],
        "num_layers": shape[1],
        "num_heads": heads,
        "text": text,
    }


def warnings_about(result: dict[str, Any]) -> list[str]:
    """Return what the user should know or mend before training, the most important first."""
    warnings = []
    exact, near = result["duplicates"]["exact"], result["duplicates"]["near"]
    split, ratio = result["split"], result["compression"]["ratio"]
    shares = result["languages"]["shares"]
    quality = result["quality"]
    if not result["complete"]:
        warnings.append("Only the beginning of the text was read (--max-bytes): the figures are those of that part.")
    if result["bytes"] < TINY_BYTES:
        warnings.append(f"{format_count(result['bytes'])} bytes is little: words and sentences need 1 MB or more.")
    if result["files"]["unreadable"]:
        warnings.append(f"{len(result['files']['unreadable'])} file(s) could not be read and are not counted.")
    if exact["share"] > MANY_DUPLICATES:
        warnings.append(
            f"{exact['share']:.1%} of the documents are exact copies. `sheepop prepare` leaves them out "
            "(--deduplicate exact)."
        )
    if near["share"] > MANY_DUPLICATES:
        warnings.append(
            f"{near['share']:.1%} of the documents nearly equal an earlier one. Leave them out with "
            "`sheepop prepare --deduplicate near`."
        )
    if split["share_of_validation"] and split["share_of_validation"] > MUCH_CROSSING:
        warnings.append(
            f"{split['share_of_validation']:.1%} of the documents to validate on nearly equal one to train on: the "
            "validation loss will look better than it is. Leave near duplicates out (--deduplicate near)."
        )
    known = {code: share for code, share in shares.items() if code != "und"}
    if known and max(known.values()) < ONE_LANGUAGE * sum(known.values()):
        listed = ", ".join(f"{code} {share:.0%}" for code, share in list(known.items())[:4])
        warnings.append(
            f"The text is in several languages ({listed}). Keep one with `sheepop prepare --language CODE`, or plan "
            "with a larger vocabulary."
        )
    if result["boilerplate"]["share_of_characters"] > MUCH_BOILERPLATE:
        warnings.append(
            f"Lines that recur in many documents make up {result['boilerplate']['share_of_characters']:.1%} of the "
            "text. The model will learn them first; remove them."
        )
    if result["pii"]["found"]:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in result["pii"]["found"].items())
        warnings.append(
            f"There seem to be personal data ({listed}), which a model can repeat. Replace them with "
            "`sheepop prepare --pii replace`."
        )
    if ratio > REPETITIVE:
        warnings.append(f"zlib makes the text {ratio:.1f} times smaller, prose about 2.5 times: it repeats itself.")
    if ratio < RANDOM and result["compression"]["bytes"] > 10_000:
        warnings.append(f"zlib makes the text only {ratio:.1f} times smaller: it may be no text, but encoded data.")
    failed = sum(quality["broken"].values()) / max(1, quality["documents"])
    if failed > MANY_FAIL:
        rule = next(iter(quality["broken"]))
        warnings.append(
            f"{failed:.0%} of the documents break a rule of quality, most often '{rule}'. Look at some; if prose is "
            "what you want, use `sheepop prepare --quality`. Code, verse and chat break such rules by nature."
        )
    return warnings
