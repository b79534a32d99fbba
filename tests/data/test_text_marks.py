"""What texts begin and end with, by the templates of a `tokenizer.json`."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from sheepop.data.text_marks import set_text_marks
from sheepop.data.tokenizer import Tokenizer
from sheepop.data.tokenizer_parts import special_token
from sheepop.utils.errors import DataError

NAMES = ["<s>", "</s>", "<|im_end|>", "<|bos|>"]


@pytest.fixture(scope="module")
def plain():
    return Tokenizer.train("bpe", ["the sheep sees the dog"] * 3, vocab_size=280)


def backend_of(tokenizer, *names):
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.add_special_tokens([special_token(name) for name in names])
    return backend


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_ours_begin_with_the_end_of_the_one_before(kind):
    tokenizer = Tokenizer.train(kind, ["the sheep sees the dog"] * 3, vocab_size=280)
    assert tokenizer.start_ids == [tokenizer.end_of_text_id]
    assert tokenizer.begin_of_text_id == tokenizer.end_of_text_id
    assert json.loads(tokenizer.to_json())["post_processor"] is None


@given(st.lists(st.sampled_from(NAMES), max_size=3), st.sampled_from(NAMES))
def test_marks_that_are_set_are_found_again(plain, start, end):
    backend = backend_of(plain, *NAMES)
    set_text_marks(backend, start, end)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(Tokenizer(backend).to_json()))
    assert tokenizer.end_of_text == end
    assert tokenizer.start_ids == [backend.token_to_id(name) for name in start]
    assert tokenizer.encode("the sheep") == plain.encode("the sheep")
    again = plain.with_marks([], plain.end_of_text_id).with_marks([3], plain.end_of_text_id)
    assert (again.start_ids, again.end_of_text_id) == ([3], plain.end_of_text_id)


def test_templates_of_others(plain):
    """Llama 3's stands behind another step, and says nothing of the end; an end in the template of one text is none."""
    backend = backend_of(plain, "<|begin_of_text|>", "<|end_of_text|>")
    begin, end = (backend.token_to_id(f"<|{mark}_of_text|>") for mark in ("begin", "end"))
    special = [("<|begin_of_text|>", begin), ("<|endoftext|>", plain.end_of_text_id)]
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|endoftext|>",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=special,
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer = Tokenizer(backend)
    assert tokenizer.start_ids == [begin]
    assert tokenizer.end_of_text == "<|endoftext|>"  # by its name
    assert tokenizer.special_ids["<|end_of_text|>"] == end


def test_marks_that_are_no_tokens_are_said(plain):
    layout = json.loads(plain.with_marks([], plain.end_of_text_id).to_json())
    layout["post_processor"] = json.loads(json.dumps(layout["post_processor"]).replace("<|endoftext|>", "<|nothing|>"))
    layout["post_processor"]["special_tokens"]["<|nothing|>"]["ids"] = [3]
    with pytest.raises(DataError, match=r"begins or ends a text with <\|nothing\|>"):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(layout)))
