"""Personal data in text: e-mail addresses, telephone, card and account numbers, internet addresses.

Found by their form and their check digits, so names and street addresses are not found, and a number that only looks
like one of these may be taken for it.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator

# What must not stand before a number is looked for after its first character: a pattern that begins with a set of
# characters is searched for several times faster than one that begins by looking back.
EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?!\w)")
IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII)
# In groups of four; American Express 4, 6, 5.
CARD = re.compile(
    r"[2-6](?<![\w.-].)(?:\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}|(?<=3)\d{3}[ -]?\d{6}[ -]?\d{5})(?![\w-])", re.ASCII
)
IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?!\w|\.\d)", re.ASCII)
IPV6 = re.compile(r"[0-9A-Fa-f:](?<![\w:.].)[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{0,37}(?![\w:])", re.ASCII)
SOCIAL_SECURITY = re.compile(r"\d(?<![\w.-].)(?<!9)\d{2}(?<!000|666)-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.ASCII)
# International numbers after their plus sign (ITU-T E.164: up to fifteen digits), and those of North America.
PLUS_PHONE = re.compile(r"\+(?<![\w+].)\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}(?!\w)", re.ASCII)
PHONE = re.compile(
    r"[2-9(](?<![\w.+/-].)(?:(?<=\()[2-9]\d{2}\) ?|(?<!\()\d{2}[-. ])[2-9]\d{2}[-. ]\d{4}(?![\w-])", re.ASCII
)


def find_pii(text: str) -> dict[str, int]:
    """Return how many pieces of personal data of each kind stand in a text; kinds without any are left out."""
    return dict(sorted(Counter(kind for kind, _, _ in _spans(text)).items()))


def replace_pii(text: str) -> str:
    """Return the text with each piece of personal data replaced by its kind in angle brackets, such as `<EMAIL>`."""
    # What is left around a replacement can only now be seen to stand alone; every round takes digits or an @ away.
    while spans := list(_spans(text)):
        pieces, end = [], 0
        for kind, start, stop in sorted(spans, key=lambda span: span[1]):
            pieces += [text[end:start], f"<{kind.upper().replace(' ', '_')}>"]
            end = stop
        text = "".join(pieces) + text[end:]
    return text


def passes_luhn(digits: str) -> bool:
    """Say whether the last digit is right for those before it (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield kind, start and stop of each piece; none overlap, what an earlier pattern found being taken."""
    for kind, pattern, is_real, mark in PATTERNS:
        if mark not in text:
            continue
        found = [match.span() for match in pattern.finditer(text) if is_real(match.group())]
        yield from ((kind, start, stop) for start, stop in found)
        text = _blank(text, found)


def _blank(text: str, spans: list[tuple[int, int]]) -> str:
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [text[end:start], "\0" * (stop - start)]
        end = stop
    return "".join(pieces) + text[end:] if spans else text


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and passes_luhn(digits)


def _is_iban(text: str) -> bool:
    """Check the remainder modulo 97 (ISO 13616-1)."""
    code = text.replace(" ", "")
    return 15 <= len(code) <= 34 and int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97 == 1


def _is_public_address(text: str) -> bool:
    """Say whether it is an address of the internet: a private one tells nothing about a person."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _is_phone(text: str) -> bool:
    return 8 <= sum(map(str.isdigit, text)) <= 15


def _any(_text: str) -> bool:
    return True


# Kind, pattern, the test of a match, and a text that must stand somewhere for a match (searching for it is cheap).
PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool], str], ...] = (
    ("email", EMAIL, _any, "@"),
    ("iban", IBAN, _is_iban, ""),
    ("card", CARD, _is_card, ""),
    ("ip address", IPV4, _is_public_address, "."),
    ("ip address", IPV6, _is_public_address, ":"),
    ("social security", SOCIAL_SECURITY, _any, "-"),
    ("phone", PLUS_PHONE, _is_phone, "+"),
    ("phone", PHONE, _is_phone, ""),
)
