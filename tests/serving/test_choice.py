"""Texts in parts: what is told is certain, and the tokens are those of the text."""

from hypothesis import given, settings
from hypothesis import strategies as st
from running_server import TOKENIZER

from sheepop.generation.completion import Transcript
from sheepop.generation.request import TokenEvent
from sheepop.serving.choice import Choice, Piece

TEXTS = st.text(st.sampled_from("the 羊🐑"), min_size=1, max_size=20)
STOPS = st.lists(st.text(st.sampled_from("the羊"), min_size=1, max_size=4), max_size=3)


@settings(deadline=None)
@given(text=TEXTS, stop=STOPS, ends_by_itself=st.booleans())
def test_parts_are_the_text_and_its_tokens(text: str, stop: list[str], ends_by_itself: bool) -> None:
    token_ids = TOKENIZER.encode(text)
    events = [TokenEvent(0, 0, token_id) for token_id in token_ids]
    if ends_by_itself:
        events.append(TokenEvent(0, 0, None, "stop"))
    else:
        events[-1] = TokenEvent(0, 0, token_ids[-1], "length")
    choice, whole = Choice(4, TOKENIZER, stop), Transcript(TOKENIZER, stop, None)
    pieces: list[Piece] = []
    taken = 0
    for event in events:
        piece = choice.take(event)
        pieces += [] if piece is None else [piece]
        taken += event.token_id is not None
        stopped = event.token_id is not None and whole.add(event.token_id)
        assert choice.is_finished == (stopped or event.finish_reason is not None)
        if choice.is_finished:
            break
    said = whole.finish()
    assert "".join(piece.text for piece in pieces) == said
    assert all(piece.text or piece.finish_reason for piece in pieces)
    assert [piece.finish_reason is not None for piece in pieces].index(True) == len(pieces) - 1
    assert sum(piece.num_drawn for piece in pieces) == taken
    assert {piece.choice for piece in pieces} == {4}
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.token_id for token in tokens] == token_ids[: len(tokens)]
    for token in tokens:  # each begins where its character does
        assert token.offset < len(said)
    if said == text:
        assert len(tokens) == taken
