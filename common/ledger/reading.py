"""What a file says as dataclasses, read strictly: what is unknown, missing or of another type is an error with a place.

The types are those of the fields: text, numbers, ``X | None``, lists, mappings. ``Annotated[X, check]`` adds a check, a
function from the value to what is wrong with it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Section = TypeVar("Section")

WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Decimal: "a number with its published digits",
}
"""What a type is called in a message."""


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def not_empty(value: Any) -> str:
    """A check."""
    return "" if value else "is missing"


@dataclass(frozen=True)
class Reader:
    """Reads sections of one kind of file."""

    error: Callable[[str], Exception]
    """of a message that names file, section and key"""

    def section(
        self, kind: type[Section], data: Any, where: str, required: Iterable[str] = (), **given: Any
    ) -> Section:
        """A section of a file as ``kind``, a dataclass.

        Args:
            kind: its fields are the keys; those without a default must be there.
            data: the section.
            where: its place, for messages.
            required: further keys that must be there.
            given: fields that are not read but known.
        """
        if not isinstance(data, Mapping):
            raise self.error(f"{where}: expected a section, got {data!r}")
        known = {field.name: field for field in fields(kind) if field.name not in given}  # pyright: ignore[reportArgumentType]
        if unknown := sorted(set(data) - set(known)):
            raise self.error(f"{where}: unknown keys {unknown}; the keys are {sorted(known)}")
        for name, field in known.items():
            if name not in data and (name in required or field.default is field.default_factory is MISSING):
                raise self.error(f"{where}: {name}: is missing")
        return kind(**given, **{name: self.value(data[name], _hints(kind)[name], f"{where}: {name}") for name in data})

    def value(self, value: Any, hint: Any, where: str) -> Any:
        """A value of the type that ``hint`` says."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            value = self.value(value, arguments[0], where)
            if problem := arguments[1](value):
                raise self.error(f"{where}: {problem}")
            return value
        if origin in (Union, UnionType):
            (inner,) = set(arguments) - {NoneType}
            return None if value is None else self.value(value, inner, where)
        if origin is Mapping:
            if not isinstance(value, Mapping):
                raise self.error(f"{where}: expected names with values, got {value!r}")
            key, inner = arguments
            return {self.value(k, key, f"{where}.{k}"): self.value(v, inner, f"{where}.{k}") for k, v in value.items()}
        if origin is not None:
            if not isinstance(value, list):
                raise self.error(f"{where}: expected a list, got {value!r}")
            return (frozenset if origin is frozenset else tuple)(self.value(v, arguments[0], where) for v in value)
        if hint is Any:
            return value
        if hint in (float, Decimal) and type(value) in (int, hint):
            if not math.isfinite(Decimal(value)):  # an int that no float holds raises otherwise
                raise self.error(f"{where}: expected a finite number, got {value!r}")
            return Decimal(value) if hint is Decimal else value
        if type(value) is not hint:
            raise self.error(f"{where}: expected {WORDS[hint]}, got {value!r}")
        return value
