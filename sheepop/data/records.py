"""Tables and records → texts: CSV, JSON, JSONL and Parquet, whose text stands in one of their columns."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import BinaryIO, Literal

from sheepop.data.encodings import TextStream, byte_order_mark
from sheepop.data.splitting import lines_of
from sheepop.utils.errors import DataError
from sheepop.utils.logging import log

TEXT_COLUMNS = (
    "text",
    "content",
    "body",
    "document",
    "article",
    "story",
    "review",
    "review_body",
    "sentence",
    "message",
)
SAMPLE_RECORDS = 200
ARCHIVE_MARK = "!"  # stands between an archive and its member
MAX_COLUMNS = 30  # listed in an error
MAX_RECORD_CHARACTERS = 128 * 2**20
DELIMITERS = ",;\t|"
SEPARATORS = " \t\r\n,"  # between JSON values
Report = Callable[[str], None]
Record = tuple[int, object]  # its number in the file, from 1, and its value; None where it cannot be read


def text_column(records: Sequence[Mapping[str, object]], where: str) -> str:
    """Return the column that holds the text: one of TEXT_COLUMNS, else that with the longest strings on average.

    Raises:
        DataError: no column holds strings; lists the columns.
    """
    characters: dict[str, int] = {}
    first: dict[str, object] = {}
    varied: set[str] = set()
    for record in records:
        for name, value in record.items():
            characters[name] = characters.get(name, 0) + (len(value) if isinstance(value, str) else 0)
            if first.setdefault(name, value) != value:
                varied.add(name)
    by_name = {name.lower(): name for name, total in reversed(characters.items()) if total}
    for known in TEXT_COLUMNS:
        if known in by_name:
            return by_name[known]
    if not any(characters.values()):
        raise no_text_column(where, list(characters))
    # What is the same in every record is a label, however long.
    column = max(characters, key=lambda name: (characters[name] > 0 and name in varied, characters[name]))
    if ARCHIVE_MARK not in where:  # an archive may have thousands of members
        log(f'{where}: the text is read from the column "{column}", which has the longest texts.')
    return column


def no_text_column(where: str, columns: Sequence[str]) -> DataError:
    """Return the error that lists the columns, the first MAX_COLUMNS of them."""
    more = f" and {len(columns) - MAX_COLUMNS:,} more" if len(columns) > MAX_COLUMNS else ""
    listed = ", ".join(columns[:MAX_COLUMNS]) + more or "none at all"
    return DataError(f'{where} has no column with text; its columns: {listed}. Name the one with text "text".')


def texts_of_records(records: Iterable[Record], where: str, unit: str, report: Report) -> Iterator[str]:
    """Yield the text of each record, an object with the text column or itself a string; the others are counted.

    Raises:
        DataError: no record has text.
    """
    stream = iter(records)
    sample = list(islice(stream, SAMPLE_RECORDS))
    objects = [value for _, value in sample if isinstance(value, dict)]
    column = text_column(objects, where) if objects else None
    broken = first = 0
    has_text = False
    for number, value in chain(sample, stream):
        text = value.get(column) if isinstance(value, dict) and column is not None else value
        if isinstance(text, str) and is_unicode(text):
            has_text = True
            yield text
        else:
            broken, first = broken + 1, first or number
    what = f'an object with a text in "{column}"' if column else "a string, or an object with a text"
    if broken and not has_text:
        raise DataError(f"{where}: no {unit} is {what}; {unit} {first} is the first. Mend the file, or leave it out.")
    if broken:
        report(f"{where}: {broken} of its {unit}s left out, which are not {what}; the first is {unit} {first}.")


def is_unicode(text: str) -> bool:
    """Say whether a text has only characters: an escape can name half of a surrogate pair, which is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def records_of_json_lines(stream: BinaryIO, head: bytes, where: str) -> Iterator[Record]:
    """Yield the number and the value of each line that is not blank; None for one that is not JSON in UTF-8."""
    mark, encoding = byte_order_mark(head)
    if encoding and encoding != "utf-8":
        lines: Iterator[bytes] = (line.encode("utf-8") for line in lines_of(TextStream(stream, where)))
    else:
        stream.read(len(mark))
        lines = iter(lambda: stream.readline(MAX_RECORD_CHARACTERS), b"")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                value = None
            yield number, value


def records_of_json(chunks: Iterable[str], where: str) -> Iterator[Record]:
    """Yield the elements of a JSON array, or JSON values that follow each other; of one object what it consists of.

    An object without text of its own that holds a list of objects or strings (`{"data": [...]}`) stands for the list.

    Raises:
        DataError: not JSON, or cut off; says at which character.
    """
    values = json_values(chunks, where)
    beginning = list(islice(values, 2))
    if len(beginning) == 1 and isinstance(beginning[0], dict):
        beginning = _parts_of(beginning[0])
    return enumerate(chain(beginning, values), start=1)


def _parts_of(record: dict[str, object]) -> list[object]:
    if any(isinstance(value, str) and name.lower() in TEXT_COLUMNS for name, value in record.items()):
        return [record]
    lists = [value for value in record.values() if isinstance(value, list) and value]
    longest = max((value for value in lists if isinstance(value[0], dict | str)), key=len, default=None)
    return [record] if longest is None else longest


