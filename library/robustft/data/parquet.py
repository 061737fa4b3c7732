"""Data sets in Parquet files: a column of encoded pictures, one of labels, perhaps one of indices.

Layout: a folder with ``train.parquet`` and ``test.parquet`` (or ``val.parquet``); or the sharded
names ``train-*.parquet`` and so on; or whatever ``train_file`` and ``test_file`` say. Columns:

* ``image`` or ``img``: bytes of a PNG or JPEG, or a struct with a field ``bytes``;
* ``label``, ``labels`` or ``fine_label``: class indices from 0;
* ``index`` (optional): position in the original order, from 0; without it, the row number.

Class names are looked for in the schema's metadata.
"""

import ast
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from robustft.data.base import Split
from robustft.data.decode import PREPARATION, decode_many
from robustft.data.source import Loaded, Request, make_split
from robustft.errors import DataError

__all__ = ["has_parquet", "load_parquet", "read_class_names", "read_parquet_split"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
INDEX_COLUMN = "index"
TEST_NAMES = ("test", "val", "validation")
GREY_MODES = ("1", "L", "LA", "I;16")


def has_parquet(request: Request) -> bool:
    """Return whether the folder (or the file names in the request) asks for Parquet."""
    return bool(request.train_file or request.test_file or any(request.root.glob("*.parquet")))


def load_parquet(
    request: Request, *, channels: int | None = None, class_names: tuple[str, ...] | None = None
) -> Loaded:
    """Load both splits.

    Args:
        request: folder, size and file names.
        channels: of the images; None takes 1 if all training pictures are grey, else 3.
        class_names: expected names; None takes those of the files.

    Raises:
        DataError: files or columns are missing, damaged or contradict each other.
    """
    train_files = _find(request.root, request.train_file, ("train",), "train_file")
    test_files = _find(request.root, request.test_file, TEST_NAMES, "test_file")
    train, test = _read(train_files), _read(test_files)
    names = read_class_names(train.schema.metadata or {})
    if class_names is None:
        labels = np.concatenate([_labels(train, train_files), _labels(test, test_files)])
        class_names = names or tuple(str(label) for label in range(int(labels.max()) + 1))
    elif names is not None and len(names) != len(class_names):
        raise DataError(
            f"{train_files[0]} has {len(names)} classes where {request.name} has "
            f"{len(class_names)}: it is another data set (load it as data: parquet)"
        )
    if channels is None:
        channels = 1 if _all_grey(train) else 3
    splits = [
        _split(table, files, request, channels=channels, test=table is test)
        for table, files in ((train, train_files), (test, test_files))
    ]
    return Loaded(train=splits[0], test=splits[1], class_names=class_names, whole=False)


def read_parquet_split(path: Path, *, channels: int, test: bool) -> tuple[Split, tuple[str, ...]]:
    """Read one small file into memory, without the decoded cache; also its class names."""
    table = _read([path])
    names = read_class_names(table.schema.metadata or {})
    if names is None:
        raise DataError(f"{path} has no class_names in its metadata: it is damaged, reinstall it")
    request = Request(name=path.stem, root=path.parent)
    return _split(table, [path], request, channels=channels, test=test, keep=False), names


def read_class_names(metadata: Mapping[bytes, bytes]) -> tuple[str, ...] | None:
    """Return the class names in a schema's metadata, or None if it has none.

    Known forms: ``class_names`` or ``wnids`` as a list in JSON or Python notation, and the
    description that the Hugging Face ``datasets`` library writes.
    """
    for key in (b"class_names", b"wnids"):
        if key in metadata:
            return tuple(str(name) for name in _parse_list(metadata[key].decode()))
    if b"huggingface" in metadata:
        features = json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {})
        for column in LABEL_COLUMNS:
            if "names" in features.get(column, {}):
                return tuple(str(name) for name in features[column]["names"])
    return None


