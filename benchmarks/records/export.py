"""Records as CSV and as a pandas data frame."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.records.rows import FIELDS, Row, read

if TYPE_CHECKING:
    import pandas as pd


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV with a heading: a column for each field, empty for null; lists have their numbers between spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(FIELDS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        lists = {name: " ".join(map(str, value)) for name, value in row.items() if isinstance(value, list)}
        writer.writerow(row | lists)
    return text.getvalue()


def to_pandas(*files: str | os.PathLike[str]) -> pd.DataFrame:
    """Return the timings of records as a pandas data frame, a column for each field.

    Args:
        *files: Records that `python -m benchmarks run` has written.

    Returns:
        Data frame with a row for each timing. docs/howto/read_a_record.md has the fields and their units.

    Raises:
        ImportError: pandas is not installed.
        OSError: A file cannot be read.
        ValueError: A file has no timings, or a line that is not of the schema.

    Example:
        >>> from benchmarks import to_pandas
        >>> to_pandas("benchmarks/results/cpu/suites.jsonl")  # doctest: +SKIP
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    return pd.DataFrame(read(map(Path, files)), columns=list(FIELDS))
