"""Parquet input, as the Hugging Face hub stores it: a column of pictures, one or two of captions.

A picture is a struct {bytes, path} or plain binary. Needs pyarrow.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from millrace.engine.data.captions import KEYS, Captions, captions_by_key, checked
from millrace.engine.data.first_bytes import Kind, kind_of
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.data.remote.remote_input import open_input, read_ahead_until
from millrace.engine.data.sample_files import check_picture_size
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import is_url

PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")
CAPTION_COLUMNS = (("long", "short"), ("caption",), ("text",), ("txt",), ("prompt",))
"""Names that are looked for, in this order; beside `caption`, `long` or `short` alone is read too, as in a
JSON file."""
_ROWS = 16
"""Rows that are in memory as Python objects."""


class TableShape(NamedTuple):
    """What a file has, as its footer says."""

    rows: tuple[int, ...]
    """Of each row group."""
    picture: str
    captions: tuple[str, ...]
    by_key: bool = False
    """Whether names say what the caption columns are; otherwise these are (both,) or (long, short)."""
    unread: tuple[str, ...] = ()
    """Other columns that could hold captions."""

    def notes(self, path: Path | str) -> list[str]:
        """For people: which columns were taken, where others could have been."""
        if not self.unread:
            return []
        return [
            f"{os.path.basename(path)}: captions are of column {' and '.join(self.captions)}; not read: "
            f"{', '.join(self.unread)} (--caption-column names another)"
        ]


def table_shape(path: Path | str, settings: Settings) -> TableShape:
    """Row groups and columns of a file.

    Raises Rejected where it is damaged, UserError where it lacks the columns, pyarrow is missing, or a remote
    one cannot be read.
    """
    parquet = _parquet()
    try:
        with _input(path, None) as opened, parquet.ParquetFile(opened) as file:  # the footer alone
            schema = file.schema_arrow
            rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    except UserError:
        raise
    except Exception as error:  # pyarrow has many kinds of its own
        kind = _kind(path)
        if kind is not None and kind.name != "a Parquet file":
            raise Rejected(Reason.CORRUPT_PARQUET, f"not a Parquet file but {kind.name}") from None
        raise Rejected(Reason.CORRUPT_PARQUET, _one_line(error)) from None
    names = schema.names
    wanted = (settings.picture_column,) if settings.picture_column else PICTURE_COLUMNS
    picture = next((name for name in wanted if name in names), None)
    if picture is None:
        raise UserError(
            f"{path}: has no column {' or '.join(wanted)}; name the one of pictures with --picture-column "
            f"(there are {', '.join(names)})"
        )
    choices = (settings.caption_columns,) if settings.caption_columns else CAPTION_COLUMNS
    captions = next((choice for choice in choices if set(choice) <= set(names)), None)
    if captions is None:
        raise UserError(
            f"{path}: has no column {' or '.join(','.join(choice) for choice in choices)}; name the one of "
            f"captions with --caption-column (there are {', '.join(names)})"
        )
    by_key = not settings.caption_columns and set(captions) <= set(KEYS)
    if by_key:
        captions = tuple(key for key in KEYS if key in names)
    usual = set() if settings.caption_columns else {name for choice in CAPTION_COLUMNS for name in choice}
    unread = tuple(name for name in names if name in usual and name not in captions)
    kind = str(schema.field(picture).type)
    if "binary" not in kind or kind.startswith("list"):
        raise UserError(
            f"{path}: column {picture} holds {kind}, not the bytes of pictures; name another one with "
            "--picture-column"
        )
    return TableShape(rows, picture, captions, by_key, unread)


def read_row_group(
    path: Path | str, name: str, group: int, shape: TableShape, folder: Path | None = None
) -> Iterator[RawSample | Reject]:
    """Samples and rejects of one row group in order. A row's key is `name` # its number in the file.

    `folder` is for what is kept of a remote one while it is read. Raises UserError where that cannot be read.
    """
    number, end = sum(shape.rows[:group]), sum(shape.rows[: group + 1])
    columns = [shape.picture, *shape.captions]
    try:
        with (
            _input(path, folder) as opened,
            _parquet().ParquetFile(opened, buffer_size=2**20) as file,
        ):
            read_ahead_until(opened, _end_of(file.metadata.row_group(group), columns))
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                for row in range(batch.num_rows):
                    key = f"{name}#{number}"
                    number += 1
                    try:
                        yield _sample(key, batch, row, shape)
                    except Rejected as problem:
                        yield Reject(key, problem.reason, problem.detail)
    except UserError:
        raise
    except Exception as error:  # pyarrow has many kinds of its own
        detail = _one_line(error)
    else:
        detail = "the row group ends early"
    # Every row that is lost counts, not the file alone.
    for lost in range(number, end):
        yield Reject(f"{name}#{lost}", Reason.CORRUPT_PARQUET, detail)


def _sample(key: str, batch: Any, row: int, shape: TableShape) -> RawSample:
    values = {name: _value(batch, name, row) for name in shape.captions}
    if shape.by_key:
        captions = captions_by_key(values, "the row")
    else:
        named = [checked(values[name], f"column {name}") for name in shape.captions]
        captions = Captions(named[0], named[-1])
    picture = _value(batch, shape.picture, row)
    if isinstance(picture, dict):
        picture = picture.get("bytes")
    if picture is None:
        raise Rejected(Reason.MISSING_PICTURE, "the row has no bytes of a picture")
    check_picture_size(len(picture))
    return RawSample(key, picture, captions)


def _value(batch: Any, name: str, row: int) -> Any:
    try:
        return batch.column(name)[row].as_py()
    except UnicodeDecodeError as error:
        raise Rejected(Reason.CAPTION_NOT_UTF8, f"column {name}: not UTF-8 at byte {error.start}") from None


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet files needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


@contextmanager
def _input(path: Path | str, folder: Path | None) -> Iterator[Any]:
    """What Arrow opens: a path, which it maps and reads itself, or a remote file."""
    if is_url(path):
        with open_input(path, folder) as file:
            read_ahead_until(file, 0)  # the footer comes first
            yield file
    else:
        yield path


def _end_of(group: Any, columns: list[str]) -> int:
    """Where the last byte of columns of a row group lies."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return max(
        (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns
    )


def _kind(path: Path | str) -> Kind | None:
    try:
        with open_input(path) as file:
            return kind_of(file.read(512))
    except OSError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
