"""Read a file of any program into rows of named cells: a table, JSON, JSON lines or a text log.

Nothing is interpreted here but the format: names stay as the file has them, cells are text or the
values of JSON. lab/tables/columns.py knows which column is which.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glasslm.errors import InputError, explain_system_errors
from glasslm.lab.tables.json_records import (
    find_records,
    flatten,
    list_shorter_columns,
    parse_object,
)
from glasslm.lab.tables.latex import is_latex, latex_to_tabs
from glasslm.lab.tables.log_lines import HELPERS, parse_log_line, strip_terminal_codes
from glasslm.lab.tables.numbers import is_number, uses_decimal_commas

DELIMITERS = "\t;,|"
COMMENTS = ("#", "%", "//")
_RULE = re.compile(r"\s*[+|:=\u2500-\u257f-]+(?:\s*[+|:=\u2500-\u257f-]+)*\s*")  # |---|:--:|
_BARS = str.maketrans("┃│║", "|||")  # of tables in a frame
MAX_HEADER_LINES = 50  # lines before a table that may be something else
KINDS = {
    ",": "CSV",
    "\t": "a table with tabs",
    " ": "a table with blanks",
    "|": "a table with bars",
}
ACCEPTED = (
    "CSV, Markdown or LaTeX with a line of names, JSON, JSON lines, a TensorBoard event file, or "
    "the log of a training program with lines such as `step 100: loss 2.41`"
)
# The first bytes of other files, what they are, and the cure.
OTHER_FILES = (
    (b"PK\x03\x04", "an Excel workbook or another zip file", "save its table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save its table as CSV"),
    (b"PAR1", "a Parquet file", "write it as CSV: pandas.read_parquet(FILE).to_csv(CSV)"),
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip FILE"),
    (b"SQLite", "an SQLite database", "export its table as CSV"),
    (b"%PDF", "a PDF", "copy its table into a text file"),
)


class Row(NamedTuple):
    """The named cells of a line."""

    line: int  # from 1
    cells: Mapping[str, Any]


class Table(NamedTuple):
    """The rows of a file."""

    path: Path
    format: str
    rows: Sequence[Row]
    dropped: Sequence[int]  # lines that hold no named values
    decimal_comma: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the columns, in the order in which they appear."""
        names = dict.fromkeys(name for row in self.rows for name in row.cells)
        return [name for name in names if name not in HELPERS]


def read_table(path: Path) -> Table:
    """The rows of `path`. Raises InputError where it cannot be read or has no rows."""
    if "tfevents" in path.name:
        from glasslm.lab.tables.tensorboard_events import read_events

        rows = [Row(i, cells) for i, cells in enumerate(read_events(path), 1)]
        return Table(path, "a TensorBoard event file", rows, [])
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty: expected {ACCEPTED}")
    if is_latex(text):
        table = _read_csv(path, latex_to_tabs(text))
        if table is not None:
            return table._replace(format="a LaTeX table")
    table = (
        _read_json(path, text)
        or _read_csv(path, text)
        or _read_metric_file(path, text)
        or _read_log(path, text)
    )
    if not table.rows and is_number(text.split(maxsplit=1)[0].split(",")[0]):
        raise InputError(
            f"{path} begins with numbers and no names: expected a first line with the names of "
            "the columns, such as `step,loss`"
        )
    if not table.rows:
        raise InputError(
            f"{path} has no line with named numbers, such as `step 100: loss 2.41`: expected "
            f"{ACCEPTED}"
        )
    return table


def _read_text(path: Path) -> str:
    with explain_system_errors(
        path, lambda why: InputError(f"{path} cannot be read ({why}): expected {ACCEPTED}")
    ):
        content = path.read_bytes()
    for start, kind, cure in OTHER_FILES:
        if content.startswith(start):
            raise InputError(f"{path} is {kind}: expected {ACCEPTED}. {cure[0].upper()}{cure[1:]}")
    encoding = "utf-8-sig"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif content[1:200:2].count(0) > 0.9 * len(content[1:200:2]):
        encoding = "utf-16-le"  # as Windows writes it, without a byte order mark
    text = content.decode(encoding, errors="replace")
    if "\0" in text:
        raise InputError(f"{path} is not a text file: expected {ACCEPTED}")
    return text


