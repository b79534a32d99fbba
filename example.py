"""A guided tour of a minute: text → tokens → training → generation → a look inside the model.

Run it with `python3 example.py`, and read along: every part is a few lines. It uses the functions that the commands of
sheepop use, so what you see here is what `sheepop train` and `sheepop generate` do, without files and checkpoints.
The notebooks in `notebooks/` stop at each part for longer.
"""

import math

import torch

from sheepop.config import ModelConfig, TrainingConfig
from sheepop.data.dataset import num_windows, read_windows
from sheepop.data.sampler import Sampler
from sheepop.data.tokenizer import Tokenizer, bytes_per_token
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.learn.lessons import held_out_loss, some_text
from sheepop.learn.trace import trace
from sheepop.models.transformer import TransformerModel
from sheepop.training.loss import summed_cross_entropy
from sheepop.training.optimizer import make_optimizer
from sheepop.training.schedule import learning_rate_at

SEED = 1
CONTEXT = 64  # tokens that the model sees at once
STEPS = 300


def heading(number: int, title: str) -> None:
    """Print where on the tour we are."""
    print(f"\n=== {number}. {title} ===")


def main() -> None:
    """Walk through the five parts."""
    torch.manual_seed(SEED)

    heading(1, "Text")
    name, text = some_text()
    print(f"{len(text):,} characters of {name}. Somewhere they read:\n\n{text[500_000:500_250].strip()}")

    heading(2, "Tokens")
    # A model works on numbers. The tokenizer starts from single bytes and then, again and again, joins the pair of
    # neighbours that occurs most often, until it has 512 pieces: frequent words become one piece, rare ones several.
    tokenizer = Tokenizer.train("bpe", [text], vocab_size=512)
    phrase = "What is the matter?"
    token_ids = tokenizer.encode(phrase)
    print(f"{phrase!r} is cut into {[tokenizer.token_text(token_id) for token_id in token_ids]},")
    print(f"which the model sees as {token_ids}, and which can be put together again: {tokenizer.decode(token_ids)!r}")
    tokens = tokenizer.encode_array(text)
    held_out = len(tokens) // 20
    train_tokens, val_tokens = tokens[:-held_out], tokens[-held_out:]
    print(f"The whole text is {len(tokens):,} tokens of {bytes_per_token(tokenizer, [text]):.2f} bytes on average.")
    print(f"The last {held_out:,} are held out: the model never trains on them, so that we can see what it understood.")

    heading(3, "Training")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=96,
        num_layers=3,
        num_heads=4,
        max_seq_len=CONTEXT,
        dropout=0.0,
        norm="rmsnorm",
        activation="swiglu",
    )
    model = TransformerModel(config)
    training = TrainingConfig(batch_size=16, max_steps=STEPS, learning_rate=4e-3, warmup_steps=30)
    optimizer = make_optimizer(model, training)
    sampler = Sampler(
        num_windows=num_windows(len(train_tokens), CONTEXT, CONTEXT),
        batch_size=training.batch_size,
        gradient_accumulation_steps=1,
        seed=SEED,
    )
    print(f"A transformer with {sum(weight.numel() for weight in model.parameters()):,} random weights.")
    print("The loss says how surprised it is by each next token: -ln of the probability that it gave to that token.")
    blind = math.log(config.vocab_size)
    print(f"Guessing blindly among {config.vocab_size} tokens costs ln {config.vocab_size} = {blind:.2f} nats a token.")
    for step in range(STEPS):
        if step % 100 == 0:
            print(f"step {step:3}: loss on held-out text {held_out_loss(model, val_tokens):.3f}")
            print(f"          it writes: {write(model, tokenizer, 'The ', 16)!r}")
        # Inputs are windows of the text, targets the same windows one token later: at each place, guess what comes.
        inputs, targets = read_windows(train_tokens, sampler.windows_of(step) * CONTEXT, CONTEXT)
        logits = model(torch.from_numpy(inputs))  # (B, T, V): a score for each token of the vocabulary at each place
        wanted = torch.from_numpy(targets)
        loss = summed_cross_entropy(logits, wanted) / (wanted >= 0).sum()
        # The gradient tells for each weight which way to move it so that the loss falls; the optimizer moves it a bit.
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, STEPS, training)
        optimizer.step()
        optimizer.zero_grad()
    final = held_out_loss(model, val_tokens)
    print(f"step {STEPS}: loss on held-out text {final:.3f}")
    print(f"It hesitates as if among e^{final:.2f} = {math.exp(final):.0f} tokens now, no longer {config.vocab_size}.")

    heading(4, "Generation")
    # The model gives a probability to every token; one is drawn, appended, and the longer text goes in again.
    prompt = "O my good lord, the"
    for temperature in (0.0, 0.8):
        print(f"temperature {temperature}: {prompt}{write(model, tokenizer, prompt, 40, temperature)}")
    print("At temperature 0 it always takes the likeliest token, and soon repeats itself; a little chance helps.")

    heading(5, "A look inside")
    # A trace is one real forward pass, with the tensors at the model's named points kept.
    token_ids = tokenizer.encode(prompt)
    seen = trace(model, token_ids)
    names = [tokenizer.token_text(token_id) for token_id in token_ids]
    print(f"A trace of {prompt!r} has {len(seen)} tensors. After the last token, the five best guesses are:")
    for probability, token_id in zip(*seen["logits"][-1].softmax(dim=-1).topk(5), strict=True):
        print(f"  {probability:6.1%}  {tokenizer.token_text(int(token_id))!r}")
    # How much each token (row) looks at each earlier one (column), in one head of the last block. A row sums to 1, and
    # there is nothing above the diagonal: no token sees its future.
    last = config.num_layers - 1
    weights = seen[f"blocks.{last}.attention.weights"][0]  # (T, T), of head 0
    print("Where head 0 of the last block looks, in percent:")
    print(" " * 8 + "".join(f"{name!r:>8}" for name in names))
    for row, name in enumerate(names):
        print(f"{name!r:>8}" + "".join(f"{100 * weight:8.0f}" for weight in weights[row, : row + 1].tolist()))
    # Each block adds to what it was given. Norm and head can read that half-way, too: what would the answer be now?
    print("What it would say if it were stopped after each block:")
    for layer in range(config.num_layers):
        with torch.no_grad():
            logits = model.logits(model.final_norm(seen[f"blocks.{layer}.output"][-1]))
        probability, token_id = logits.softmax(dim=-1).max(dim=-1)
        print(f"  after block {layer}: {tokenizer.token_text(int(token_id))!r} with {probability:.1%}")
    print(
        "\nNext: the notebooks in notebooks/ explain each part; `sheepop demo` trains a larger model for some minutes;"
    )
    print("docs/architecture.md tells how it all works.")


def write(model: TransformerModel, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float = 0.8) -> str:
    """Return what the model writes after a prompt."""
    settings = SamplingSettings(temperature=temperature)
    return complete(model, tokenizer, prompt, settings, max_new_tokens=tokens, seed=SEED).completions[0].text


if __name__ == "__main__":
    main()
