"""Results are types: frozen dataclasses whose fields are the keys of a JSON file, each with its meaning."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from common.artifacts import read_sealed, sealed, write_json
from common.errors import UserError

Result = TypeVar("Result")


def key(meaning: str) -> Any:  # Any: as dataclasses.field, it stands where a value of the field's type does
    """A field of a result; docs/files.md has its meaning from here."""
    return dataclasses.field(metadata={"meaning": meaning})


def write_result(path: Path, result: Any) -> None:
    """Write a result as JSON, with a hash that shows whether it was changed afterwards."""
    write_json(path, sealed(dataclasses.asdict(result)))


def read_result(path: Path, result_class: type[Result], written_by: str) -> Result:
    """Read a result that `written_by` writes; UserError if it is missing, was changed, or is of another version."""
    content = read_sealed(path, written_by)
    del content["sha256"]
    try:
        return typing.cast(Result, _built(result_class, content))
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is of another version of this program; run {written_by} again, with --restart"
        ) from None


def _built(kind: Any, value: Any) -> Any:
    """A value from JSON as what its type says: a dataclass, or a dictionary or list of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union) and value is not None:
        return _built(next(one for one in arguments if one is not type(None)), value)
    if origin is dict:
        return {name: _built(arguments[1], one) for name, one in value.items()}
    if origin is list:
        return [_built(arguments[0], one) for one in value]
    if not dataclasses.is_dataclass(kind) or value is None:
        return value
    kinds = typing.get_type_hints(kind)
    return kind(**{name: _built(kinds[name], one) for name, one in value.items()})  # type: ignore[operator]


def table_of_keys(result_class: Any, without: str = "", prefix: str = "") -> str:
    """The keys of a result and their meanings as rows of a Markdown table, nested ones too except `without`."""
    rows, kinds = [], typing.get_type_hints(result_class)
    for field in dataclasses.fields(result_class):
        rows.append(f"| `{prefix}{field.name}` | {field.metadata['meaning']} |")
        inner = [
            one for one in (kinds[field.name], *typing.get_args(kinds[field.name])) if dataclasses.is_dataclass(one)
        ]
        if inner and field.name != without:
            rows.append(table_of_keys(inner[0], without, f"{prefix}{field.name}."))
    return "\n".join(rows)
