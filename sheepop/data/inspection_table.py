"""The figures of an inspection as lines for a terminal."""

from typing import Any

from sheepop.utils.logging import format_count

NAME_WIDTH = 18
SHOWN = 4


def format_inspection(result: dict[str, Any]) -> str:
    """Return the table that `sheepop inspect` prints: a name and its figures a line, examples, tokenizers, advice."""
    lines = [f"{name:>{NAME_WIDTH}}  {value}" for name, value in rows_of(result)]
    lines += ["", f"{'tokenizer':>{NAME_WIDTH}}  {'entries':>8}  {'bytes/token':>11}  {'tokens':>8}"]
    lines += [
        f"{_fit(row['name']):>{NAME_WIDTH}}  {row['vocab_size']:>8,}  {row['bytes_per_token']:>11.2f}  "
        f"{format_count(row['tokens']):>8}"
        for row in result["tokenizers"]
    ]
    for title, shown in examples_of(result):
        lines += ["", title, *(f"  {text}" for text in shown)]
    if result["warnings"]:
        lines += ["", "Mind", *(f"  - {text}" for text in result["warnings"])]
    lines += ["", "Advice", *(f"  {text}" for text in result["advice"]["text"])]
    return "\n".join(lines)


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures as pairs of a name and a line of text."""
    files, lengths, pii = result["files"], result["lengths"], result["pii"]
    exact, near = result["duplicates"]["exact"], result["duplicates"]["near"]
    quality, split, compression = result["quality"], result["split"], result["compression"]
    quantiles = lengths["quantiles"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in list(files["kinds"].items())[:SHOWN])
    unreadable = f"; {len(files['unreadable'])} not readable" if files["unreadable"] else ""
    across = split["near_duplicates_across"]
    broken = ", ".join(f"{rule} {count:,}" for rule, count in list(quality["broken"].items())[:SHOWN])
    found = ", ".join(f"{kind} {count:,}" for kind, count in pii["found"].items())
    return [
        ("files", f"{files['number']:,} ({kinds}), {format_count(files['bytes'])} bytes{unreadable}"),
        ("documents", f"{result['documents']:,}"),
        (
            "text",
            f"{format_count(result['bytes'])} bytes, {format_count(result['characters'])} characters, "
            f"{format_count(result['words'])} words",
        ),
        (
            "length",
            f"median {quantiles['0.5']:,} characters, 5 % below {quantiles['0.05']:,}, 5 % above "
            f"{quantiles['0.95']:,}, longest {quantiles['1']:,}",
        ),
        ("encodings", ", ".join(f"{name} {count:,}" for name, count in result["encodings"].items())),
        (
            "languages",
            _shares(result["languages"]["shares"]) + _sampled(result["languages"]["documents"], result["documents"]),
        ),
        (
            "exact duplicates",
            f"{exact['documents']:,} documents ({exact['share']:.1%}), {format_count(exact['bytes'])} bytes",
        ),
        (
            "near duplicates",
            f"{near['documents']:,} documents ({near['share']:.1%}) with {near['threshold']:.0%} of their phrases in "
            f"common"
            + (f" (among {near['compared']:,} alone; in all, more)" if near["compared"] < result["documents"] else ""),
        ),
        ("boilerplate", f"{result['boilerplate']['share_of_characters']:.2%} of the text"),
        (
            "personal data",
            (f"{found}, in {pii['documents_with']:,} documents" if found else "none found")
            + _sampled(pii["documents"], result["documents"]),
        ),
        (
            "quality rules",
            (f"broken by {sum(quality['broken'].values()):,} documents: {broken}" if broken else "none broken")
            + _sampled(quality["documents"], result["documents"]),
        ),
        (
            "split",
            f"{format_count(split['train_bytes'])} bytes to train on, {format_count(split['val_bytes'])} to validate "
            f"({split['how']})"
            if split["val_bytes"]
            else split["how"],
        ),
        (
            "overlap",
            "by position: not looked for" if across is None else f"{across:,} near duplicates across the split",
        ),
        ("compressed", f"{compression['ratio']:.2f} times smaller by zlib{_of_bytes(compression, result)}"),
    ]


def examples_of(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return titles and lines of what deserves a look: similar documents, recurring lines, unreadable files."""
    near = [f"{pair['text']!r} is like {pair['like']!r}" for pair in result["duplicates"]["near"]["examples"]]
    lines = [f"{line['documents']:,} times: {line['line']!r}" for line in result["boilerplate"]["lines"]]
    unreadable = result["files"]["unreadable"]
    more = [f"and {len(unreadable) - SHOWN} more"] if len(unreadable) > SHOWN else []
    shown = [
        ("Near duplicates", near[:SHOWN]),
        ("Lines in many documents", lines[:SHOWN]),
        ("Not readable", [*unreadable[:SHOWN], *more]),
    ]
    return [(title, texts) for title, texts in shown if texts]


def _shares(shares: dict[str, float]) -> str:
    listed = ", ".join(f"{code} {share:.1%}" for code, share in list(shares.items())[:SHOWN])
    return listed + (f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else "")


def _sampled(documents: int, of_documents: int) -> str:
    return f" (of {documents:,} documents looked at)" if documents < of_documents else ""


def _of_bytes(compression: dict[str, Any], result: dict[str, Any]) -> str:
    return f" ({format_count(compression['bytes'])} bytes tried)" if compression["bytes"] < result["bytes"] else ""


def _fit(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else "…" + name[1 - NAME_WIDTH :]
