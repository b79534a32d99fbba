import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import Config, ModelConfig, parse_config
from sheepop.data.prepare import prepare_corpus
from sheepop.data.tokenizer import Tokenizer
from sheepop.evaluation import perplexity as module
from sheepop.evaluation.perplexity import (
    Scores,
    bits_per_byte,
    evaluate_checkpoint,
    evaluate_tokens,
    perplexity,
    word_perplexity,
)
from sheepop.models.pretrained import save_weights, stored_weights
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.files import write_json

VOCAB, CONTEXT, END = 23, 7, 0
TEXT = "The sheep ate the grass. Then the sheep slept, and the grass grew again é羊.\n" * 9


def tiny(**changes: object) -> TransformerModel:
    torch.manual_seed(2)
    sizes = {"vocab_size": VOCAB, "d_model": 12, "num_layers": 2, "num_heads": 3, "d_ff": 20, "max_seq_len": 11}
    return TransformerModel(ModelConfig.model_validate({**sizes, "dropout": 0.4, "init_std": 0.4, **changes})).eval()


MODEL = tiny()


def some_tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.uint16)


def score_one_by_one(tokens: np.ndarray, context: int, stride: int, *, document_mask: bool = False) -> Scores:
    """Score each target alone, with the context that its window gives it."""
    loss, first, among_five = 0.0, 0, 0
    for target in range(1, len(tokens)):
        window = 0 if target <= context else -(-(target - context) // stride)
        start = window * stride
        if document_mask:
            ends = [at for at in range(start, target) if tokens[at] == END]
            start = ends[-1] if ends else start
        logits = MODEL(torch.from_numpy(tokens[start:target].astype(np.int64))[None])[0, -1].double()
        answer = int(tokens[target])
        loss -= logits.log_softmax(-1)[answer].item()
        rank = int((logits > logits[answer]).sum())
        first += rank == 0
        among_five += rank < 5
    count = len(tokens) - 1
    return Scores(loss / count, first / count, among_five / count, count)


def assert_same(found: Scores, expected: Scores) -> None:
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy)
    assert found.top5_accuracy == pytest.approx(expected.top5_accuracy)


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(2, 40),
    context=st.integers(1, 11),
    stride=st.integers(1, 11),
    batch_size=st.integers(1, 5),
    document_mask=st.booleans(),
)
def test_every_target_is_scored_once_with_the_context_that_is_promised(
    length: int, context: int, stride: int, batch_size: int, document_mask: bool
) -> None:
    stride = min(stride, context)
    tokens = some_tokens(length)
    found = evaluate_tokens(
        MODEL,
        tokens,
        context=context,
        stride=stride,
        batch_size=batch_size,
        document_mask=document_mask,
        end_of_text_id=END,
    )
    assert_same(found, score_one_by_one(tokens, context, stride, document_mask=document_mask))


def test_windows_do_not_overlap_by_default() -> None:
    tokens = some_tokens(40)
    assert_same(evaluate_tokens(MODEL, tokens, context=CONTEXT), score_one_by_one(tokens, CONTEXT, CONTEXT))


def test_logits_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(60)
    whole = evaluate_tokens(MODEL, tokens, context=CONTEXT, batch_size=4)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 3 * VOCAB)
    assert_same(evaluate_tokens(MODEL, tokens, context=CONTEXT, batch_size=4), whole)


def test_max_tokens_scores_windows_spread_over_the_whole_text() -> None:
    # Only the second half holds a token that the first does not; a score over the beginning alone would miss it.
    first_half, second_half = np.full(10 * CONTEXT, 3, np.uint16), np.full(10 * CONTEXT, 9, np.uint16)
    tokens = np.concatenate([first_half, second_half, second_half[:1]])
    part = evaluate_tokens(MODEL, tokens, context=CONTEXT, max_tokens=4 * CONTEXT)
    whole = evaluate_tokens(MODEL, tokens, context=CONTEXT)
    assert part.tokens == 4 * CONTEXT
    assert part.loss == pytest.approx(whole.loss, rel=0.05)
    assert evaluate_tokens(MODEL, tokens, context=CONTEXT, max_tokens=10**6) == whole
    assert evaluate_tokens(MODEL, tokens, context=CONTEXT, max_tokens=1).tokens == CONTEXT