def _parse_list(text: str) -> Sequence[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise DataError(f"cannot read the class names {text[:60]!r}") from error
    if not isinstance(value, (list, tuple)):
        raise DataError(f"the class names must be a list, got {text[:60]!r}")
    return value


def _find(root: Path, pattern: str | None, stems: tuple[str, ...], field: str) -> list[Path]:
    """Return the files of a split: those asked for, else those of the first stem that has any."""
    if pattern is not None:
        files = sorted(root.glob(pattern))
        if not files:
            raise DataError(f"{root} has no file {pattern!r}: correct {field}")
        return files
    for stem in stems:
        if (root / f"{stem}.parquet").is_file():
            return [root / f"{stem}.parquet"]
        shards = sorted(root.glob(f"{stem}-*.parquet"))
        if shards:
            return shards
    others = ", ".join(sorted(path.name for path in root.glob("*.parquet"))) or "none"
    raise DataError(
        f"no {stems[0]}.parquet in {root} (Parquet files there: {others}): put it there, or name "
        f"the file with {field}"
    )


def _read(files: Sequence[Path]) -> pa.Table:
    try:
        wanted = {*IMAGE_COLUMNS, *LABEL_COLUMNS, INDEX_COLUMN}
        tables = [
            pq.read_table(file, columns=[c for c in pq.read_schema(file).names if c in wanted])
            for file in files
        ]
        return pa.concat_tables(tables)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {files[0]} as Parquet ({error}); fetch the file again"
        ) from error


def _column(table: pa.Table, names: tuple[str, ...], files: Sequence[Path]) -> pa.ChunkedArray:
    for name in names:
        if name in table.column_names:
            column = table[name]
            if column.null_count:
                raise DataError(f"{files[0]}: column {name!r} has {column.null_count} empty rows")
            return column
    raise DataError(
        f"{files[0]} has no column called {' or '.join(names)}; rename the column that is meant"
    )


def _labels(table: pa.Table, files: Sequence[Path]) -> NDArray[np.int64]:
    column = _column(table, LABEL_COLUMNS, files)
    if not pa.types.is_integer(column.type):
        raise DataError(f"{files[0]}: labels must be integers from 0, got {column.type}")
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return labels


def _encoded(table: pa.Table, files: Sequence[Path]) -> pa.ChunkedArray:
    column = _column(table, IMAGE_COLUMNS, files)
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"{files[0]}: pictures must be PNG or JPEG bytes, got {column.type}")
    return column


def _all_grey(table: pa.Table) -> bool:
    """Return whether every picture is grey; ends at the first that is not."""

    def is_grey(data: bytes) -> bool:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.mode in GREY_MODES
        except OSError:
            return False  # decoding names the unreadable picture

    return all(is_grey(value.as_py()) for value in _encoded(table, [Path("train")]))


def _split(
    table: pa.Table,
    files: Sequence[Path],
    request: Request,
    *,
    channels: int,
    test: bool,
    keep: bool = True,
) -> Split:
    if table.num_rows == 0:
        raise DataError(f"{files[0]} has no rows")
    encoded = _encoded(table, files)
    key = None
    if keep:
        digest = hashlib.sha256(f"{PREPARATION} {request.image_size} {channels}".encode())
        for file in files:
            digest.update(file.read_bytes())
        key = f"{request.name}-{'test' if test else 'train'}-{digest.hexdigest()[:16]}"
    images = decode_many(
        lambda position: encoded[position].as_py(),
        [f"{files[0].name} row {row}" for row in range(table.num_rows)],
        size=request.image_size,
        channels=channels,
        key=key,
    )
    positions = None
    if INDEX_COLUMN in table.column_names:
        if not pa.types.is_integer(table[INDEX_COLUMN].type):
            raise DataError(f"{files[0]}: column {INDEX_COLUMN!r} must hold integers from 0")
        positions = table[INDEX_COLUMN].to_numpy().astype(np.int64)
    return make_split(images, _labels(table, files), test=test, positions=positions)
