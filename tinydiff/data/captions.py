"""Captions of pictures: from a table (CSV or JSON Lines), text files beside them, or the folders in which they lie.

    file,caption                                {"file_name": "cat.png", "text": "a cat"}
    cat.png,"a cat, asleep"                     {"file_name": "dog.png", "text": "a dog"}

What is wrong is told with its file and line. The fault of one row or picture is put on a list, so that the caller may
go on without it. A fault after which it is not known where a row begins or what it means is an error.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from .limits import read_bytes
from .picture_file import ENDINGS

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")  # the first of these that the table has
CAPTION_COLUMNS = ("caption", "text", "prompt")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl")
TABLES = [name + ending for name in ("captions", "metadata") for ending in TABLE_ENDINGS]
DELIMITERS = ",;\t"
TABLE, TEXT = 2**26, 2**20  # bytes of a table of captions; of a line of it, and of the text beside one picture
MOST_FAULTS = 100_000  # of one table; each takes some hundred bytes, and a line of two may be one

Fault = tuple[str, str]  # (file, reason)


class Row(NamedTuple):
    where: str  # "captions.csv, line 3"
    file: str
    caption: str
    kind: str = ""  # its class, if a column has the classes
    fault: str = ""  # what is wrong with the row of this file


def captioned(
    root: Path, names: list[str], captions: Any, classes: str | None, encoding: str, skipped: list[Fault]
) -> dict[str, tuple[str, str]]:
    """The caption and the class of each picture, in the order of `names`; what is wrong is added to `skipped`.
    classes: the column of the table that has them; None: they are the folders."""
    table = None if captions is False else _table(root, names, captions)
    if table is not None:
        return _from_table(table, names, classes, encoding, skipped)
    if classes is not None:
        raise ValueError(
            f"folder: classes={classes!r} names a column, and there is no table: it is to be one of "
            f"{', '.join(TABLES)} in {root}, or another that you name by captions='FILE'"
        )
    pictures = [name for name in names if _is_picture(name)]
    found = dict.fromkeys(pictures, "")
    if captions is not False:
        found = _without_table(root, names, pictures, encoding, skipped)
    return {name: (caption, class_of(name)) for name, caption in found.items()}


def _without_table(
    root: Path, names: list[str], pictures: list[str], encoding: str, skipped: list[Fault]
) -> dict[str, str]:
    texts = {name.removesuffix(".txt"): name for name in names if name.endswith(".txt")}
    if any(_stem(name) in texts for name in pictures):
        return _from_texts(root, pictures, texts, encoding, skipped)
    if any("/" in name for name in pictures):
        lying = [name for name in pictures if "/" not in name]
        skipped += [(name, "lies beside the folders of the classes, so it has no caption") for name in lying]
        return {name: class_of(name).replace("_", " ") for name in pictures if "/" in name}
    if unused := [name for name in names if name.lower().endswith((*TABLE_ENDINGS, ".parquet")) and "/" not in name]:
        raise ValueError(
            f"folder: {root} has no captions.csv, but {some(unused)}: say captions={unused[0]!r} if the captions are "
            "there, or captions=False if there are none"
        )
    return dict.fromkeys(pictures, "")


def _table(root: Path, names: list[str], captions: Any) -> Path | None:
    """The table of captions that was asked for, or that is in the folder."""
    if captions is not None:
        if not isinstance(captions, (str, os.PathLike)):
            raise ValueError(f"folder: captions must be the path of a table, False or None, not {captions!r}")
        for path in (Path(captions), root / captions):
            if path.is_file():
                return path
        raise FileNotFoundError(f"folder: captions={os.fspath(captions)!r} is no file, here or in {root}")
    there = [name for name in TABLES if name in names]
    if len(there) > 1:
        raise ValueError(f"folder: {root} has {' and '.join(there)}: say which, captions={there[0]!r}")
    return root / there[0] if there else None


def _from_table(
    table: Path, names: list[str], classes: str | None, encoding: str, skipped: list[Fault]
) -> dict[str, tuple[str, str]]:
    rows, others = read_table(table, encoding, classes)
    skipped += others
    known = {composed(name): name for name in names}
    similar: dict[str, str] = {}
    for name in names:
        for form in (name, PurePosixPath(name).name, _stem(name)):
            similar.setdefault(form.casefold(), name)
    seen: dict[str, Row] = {}
    for row in rows:
        # Only what the walk through the folder has found can be named, so nothing outside is ever read.
        file = known.get(composed(row.file)) or known.get(composed(row.file.replace("\\", "/").removeprefix("./")))
        if file is None:
            skipped.append((row.file or row.where, f"{row.where}: {row.fault or _why_missing(row.file, similar)}"))
        elif file in seen:
            skipped.append((file, f"{row.where}: it has a caption already, in {seen[file].where}"))
        else:
            seen[file] = row
    found = {}
    for name in names:
        if name not in seen:
            if _is_picture(name):
                null = '; "" would be the null prompt' if classes is None else ""
                skipped.append((name, f"it has no {'caption' if classes is None else classes} in {table.name}{null}"))
        elif seen[name].fault:
            skipped.append((name, f"{seen[name].where}: {seen[name].fault}"))
        elif classes is not None and not seen[name].kind:
            skipped.append((name, f"{seen[name].where}: its {classes} is empty"))
        else:
            found[name] = seen[name].caption, class_of(name) if classes is None else seen[name].kind
    return found


def _why_missing(file: str, similar: dict[str, str]) -> str:
    if not file:
        return "it names no file"
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        return "a path must lead from the folder into it: absolute ones and '..' are refused"
    near = (similar.get(form.casefold()) for form in (file, windows.name, _stem(file)))
    hint = next((name for name in near if name), None)
    return f"there is no such file; is {hint!r} meant?" if hint else "there is no such file"


def _from_texts(
    root: Path, pictures: list[str], texts: dict[str, str], encoding: str, skipped: list[Fault]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in pictures:
        text = texts.get(_stem(name))
        if text is None:
            skipped.append(
                (name, f"has no {PurePosixPath(_stem(name)).name}.txt beside it; an empty one is the null prompt")
            )
            continue
        try:
            found[name] = read_text(root / text, encoding, TEXT).strip()
        except (OSError, ValueError) as error:
            skipped.append((name, str(error)))
    with_picture = {_stem(name) for name in pictures}
    for stem, text in texts.items():
        if stem not in with_picture and not PurePosixPath(text).name.lower().startswith(
            ("readme", "license", "licence")
        ):
            skipped.append((text, "there is no picture of the same name beside it"))
    return found


def _stem(name: str) -> str:
    """The path without the ending: "a/cat.png" -> "a/cat"."""
    return name.removesuffix(PurePosixPath(name).suffix)


def composed(name: str) -> str:
    """The name with each accented letter as one character. macOS may take them apart, and tables rarely do."""
    return unicodedata.normalize("NFC", name)


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ENDINGS


def class_of(file: str) -> str:
    """The folder in the root that the file lies in, "" if it lies in none. Folders further down have no meaning."""
    return file.partition("/")[0] if "/" in file else ""


def some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- from a file


def read_table(path: Path, encoding: str, classes: str | None = None) -> tuple[list[Row], list[Fault]]:
    """The rows of a table of captions, and the faults of those whose file is not known. A name that ends in .jsonl (or
    .ndjson, .json) is read as JSON Lines, any other as CSV, with ",", ";" or a tab between its columns, whichever fits
    the header.
    classes: the column of the classes. A table that has it needs no captions: they are the classes.

    Errors: ValueError for bytes that are not in this encoding, for a table that lacks a column of files, of captions or
    of that name, for a quote that is not closed, and for so many faults that it can hardly be a table.
    """
    text = read_text(path, encoding)
    read = _json_lines if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _csv
    found = read(path, text, classes)
    rows: list[Row] = []
    faults: list[Fault] = []
    for row in found:
        if isinstance(row, Row):
            rows.append(row)
        else:
            faults.append(row)
            if len(faults) > MOST_FAULTS:
                where, why = faults[0]
                raise ValueError(f"{path} has more than {MOST_FAULTS} faults, the first in {where}: {why}")
    return rows, faults


def read_text(path: Path, encoding: str, most: int = TABLE) -> str:
    """The text of a file, without the mark (BOM) that some editors put before UTF-8.
    Errors: ValueError, which names the file, if it is larger than `most`, or no file but a device or a pipe; and which
    names the line and the byte, if it is not in this encoding."""
    try:
        data = read_bytes(path, most)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    try:
        if codecs.lookup(encoding).name == "utf-8":
            data = data.removeprefix(codecs.BOM_UTF8)
        text = data.decode(encoding)
    except LookupError:
        raise ValueError(
            f"encoding must be one that Python knows, such as 'utf-8' or 'cp1252', not {encoding!r}"
        ) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        guess = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
        raise ValueError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not {encoding}. Save the file as UTF-8, or "
            f"say which encoding it is in, perhaps encoding={guess!r}"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{path}, line {line}: there is a NUL in the text. Is it in another encoding, such as 'utf-16'?"
        )
    return text


def _csv(path: Path, text: str, classes: str | None) -> Iterator[Row | Fault]:
    if len(text) > TEXT and not re.search("[\r\n]", text[:TEXT]):
        raise ValueError(f"{path}: its first line must name its columns, and is longer than {TEXT} characters")
    start = 0
    while start < len(text):
        end = text.find("\n", start) % (len(text) + 1)  # of the last line, whose -1 becomes its end
        if end - start > TEXT:
            raise ValueError(f"{path} has a line of {end - start} characters, more than the limit of {TEXT}")
        start = end + 1
    headers: dict[str, list[str]] = {}
    for mark in DELIMITERS:
        try:
            headers[mark] = next((row for row in _reader(text, mark) if row), [])
        except csv.Error as error:
            raise ValueError(f"{path}: its first line cannot be read: {error}") from None
    fitting = [mark for mark, header in headers.items() if not _lacking(header, classes)]
    delimiter = fitting[0] if fitting else max(DELIMITERS, key=lambda mark: len(headers[mark]))
    header = headers[delimiter]
    if twice := _twice(header, classes):
        raise ValueError(f"{path}: its first line names the column {twice!r} twice: which one is meant?")
    if lacks := _lacking(header, classes):
        raise ValueError(f"{path}: its first line must name its columns, and has {lacks}")
    columns = _columns(header, classes)
    reader = _reader(text, delimiter)
    at_header = True
    while True:
        line = reader.line_num + 1  # a quoted caption may go over several lines: this is the first of them
        where = f"{path.name}, line {line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: {error} (is a quote not closed, or not doubled?)") from None
        if row and at_header:
            at_header = False
        elif any(row[len(header) :]):
            quote = f'a caption with {delimiter!r} in it must be in double quotes, "..."'
            yield where, f"{len(row)} values for the {len(header)} columns: {quote}"
        elif row and len(row) <= max(columns.values()):
            yield where, f"{len(row)} values for the {len(header)} columns"
        elif row:
            yield _row(where, {what: row[column] for what, column in columns.items()})


def _row(where: str, values: dict[str, str]) -> Row:
    kind = values.get("classes", "").strip()
    return Row(where, values["files"].strip(), values.get("captions", kind.replace("_", " ")).strip(), kind)


def _reader(text: str, delimiter: str):  # type: ignore[no-untyped-def]  # the type has no public name
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)


def _columns(header: list[str], classes: str | None) -> dict[str, int]:
    """Which column has the files, which the captions, and which the classes, of those that there are."""
    plain = [_plain(name) for name in header]
    wanted = {"files": FILE_COLUMNS, "captions": CAPTION_COLUMNS} | ({"classes": (_plain(classes),)} if classes else {})
    found = {what: next((name for name in names if name in plain), None) for what, names in wanted.items()}
    return {what: plain.index(name) for what, name in found.items() if name is not None}


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")


def _lacking(header: list[str], classes: str | None, advise: bool = True) -> str:
    """What a table with these columns lacks, and has; "" if it lacks nothing. advise: which column may be meant, which
    takes long to find."""
    columns, lacks = _columns(header, classes), []
    if "files" not in columns:
        lacks.append(f"no column of files ({', '.join(FILE_COLUMNS)})")
    if classes is None and "captions" not in columns:
        lacks.append(f"no column of captions ({', '.join(CAPTION_COLUMNS)})")
    if classes is not None and "classes" not in columns:
        near = difflib.get_close_matches(classes, header[:1000] * advise, n=1)  # a stranger may name millions
        lacks.append(f"no column {classes!r}" + (f" (is {near[0]!r} meant?)" if near else ""))
    if not lacks:
        return ""
    others = [name for i, name in enumerate(header) if i not in columns.values()]
    hint = ""
    if advise and classes is None and list(columns) == ["files"] and others:
        hint = f"; if {others[0]!r} is the class of a picture, say classes={others[0]!r}"
    more = f" and {len(header) - 10} more" if len(header) > 10 else ""
    return f"{' and '.join(lacks)}, but {header[:10] or 'nothing'}{more}{hint}"


def _twice(header: list[str], classes: str | None) -> str | None:
    """A column of files, captions or classes that is there twice."""
    chosen = [header[column] for column in _columns(header, classes).values()]
    return next((name for name in chosen if header.count(name) > 1), None)


def _json_lines(path: Path, text: str, classes: str | None) -> Iterator[Row | Fault]:
    first, complete = "", False  # the first row that lacks a column; has any row all columns?
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        if len(line) > TEXT:  # brackets in brackets would take twenty times their length in memory
            yield where, f"has {len(line)} characters, more than the limit of {TEXT}"
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=tuple)
        except (ValueError, RecursionError) as error:
            yield where, f"is not JSON: {error}"
            continue
        if not isinstance(pairs, tuple):
            yield where, f'must be an object, {{"file_name": ..., "text": ...}}, not a {type(pairs).__name__}'
            continue
        if twice := _twice([name for name, _ in pairs], classes):
            yield where, f"has {twice!r} twice: which one is meant?"
            continue
        entry = dict(pairs)
        if lacks := _lacking(list(entry), classes, advise=not first):
            first = first or f"line {number} has {lacks}"
            yield where, f"has {lacks}"
            continue
        complete = True
        names = {what: list(entry)[column] for what, column in _columns(list(entry), classes).items()}
        values = {what: entry[name] for what, name in names.items()}
        if type(values.get("classes")) is int:  # as data sets often number their classes
            values["classes"] = str(values["classes"])
        if classes is not None and values.get("captions", "") is None:
            del values["captions"]  # as if there were no such column: the class is the caption
        if odd := re.search("[\0\ud800-\udfff]", "".join(value for value in values.values() if isinstance(value, str))):
            yield where, f"has {odd[0]!r} in it, which is no character of a text"
            continue
        if wrong := [what for what, value in values.items() if not isinstance(value, str)]:
            why = f"its {names[wrong[0]]!r} must be a string, not {values[wrong[0]]!r}"
            yield Row(where, values["files"].strip(), "", fault=why) if "files" not in wrong else (where, why)
            continue
        yield _row(where, values)
    if first and not complete:  # said once, and not for each row
        raise ValueError(f"{path}: {first}, and no other line has all that it needs")