def test_a_model_that_knows_nothing_guesses_uniformly() -> None:
    model = tiny()
    torch.nn.init.zeros_(model.head.weight)
    scores = evaluate_tokens(model, some_tokens(100), context=CONTEXT)
    assert scores.loss == pytest.approx(math.log(VOCAB))


def test_a_vocabulary_smaller_than_five_has_a_top_five() -> None:
    scores = evaluate_tokens(tiny(vocab_size=3), some_tokens(30) % 3, context=CONTEXT)
    assert scores.top5_accuracy == 1


def test_training_goes_on_undisturbed() -> None:
    model = tiny().train()
    before = torch.get_rng_state()
    evaluate_tokens(model, some_tokens(30), context=CONTEXT)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model(torch.tensor([[1, 2, 3]])).sum().backward()


def test_lower_precision_stays_near() -> None:
    tokens = some_tokens(100)
    exact = evaluate_tokens(MODEL, tokens, context=CONTEXT)
    rough = evaluate_tokens(MODEL, tokens, context=CONTEXT, autocast_dtype=torch.bfloat16)
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"context": 12}, ConfigError, "context is 12"),
        ({"context": 0}, ConfigError, "context is 0"),
        ({"stride": 8}, ConfigError, "stride is 8"),
        ({"stride": 0}, ConfigError, "stride is 0"),
        ({"batch_size": 0}, ConfigError, "batch size is 0"),
        ({"tokens": some_tokens(1)}, DataError, "1 tokens"),
    ],
)
def test_what_cannot_be_scored_is_said(changes: dict[str, object], error: type[Exception], message: str) -> None:
    request = {"tokens": some_tokens(30), "context": CONTEXT} | changes
    with pytest.raises(error, match=message):
        evaluate_tokens(MODEL, **request)  # type: ignore[arg-type]


def test_figures_follow_from_the_loss() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
    # Guessing each of 4 tokens among 256 costs 8 bits each; they spell 16 bytes in 2 words.
    assert bits_per_byte(math.log(256), tokens=4, num_bytes=16) == pytest.approx(2)
    assert word_perplexity(math.log(256), tokens=4, words=2) == pytest.approx(256**2)
    assert bits_per_byte(1.0, tokens=1, num_bytes=0) == word_perplexity(1.0, tokens=1, words=0) == math.inf


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepared = prepare_corpus(
        [tmp_path / "text.txt"],
        tmp_path / "corpus",
        tokenizer="char",
        vocab_size=60,
        val_fraction=0.3,
        seed=1,
        separator=None,
    )
    return prepared.path


@pytest.fixture
def checkpoint(tmp_path: Path, corpus: Path) -> Path:
    tokenizer = Tokenizer.load(corpus)
    model = tiny(vocab_size=tokenizer.vocab_size)
    config = parse_config(
        {"model": model.config.model_dump(), "data": {"path": str(corpus), "max_length": CONTEXT}}, source="test"
    )
    folder = tmp_path / "checkpoint_step_1"
    write_checkpoint(folder, model, config, tokenizer)
    return folder


def write_checkpoint(folder: Path, model: TransformerModel, config: Config, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    save_weights(stored_weights(model), model.config, folder / "model.safetensors")
    write_json(folder / "config.json", config.model_dump())
    tokenizer.save(folder / "tokenizer.json")


def test_a_checkpoint_is_scored_on_its_own_validation_split(checkpoint: Path, corpus: Path) -> None:
    result = evaluate_checkpoint(checkpoint)
    contract = [
        "loss",
        "perplexity",
        "word_perplexity",
        "bits_per_byte",
        "accuracy",
        "top5_accuracy",
        "tokens",
        "bytes",
    ]
    assert list(result)[: len(contract)] == contract
    val = json.loads((corpus / "manifest.json").read_text())["splits"]["val"]
    assert result["tokens"] == val["tokens"] - 1
    assert result["bytes"] == val["bytes"]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) * result["tokens"] / val["bytes"])
    assert (result["context"], result["stride"], result["split"]) == (CONTEXT, CONTEXT, "val")
    assert evaluate_checkpoint(checkpoint, corpus) == result
    shorter = evaluate_checkpoint(checkpoint, context=3)
    assert (shorter["context"], shorter["stride"], shorter["tokens"]) == (3, 3, result["tokens"])
    assert shorter["loss"] != result["loss"]
    assert evaluate_checkpoint(checkpoint, corpus, split="train")["tokens"] > result["tokens"]


