"""The proof of an export: another engine reads the same token ids in a text, computes the same, writes the same."""

from collections.abc import Callable

import torch
from torch import Tensor

from sheepop.data.tokenizer import Tokenizer
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.errors import CheckpointError
from sheepop.utils.logging import log

PROOF_TEXT = "The proof of the pudding is in the eating: 3 cups of flour, Σ x² ≥ 0, naïve café.\n"
PROOF_TOKENS = 64
LONGEST_PROOF = 512  # tokens


def prove_same(
    engine: str,
    model: TransformerModel,
    tokenizer: Tokenizer,
    *,
    encode: Callable[[str], list[int]],
    logits_of: Callable[[Tensor], Tensor],
    tolerance: float,
    greedy_tokens: int = PROOF_TOKENS,
) -> None:
    """Compare what another engine makes of an export with our own model; say the largest difference.

    Args:
        engine: its name, for messages.
        model, tokenizer: what was exported.
        encode: the engine's token ids of a text, without any mark before it.
        logits_of: its logits (B, T, V) of token ids (B, T) of at most LONGEST_PROOF tokens.
        tolerance: difference of logits that is allowed, over the largest absolute logit.
        greedy_tokens: how many of the likeliest tokens, one after the other, have to be the same; where the two
            likeliest ones are nearer to each other than the logits of both engines, either may come.

    Raises:
        CheckpointError: they differ.
    """
    their_ids, own_ids = encode(PROOF_TEXT), tokenizer.encode(PROOF_TEXT)
    if their_ids != own_ids:
        raise CheckpointError(f"The exported tokenizer differs: it gives {their_ids[:20]}, ours {own_ids[:20]}.")
    generator = torch.Generator().manual_seed(0)
    length = min(model.config.max_seq_len, LONGEST_PROOF)
    token_ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)  # (B, T)
    text = (own_ids * length)[:length]
    token_ids[0] = torch.tensor(text)
    prompt = text[: max(1, length // 2)]
    count = min(greedy_tokens, length - len(prompt))
    with inference(model), torch.inference_mode():
        own, other = model(token_ids), logits_of(token_ids)
        written = greedy(logits_of, prompt, count)
        scores = model(torch.tensor([prompt + written]))[0, len(prompt) - 1 :][:count]  # (count, V)
    # Of both engines the likeliest tokens are the same, if each of theirs is our likeliest after those before it.
    behind = scores.max(dim=-1).values - scores[torch.arange(count), written]
    difference, largest = float((own - other).abs().max()), float(own.abs().max())
    if not difference <= tolerance * largest:
        raise CheckpointError(
            f"The export is not the same model: its logits differ by up to {difference:.3g}, of {largest:.3g} at most. "
            "Please report this with the model's config.json."
        )
    if (behind > 2 * difference).any():
        raise CheckpointError("The export is not the same model: its greedy tokens differ.")
    same = int((behind == 0).sum())
    log(
        f"proved with {engine}: logits differ by at most {difference:.2g}, of {largest:.2g} at most"
        + f"; {same} greedy tokens are the same" * (count > 0)
        + f", {count - same} as likely as ours" * (same < count)
    )


def greedy(logits_of: Callable[[Tensor], Tensor], prompt: list[int], count: int) -> list[int]:
    """Return the likeliest tokens after a prompt, one after the other."""
    written = list(prompt)
    for _ in range(count):
        written.append(int(logits_of(torch.tensor([written]))[0, -1].argmax()))
    return written[len(prompt) :]
