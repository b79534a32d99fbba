import ast

import pytest

from sheepop.learn.diagrams.wording import condition_words, first_sentence, short


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("result is None", "no result"),
        ("run.packing is not None", "there is a packing"),
        ("not result.is_updated or result.verdict == 'spike'", "result is not updated or result verdict is ‘spike’"),
        ("a and (b or c_d)", "a and either b or c d"),
        ("not result.overflowed", "result not overflowed"),
        ("not state.total_steps", "no total steps"),
        ("not context_was_full", "context was not full"),
        ("done % training.log_interval == 0", "done divides by log interval"),
        ("stop is not None and stop.is_made and world.size == 1", "stop is made and world size is 1"),
        ("is_review_due(run, seconds)", "is_review_due()"),
        ("len(texts) >= most", "number of texts is at least most"),
        ("math.isfinite(loss)", "loss is finite"),
        ("finish_reasons[sample] == 'stop'", "finish reasons is ‘stop’"),
    ],
)
def test_a_condition_reads_as_a_person_would_say_it(code: str, words: str) -> None:
    assert condition_words(ast.parse(code, mode="eval").body) == words


@pytest.mark.parametrize(
    ("sentence", "beginning"),
    [
        ("Return softmax(Q Kᵀ / √C, over the keys) V, as it is", "softmax(Q Kᵀ / √C, over the keys) V"),
        ("Turn each pair (2i, 2i + 1) of `vectors` (..., C) by an angle", "Turn each pair of 'vectors' by an angle"),
        ("Validate, sample and save", "Validate, sample and save"),
        ("Say which key each query may see, (T, S), or more", "Say which key each query may see"),
        ("word " * 30, "word " * 13 + "word …"),
    ],
)
def test_a_sentence_is_cut_where_it_goes_into_details(sentence: str, beginning: str) -> None:
    assert short(sentence) == beginning


def test_the_first_sentence_does_not_end_at_a_citation() -> None:
    assert first_sentence("Drop some (Ba et al. 2016) of\nall. More.\n\nElse.") == "Drop some (Ba et al. 2016) of all"
