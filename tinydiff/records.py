"""The records of a run, read back, and as a table.

A run writes log.jsonl, one object of JSON to a line, and not CSV: a record may have what those before it had not
("skipped", or what on_record adds), and a line that is once written is never touched again, so a kill can damage none.
The table is made of it when it is wanted, also while the run goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import check_ordinary
from .saving import write_atomically


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records in log.jsonl, or in that of a run's directory.
    Errors: FileNotFoundError; ValueError, with the number of the line, for what is no record."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    check_ordinary(path)
    records = []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}: {line!r:.80}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a record must be an object, not {line!r:.80}")
        records.append(record)
    return records


def write_csv(records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Records as a table that a spreadsheet opens, whole or not at all: a row for each, a column for each key, in the
    order in which they first occur. What a record lacks is empty."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    table.writeheader()
    table.writerows(records)
    write_atomically(Path(path), lambda file: file.write(text.getvalue().encode()))