def json_values(chunks: Iterable[str], where: str) -> Iterator[object]:
    """Yield the elements of a JSON array, or values one behind the other; no more than one and a chunk are in memory.

    Raises:
        DataError: not JSON, or cut off; says at which character.
    """
    decode = json.JSONDecoder().raw_decode
    stream = iter(chunks)
    buffer, position, passed = "", 0, 0  # `passed` characters stand before the buffer
    is_array: bool | None = None
    is_ended = False
    while True:
        while position < len(buffer) and buffer[position] in SEPARATORS:
            position += 1
        if position < len(buffer):
            if is_array is None:
                is_array = buffer[position] == "["
                position += is_array
                continue
            if is_array and buffer[position] == "]":
                return
            try:
                value, end = decode(buffer, position)
            except RecursionError:
                raise DataError(f"{where} is not JSON that can be read: it is nested too deeply.") from None
            except json.JSONDecodeError as error:
                may_go_on = error.pos > len(buffer) - 64 or error.msg.startswith("Unterminated string")
                if is_ended or not may_go_on:
                    raise DataError(
                        f"{where} is not JSON: {error.msg} at character {passed + error.pos:,}. "
                        "Mend it, or leave it out."
                    ) from None
            else:
                # A number may go on behind the end of the buffer: of 1.5e3 there may be 1, 1. or 1.5e so far.
                is_open = isinstance(value, int | float) and not buffer[end : end + 64].strip(".eE+-")
                if not is_open or is_ended:
                    yield value
                    position = end
                    continue
        elif is_ended:
            if is_array:
                raise DataError(f"{where} is cut off: its JSON array has no end. Fetch or make the file again.")
            return
        passed += position
        buffer = buffer[position:]
        if len(buffer) > MAX_RECORD_CHARACTERS:
            raise DataError(f"{where} has one JSON value of more than {MAX_RECORD_CHARACTERS:,} characters.")
        position = 0
        more = [buffer]
        missing = max(1, len(buffer))  # twice as much as before, so a long value is not decoded over and over
        while missing > 0 and not is_ended:
            chunk = next(stream, None)
            is_ended = chunk is None
            more.append(chunk or "")
            missing -= len(chunk or "")
        buffer = "".join(more)


def records_of_csv(stream: TextStream, name: str, where: str) -> Iterator[Record]:
    """Yield the number and the cells by column of each row; the delimiter and whether there is a header are found out.

    Raises:
        DataError: not a table, or a cell of more than MAX_RECORD_CHARACTERS.
    """
    csv.field_size_limit(MAX_RECORD_CHARACTERS)  # the default of 131,072 is less than a long article
    lines = lines_of(stream)
    sample = list(islice(lines, 50))
    delimiter = "\t" if name.lower().endswith((".tsv", ".tab")) else _delimiter_of(sample)
    # Tab-separated files seldom quote: a lone quotation mark in them would swallow the lines that follow.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" and not _is_quoted(sample) else csv.QUOTE_MINIMAL
    rows = csv.reader(chain(sample, lines), delimiter=delimiter, quoting=quoting)
    try:
        first = next((row for row in rows if any(row)), [])
        header = first if _is_header(first) else [f"column {number}" for number in range(1, len(first) + 1)]
        beginning = [] if header is first else [first]
        for number, row in enumerate(chain(beginning, rows), start=1):
            if row:
                yield number, dict(zip(header, row, strict=True)) if len(row) == len(header) else None
    except csv.Error as error:
        raise DataError(f"{where} is not a table: {error} in line {rows.line_num}. Mend it, or leave it out.") from None


def _delimiter_of(sample: Sequence[str]) -> str:
    """Return the delimiter that cuts the first rows into the most columns, the same number in (nearly) all of them."""

    def columns(delimiter: str) -> int:
        try:
            widths = [len(row) for row in csv.reader(sample, delimiter=delimiter) if row]
        except csv.Error:
            return 0
        return widths[0] if widths and widths.count(widths[0]) >= 0.9 * (len(widths) - 1) else 0

    return max(DELIMITERS, key=columns)


def _is_quoted(sample: Sequence[str]) -> bool:
    return any(cell.startswith('"') and cell.endswith('"') for line in sample for cell in line.strip().split("\t"))


def _is_header(row: Sequence[str]) -> bool:
    """Names are short, all different, not empty and not numbers; or one of them is a usual name for text."""
    if any(cell.strip().lower() in TEXT_COLUMNS for cell in row):
        return True
    named = all(0 < len(cell) <= 40 and not cell.replace(".", "").isdigit() and len(cell.split()) <= 4 for cell in row)
    return named and len(set(row)) == len(row)


def texts_of_parquet(file: BinaryIO, where: str) -> Iterator[str]:
    """Yield the strings of the text column of a Parquet file that can seek, a batch of rows in memory at a time.

    Raises:
        DataError: damaged, without a column of strings (the columns are listed), or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{where} is Parquet, which needs pyarrow. Install it: `pip install 'sheepop[formats]'`."
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        fields = {field.name: field.type for field in table.schema_arrow}
        strings = [name for name, kind in fields.items() if _holds_strings(kind)]
        if not strings:
            raise no_text_column(where, [f"{name} ({kind})" for name, kind in fields.items()])
        sample = next(table.iter_batches(batch_size=SAMPLE_RECORDS, columns=strings), None)
        if sample is None or not sample.num_rows:
            return
        column = text_column(sample.to_pylist(), where)
        for batch in table.iter_batches(batch_size=SAMPLE_RECORDS, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where} is damaged or cut off: {error}. Fetch or make the file again.") from None


def _holds_strings(kind: object) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_strings(kind.value_type)  # type: ignore[attr-defined]
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
