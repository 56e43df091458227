"""Settings of a method against the annotations of its fields: one check for all methods, in words.

A number may be a whole one where any number may be, and a list or range stands for a tuple; True is no number.
"""

import ast
import difflib
import operator
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.run.errors import UsageError

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a word", type(None): "None"}
PLURALS = {int: "whole numbers", float: "numbers"}


class SettingError(UsageError):
    """A setting of a wrong kind."""


def checked_settings(method: Any) -> Any:
    """The method, lists made the tuples that they stand for.

    Args:
        method: a dataclass whose fields are its settings.

    Raises:
        SettingError: naming the setting, what it may be, what it was, and the nearest that is valid.
    """
    kinds, changes = get_type_hints(type(method)), {}
    for setting in fields(method):
        kind, value = kinds[setting.name], getattr(method, setting.name)
        if fits(value, kind):
            continue
        if isinstance(value, (list, range)):
            forms = [form for form in (list(value), tuple(value)) if fits(form, kind)]
            if forms:
                changes[setting.name] = forms[0]
                continue
        near = next((each for each in _neighbours(value, kind) if fits(each, kind)), None)
        hint = "" if near is None else f", did you mean {near!r}?"
        raise SettingError(f"{setting.name} must be {describe(kind)}, got {value!r}{hint}")
    return replace(method, **changes) if changes else method


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated kind: numbers, words, None, and unions, tuples, lists, literals of them."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each_kind = (inner[0],) * len(value) if inner[-1] is ... else inner
        return len(value) == len(each_kind) and all(map(fits, value, each_kind))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def describe(kind: Any) -> str:
    """A kind in words, what is spelt out first and None last."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        ranked = sorted(inner, key=lambda each: (each is type(None), get_origin(each) is not Literal))
        return " or ".join(describe(each) for each in ranked)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list:
        return f"a list of {PLURALS.get(inner[0], describe(inner[0]))}"
    if origin is tuple:
        many = "" if inner[-1] is ... else f"{len(inner)} "
        return f"a tuple of {many}{PLURALS.get(inner[0], describe(inner[0]))}"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _neighbours(value: object, kind: Any) -> Iterator[object]:
    """What may have been meant, likeliest first."""
    if isinstance(value, str):
        words = [word for each in (kind, *get_args(kind)) if get_origin(each) is Literal for word in get_args(each)]
        yield from difflib.get_close_matches(value, [word for word in words if isinstance(word, str)], n=1)
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return
        yield value
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    with suppress(TypeError, RuntimeError):
        yield operator.index(value)  # pyright: ignore[reportArgumentType] - True, and whole numbers of other libraries
    yield (value,)
