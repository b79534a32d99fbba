import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop.data.filters import FilterSettings, find_pii, language_of, reason_to_drop, replace_pii
from sheepop.data.pii import passes_luhn
from sheepop.data.quality import quality_problem, repetition_problem
from sheepop.utils.errors import ConfigError

PROSE = (
    "The old shepherd had left his house before the sun came up. His dog ran ahead of him, and the sheep followed "
    "slowly along the narrow path. Nobody else was awake in that valley. When they reached the top of the hill, he sat "
    "down with a piece of bread. Clouds were moving in from the sea, so he thought about turning back. Instead he "
    "waited for the rain to begin. It never did."
)
GERMAN = (
    "Der alte Schäfer hatte sein Haus verlassen, bevor die Sonne aufging. Sein Hund lief voraus, und die Schafe "
    "folgten langsam auf dem schmalen Weg. Niemand sonst war wach in diesem Tal."
)


def test_nothing_is_dropped_by_default():
    for text in ("", "x", PROSE, "mail me: a@b.org", "{" * 1000):
        assert reason_to_drop(text, FilterSettings()) is None


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("  ten signs \n", {"min_characters": 10}, "too short"),
        ("ten  signs", {"min_characters": 10, "max_characters": 10}, None),
        ("elevensigns", {"max_characters": 10}, "too long"),
        (PROSE, {"languages": ("en",)}, None),
        (GERMAN, {"languages": ("en", "fr")}, "language: de"),
        (GERMAN, {"languages": ("en", "de")}, None),
        ("12345", {"languages": ("en",)}, "language: und"),
        (PROSE, {"quality": True, "languages": ("en",)}, None),
        (PROSE * 3, {"quality": True}, "quality: repeated phrases"),
        ("word " * 5, {"quality": True, "min_characters": 200}, "too short"),
        (PROSE + " a@example.org", {"pii": "drop"}, "pii: email"),
        (PROSE + " a@example.org", {"pii": "replace"}, None),
    ],
)
def test_reasons(text, settings, reason):
    assert reason_to_drop(text, FilterSettings(**settings)) == reason


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"min_characters": -1}, "-1"),
        ({"min_characters": 9, "max_characters": 8}, "is 8"),
        ({"max_characters": 0}, "is 0"),
        ({"pii": "hide"}, "'hide'"),
        ({"languages": ("english",)}, "'english'"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ConfigError, match=says):
        FilterSettings(**settings)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (PROSE, "en"),
        (GERMAN, "de"),
        ("Le vieux berger avait quitté sa maison avant le lever du soleil, et son chien courait devant lui.", "fr"),
        ("El viejo pastor salió de su casa antes del amanecer y su perro corría delante de él por el camino.", "es"),
        ("Старый пастух вышел из дома до восхода солнца, и его собака бежала впереди.", "ru"),
        ("老牧羊人在太阳升起之前就离开了家，他的狗跑在前面，羊群慢慢地跟在后面。", "zh"),
        ("", "und"),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", "und"),
    ],
)
def test_languages(text, code):
    assert language_of(text) == code


def test_a_quotation_does_not_change_the_language_of_a_long_text():
    assert language_of(GERMAN + PROSE * 20) == "en"


def test_prose_passes():
    assert quality_problem(PROSE, is_english=True) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "few words"),
        (PROSE + " Lorem ipsum dolor.", "lorem ipsum"),
        (PROSE + " function() { return 1 }", "curly bracket"),
        (PROSE.replace(".", ","), "few sentences"),
        ("\n".join(f"- point {n} of the list is this one." for n in range(20)), "bullet points"),
        (PROSE.replace(". ", ". Read more...\n"), "ellipsis lines"),
        ("\n\n".join([PROSE, "Same here. Same here.", "Same here. Same here."]), "repeated paragraphs"),
        ("\n".join([*PROSE.split(". "), *["Subscribe to our letter. Go."] * 5]), "repeated lines"),
        ("A b c d e. F. " * 4, "few words"),
        (" ".join(f"I{n % 10}. a{n % 7}" for n in range(60)), "length of words"),
        (" ".join(f"incomprehensible{n}." for n in range(60)), "length of words"),
        (PROSE.replace("e ", "e # "), "symbols"),
        (" ".join([PROSE, *map(str, range(1000, 1030))]), "words without letters"),
        (PROSE.replace("the", "die").replace("to", "tu").replace("of", "ov").replace("with", "mit"), None),
        (PROSE * 2, "repeated phrases"),
    ],
)
def test_each_rule_of_quality(text, problem):
    assert quality_problem(text) == problem


