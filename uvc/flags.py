"""Kinds of values on UVC's command lines. Imports no torch."""

from __future__ import annotations

import argparse

from common.run.flags import not_negative


def switch(text: str) -> bool:
    """1 or 0, as the published commands write it."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return text == "1"


def numbers(text: str) -> list[float]:
    """Rates separated by commas."""
    try:
        values = [not_negative(part) for part in text.split(",") if part.strip()]
    except (ValueError, argparse.ArgumentTypeError):
        values = []
    if not values:
        raise argparse.ArgumentTypeError(f"must be numbers from 0 on, separated by commas, such as 1,5,9, got {text!r}")
    return values


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value