def test_sliding_context_scores_the_same_targets(checkpoint: Path) -> None:
    plain, sliding = evaluate_checkpoint(checkpoint), evaluate_checkpoint(checkpoint, stride=3)
    assert sliding["tokens"] == plain["tokens"]
    assert sliding["stride"] == 3
    assert sliding["loss"] != plain["loss"]


def test_text_files_are_scored_whole(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("The sheep sleeps.<|endoftext|>Grass é grows", encoding="utf-8")
    result = evaluate_checkpoint(checkpoint, tmp_path / "other.txt")
    # Two documents of characters (é is one of the vocabulary), the second mark between them and the closing one.
    assert result["tokens"] == len("The sheep sleeps.") + len("Grass é grows") + 2
    assert result["bytes"] == len("The sheep sleeps.") + len("Grass é grows".encode())
    assert result["words"] == 6
    assert result["split"] is None


def test_a_text_scores_as_it_does_prepared(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    prepared = evaluate_checkpoint(checkpoint)
    validation = Tokenizer.load(corpus).decode(np.fromfile(corpus / "val.bin", dtype="<u2").tolist())
    (tmp_path / "validation.txt").write_bytes(validation.encode())
    as_text = evaluate_checkpoint(checkpoint, tmp_path / "validation.txt")
    assert {**as_text, "split": "val", "data": str(corpus)} == prepared


def test_a_corpus_of_another_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(TEXT.upper(), encoding="utf-8")
    other = prepare_corpus(
        [tmp_path / "more.txt"],
        tmp_path / "other",
        tokenizer="char",
        vocab_size=60,
        val_fraction=0.3,
        seed=1,
        separator=None,
    )
    with pytest.raises(CheckpointError, match="another tokenizer"):
        evaluate_checkpoint(checkpoint, other.path)


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint: Path) -> None:
    Tokenizer.train("bpe", [TEXT], vocab_size=300).save(checkpoint / "tokenizer.json")
    with pytest.raises(CheckpointError, match="do not belong together"):
        evaluate_checkpoint(checkpoint)


def test_a_missing_tokenizer_is_the_checkpoints_fault(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer of the checkpoint"):
        evaluate_checkpoint(checkpoint)


def test_a_corpus_that_has_gone_is_said(checkpoint: Path, corpus: Path) -> None:
    corpus.rename(corpus.with_name("elsewhere"))
    with pytest.raises(DataError, match="not there any more"):
        evaluate_checkpoint(checkpoint)


def test_a_checkpoint_that_names_no_text_needs_one(checkpoint: Path) -> None:
    settings_ = json.loads((checkpoint / "config.json").read_text())
    settings_["data"]["path"] = None
    write_json(checkpoint / "config.json", settings_)
    with pytest.raises(ConfigError, match="--data"):
        evaluate_checkpoint(checkpoint)


def test_damaged_weights_give_null_and_not_a_crash(checkpoint: Path) -> None:
    settings_ = json.loads((checkpoint / "config.json").read_text())
    model = TransformerModel(ModelConfig.model_validate(settings_["model"]))
    torch.nn.init.constant_(model.token_embedding.weight, math.nan)
    save_weights(stored_weights(model), model.config, checkpoint / "model.safetensors")
    result = evaluate_checkpoint(checkpoint)
    assert result["loss"] is result["perplexity"] is result["bits_per_byte"] is None
    json.dumps(result, allow_nan=False)