# -- JSON ------------------------------------------------------------------------------------------


def _read_json(path: Path, text: str) -> Table | None:
    """The rows of one JSON value or of JSON lines; None where the file is neither."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        whole = parse_object(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return _read_json_lines(path, text)
    records, other_lists = find_records(whole)
    rows = [Row(i, flatten(record)) for i, record in enumerate(records, 1)]
    kind = "JSON"
    if shorter := list_shorter_columns(whole):
        kind += f" without {shorter}, whose length differs"
    if other_lists:
        kind += f" without {', '.join(other_lists)}, other lists of records"
    return Table(path, kind, rows, [])


def _read_json_lines(path: Path, text: str) -> Table | None:
    rows, dropped = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            rows.append(Row(number, flatten(record)))
        else:
            dropped.append(number)
    if len(rows) <= len(dropped):
        return None
    return Table(path, "JSON lines", rows, dropped)


# -- CSV -------------------------------------------------------------------------------------------


def _read_csv(path: Path, text: str) -> Table | None:
    """The rows of a table with a line of names; None where no line of names is found."""
    numbered = [
        (i, _strip_borders(line.translate(_BARS)))
        for i, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    numbered = [pair for pair in numbered if not _RULE.fullmatch(pair[1])]
    numbered = [(i, _join_names(line)) for i, line in numbered]
    comments = [(i, line) for i, line in numbered if line.lstrip().startswith(COMMENTS)]
    lines = [pair for pair in numbered if not pair[1].lstrip().startswith(COMMENTS)]
    if not lines:
        return None
    if comments and comments[-1][0] < lines[0][0]:  # names may stand in a comment: "# step loss"
        number, line = comments[-1]
        named = [(number, line.lstrip().lstrip("#%/").lstrip()), *lines]
        if _is_header(lines, 0) is None and _is_header(named, 0) is not None:
            lines = named
    for first in range(min(MAX_HEADER_LINES, len(lines))):
        delimiter = _is_header(lines, first)
        if delimiter is not None:
            table = _parse_csv(path, lines[first:], delimiter)
            before = [number for number, _ in lines[:first]]
            return table._replace(dropped=[*before, *table.dropped])
    return None


def _strip_borders(line: str) -> str:
    """The line without the bars at both ends of a row of a Markdown table."""
    bordered = re.fullmatch(r"\s*\|(.*)\|\s*", line)
    return bordered[1] if bordered else line


def _is_header(lines: Sequence[tuple[int, str]], first: int) -> str | None:
    """The delimiter with which line `first` is a line of names above rows; None if it is not."""
    header = lines[first][1]
    following = [line for _, line in lines[first + 1 : first + 21]]
    named = header.replace("Unnamed: 0", "Unnamed")  # the index of pandas
    if not following or re.search(r"[:=]\s*[+-]?\d", named) or _are_log_lines(header, following):
        return None
    for delimiter in [*sorted(DELIMITERS, key=header.count, reverse=True), " "]:
        names = _split(header.rstrip().rstrip(delimiter), delimiter)
        if len(names) < 2 or any(not name.strip() for name in names[1:]) or _has_numbers(names):
            continue
        fitting = [
            cells
            for line in following
            if len(cells := _split(line, delimiter)) >= min(2, len(names))
            and (delimiter != " " or len(cells) - len(names) in (0, 1))
            and _is_row(cells, delimiter)
            and sum("=" in cell for cell in cells) <= len(cells) / 3  # no pairs of a log
        ]
        if len(fitting) > len(following) / 2:
            return delimiter
    alone = re.fullmatch(r"[\s\"']*[A-Za-z][\w./ -]*[\"']?\s*", header) is not None
    if alone and len(header.split()) <= 2 and all(is_number(line) for line in following):
        return ","  # one column
    return None


def _are_log_lines(header: str, following: Sequence[str]) -> bool:
    """Whether the first line is one of a log, such as `iter 100 | loss 4.2`, and not of names."""
    shape = re.compile(r"[+-]?\d[\d.,]*(?:e[+-]?\d+)?")
    return "|" in header and any(
        len(re.findall(r"[a-z]\w* [+-]?\d", header, re.I)) > 1
        and shape.sub("0", line).split() == shape.sub("0", header).split()
        for line in following
    )


def _join_names(line: str) -> str:
    """A line of a table as a notebook shows it, with one blank between cells, not in them."""
    if re.fullmatch(r"(?:Step|Epoch)(?: +(?:Training|Validation) Loss)+[^\t,;]*", line.strip()):
        return line.replace("Training Loss", "Training_Loss").replace("tion Loss", "tion_Loss")
    return line.replace("No log", "NA")


def _is_row(cells: Sequence[str], delimiter: str) -> bool:
    """Whether cells have a number; between blanks, which words have too, half must be numbers."""
    count = sum(bool(cell.strip()) and is_number(cell) for cell in cells)
    return count >= (len(cells) / 2 if delimiter == " " else 1)


def _has_numbers(cells: Sequence[str]) -> bool:
    return any(cell.strip() and is_number(cell) for cell in cells)


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _parse_csv(path: Path, lines: Sequence[tuple[int, str]], delimiter: str) -> Table:
    kind = KINDS.get(delimiter, f"CSV with `{delimiter}`")
    if delimiter == " ":
        if len(lines[1][1].split()) == len(lines[0][1].split()) + 1:  # the index of pandas
            kind = "a table printed by pandas, whose NaN is a missing value"
            rest = [(number, re.sub(r"(?<= )NaN\b", "-", line)) for number, line in lines[1:]]
            lines = [(lines[0][0], f"index {lines[0][1]}"), *rest]
        cells_of_lines: Iterator[list[str]] = (line.split() for _, line in lines)
    else:
        text = (line for _, line in lines)
        cells_of_lines = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(cells_of_lines)]
    while not names[-1]:  # a delimiter at the end of the line
        names.pop()
    rows, dropped = [], []
    for (number, _), cells in zip(lines[1:], cells_of_lines):
        if delimiter == " " and len(cells) != len(names):  # words around a printed table
            dropped.append(number)
            continue
        extra = cells[len(names) - 1 :]
        if len(cells) > len(names) and not any(map(is_number, extra[:1])):
            cells = [*cells[: len(names) - 1], delimiter.join(extra)]  # a note with commas
        if len(cells) > len(names) and any(cell.strip() for cell in cells[len(names) :]):
            raise InputError(
                f"line {number} of {path} has {len(cells)} cells, but there are {len(names)} "
                'names: quote cells that contain the delimiter, such as "10,000,000"'
            )
        if not any(cell.strip() for cell in cells) or cells == names:  # a blank or repeated header
            dropped.append(number)
            continue
        rows.append(Row(number, dict(zip(names, [*cells, *[""] * (len(names) - len(cells))]))))
    cells = [cell for row in rows for cell in row.cells.values()]
    decimal_comma = uses_decimal_commas(cells, is_usual=delimiter == ";")
    if delimiter == ",":  # commas are quoted here: a note such as "1,2" must not turn 2.345 to 2345
        decimal_comma = decimal_comma and not any("." in cell for cell in cells)
    if decimal_comma:
        kind += " and decimal commas" if " with " in kind else " with decimal commas"
    return Table(path, kind, rows, dropped, decimal_comma)


def _read_metric_file(path: Path, text: str) -> Table | None:
    """The rows of a file of MLflow: a time in milliseconds, a value and a step, without names."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or any(
        len(cells) != 3 or not re.fullmatch(r"1\d{12}", cells[0]) for cells in lines
    ):
        return None
    rows = [
        Row(i, {"timestamp": when, "value": value, "step": step})
        for i, (when, value, step) in enumerate(lines, 1)
    ]
    return Table(path, "a metric file of MLflow", rows, [])


# -- text logs -------------------------------------------------------------------------------------


def _read_log(path: Path, text: str) -> Table:
    rows, dropped = [], []
    for number, line in enumerate(strip_terminal_codes(text).split("\n"), 1):
        # A progress bar writes over its line: the last state of each part counts.
        parts = [parse_log_line(part) for part in line.split("\r")]
        found = [Row(number, cells) for cells in parts if cells]
        if not found and line.strip():
            dropped.append(number)
        rows += found
    return Table(path, "a text log", rows, dropped)