def test_the_rule_of_stop_words_is_for_english():
    plain = PROSE
    for word in ("the", "be", "to", "of", "and", "that", "have", "with"):
        plain = " ".join("xyz" if part.lower().strip(".,") == word else part for part in plain.split())
    assert quality_problem(plain) is None
    assert quality_problem(plain, is_english=True) == "few stop words"


def test_scripts_without_spaces_are_not_judged_by_their_words():
    text = "老牧羊人离开了家。他的狗跑在前面。羊群跟在后面。山谷里没有人。他坐下来吃面包。天没有下雨。"
    assert quality_problem(text) is None


def slow_repeated_share(words, length):
    """The share of characters in runs that stood before, straight from its definition."""
    seen, marked = set(), set()
    for start in range(len(words) - length + 1):
        run = tuple(words[start : start + length])
        if run in seen:
            marked |= set(range(start, start + length))
        seen.add(run)
    return sum(len(words[place]) for place in marked) / max(1, sum(map(len, words)))


def slow_top_share(words, length):
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    counts = {run: runs.count(run) for run in runs}
    most = max(counts.values(), default=0)
    shares = [most * sum(map(len, run)) for run, count in counts.items() if count == most and most > 1]
    return max(shares, default=0) / max(1, sum(map(len, words)))


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", *(f"word{n}" for n in range(40))]), max_size=80))
def test_repetition_follows_its_definition(words):
    top = {2: 0.2, 3: 0.18, 4: 0.16}
    again = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    expected = any(slow_top_share(words, length) > most for length, most in top.items()) or any(
        slow_repeated_share(words, length) > most for length, most in again.items()
    )
    assert (repetition_problem(words) is not None) == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jo.doe+x@mail.example.co.uk!", "email"),
        ("müller@bücher.example", "email"),
        ("call +44 20 7946 0958 now", "phone"),
        ("(415) 555-2671", "phone"),
        ("415-555-2671.", "phone"),
        ("4111 1111 1111 1111", "card"),
        ("5500-0000-0000-0004", "card"),
        ("378282246310005", "card"),
        ("to DE89 3704 0044 0532 0130 00 by May", "iban"),
        ("GB82WEST12345698765432", "iban"),
        ("from 8.8.8.8, port 53", "ip address"),
        ("2001:4860:4860::8888", "ip address"),
        ("123-45-6789", "social security"),
    ],
)
def test_personal_data_is_found_and_replaced(text, kind):
    assert find_pii(text) == {kind: 1}
    replaced = replace_pii(text)
    assert f"<{kind.upper().replace(' ', '_')}>" in replaced
    assert find_pii(replaced) == {}


@pytest.mark.parametrize(
    "text",
    [
        "in 1914-1918, at 12:30:45 on 2024-05-06",
        "ISBN 978-0-306-40615-7",
        "4111 1111 1111 1112",  # a wrong check digit
        "DE88 3704 0044 0532 0130 00",
        "192.168.1.1 and 127.0.0.1 and 300.1.2.3",
        "version 1.2.3.4.5",
        "user@host",
        "3.14159265358979",
        "std::vector::size",
        "+1 and +2 = 3",
        "000-12-3456",
        "12345678901234567890123456789012345",
    ],
)
def test_other_numbers_are_left_alone(text):
    assert find_pii(text) == {}
    assert replace_pii(text) == text


@given(st.text(alphabet="0123456789 .-+()@:abcDEZ/", max_size=120))
def test_nothing_is_left_after_replacing(text):
    replaced = replace_pii(text)
    assert find_pii(replaced) == {}
    assert (replaced == text) == (find_pii(text) == {})


@given(st.integers(0, 10**18))
def test_one_check_digit_is_right(number):
    assert sum(passes_luhn(f"{number}{digit}") for digit in range(10)) == 1


def test_much_personal_data_takes_no_time():
    text = "a.b@example.org 8.8.8.8 " * 20_000
    assert find_pii(text) == {"email": 20_000, "ip address": 20_000}
    assert replace_pii("x" * 200_000 + "@" + "1" * 200_000).startswith("x")
