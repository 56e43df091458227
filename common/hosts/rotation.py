"""Rotary position embedding of tokens: exact rows of the host's table for patches, angles for what lies between them.

In every host the angles are linear in a patch's row and column. A patch that is kept takes its row of the table along;
a token that stands for several has the weighted mean of their coordinates, and its angles are computed from that.

Letters: B images, P patches, K tokens that are left of them, d channels of a head, h heads.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotation(ABC):
    """Where the tokens behind the prefix are: on the grid, some patches of it, or anywhere."""

    grid: tuple[int, int]
    index: Tensor | None = None
    """which patches of the grid are left, (B, K); None for all of them"""
    places: Tensor | None = None
    """rows and columns of tokens that are no patches any more, (B, K, 2)"""

    @abstractmethod
    def of(self, layer: int) -> Tensor:
        """Sines, then cosines, of the tokens' angles: (K, 2 d), (h, K, 2 d), (B, 1, K, 2 d) or (B, h, K, 2 d)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the tables."""

    @property
    def coordinates(self) -> Tensor:
        """Rows and columns of the tokens, whole numbers until they merge, (1 or B, K, 2)."""
        if self.places is not None:
            return self.places
        sides = (torch.arange(side, device=self.device, dtype=torch.float32) for side in self.grid)
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)[None]
        return places if self.index is None else pick(places, self.index)

    def take(self, index: Tensor) -> Self:
        """That of some of the tokens, exactly: ``index`` is (B, K)."""
        if self.places is not None:
            return self.at(pick(self.places, index))
        return replace(self, index=index if self.index is None else self.index.gather(1, index))

    def part(self, tokens: slice) -> Self:
        """That of neighbours among tokens that were taken, views."""
        index, places = (None if each is None else each[:, tokens] for each in (self.index, self.places))
        return replace(self, index=index, places=places)

    def at(self, coordinates: Tensor) -> Self:
        """That of tokens elsewhere: ``coordinates`` is (B, K, 2)."""
        return replace(self, index=None, places=coordinates)


@dataclass(frozen=True, kw_only=True)
class TableRotation(Rotation):
    """One table for all layers and heads."""

    table: Tensor
    """of the grid: sines, then cosines, (P, 2 d)"""
    frequencies: Tensor | None = None
    """angles per row and per column up to one factor for each, (2, d), where they are known: steps between patches of
    more than half a turn cannot be read from the table alone"""
    line: tuple[Tensor, Tensor] | None = None
    """angles of the patch in row 0 and column 0, (d,), and angles per row and per column, (2, d), once asked for"""
    current: Tensor | None = None
    """of the tokens that are left, (B, 1, K, 2 d)"""

    @property
    def device(self) -> torch.device:
        return self.table.device

    def of(self, layer: int) -> Tensor:
        return self.table if self.current is None else self.current

    def take(self, index: Tensor) -> Self:
        taken = super().take(index)
        return taken if taken.index is None else replace(taken, current=pick(self.table[None], taken.index)[:, None])

    def part(self, tokens: slice) -> Self:
        assert self.current is not None
        return replace(super().part(tokens), current=self.current[..., tokens, :])

    def at(self, coordinates: Tensor) -> Self:
        first, rates = line = self.line or read_line(self.table, self.grid, self.frequencies)
        table = turn(first + sum_of_angles(coordinates, rates[0], rates[1])).to(self.table.dtype)
        return replace(super().at(coordinates), line=line, current=table[:, None])


@dataclass(frozen=True, kw_only=True)
class LayerRotation(Rotation):
    """A table for every layer and head, made where it is asked for: those of all layers at once would be large."""

    tables: Tensor
    """of the grid, (layers, h, P, 2 d)"""
    rates: Tensor
    """angles per row and per column, (2, layers, h, d); 0 at row 0 and column 0"""

    @property
    def device(self) -> torch.device:
        return self.tables.device

    def of(self, layer: int) -> Tensor:
        table = self.tables[layer]
        if self.places is not None:
            rows, columns = self.rates[:, layer, :, None].float()  # (h, 1, d)
            return turn(sum_of_angles(self.places[:, None], rows, columns)).to(table.dtype)
        return table if self.index is None else pick(table, self.index[:, None])


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (..., P, d) of an index (..., K), whose leading dimensions broadcast."""
    lead = torch.broadcast_shapes(rows.shape[:-2], index.shape[:-1])
    rows = rows.expand(*lead, *rows.shape[-2:])
    return rows.gather(-2, index.expand(*lead, -1)[..., None].expand(*lead, -1, rows.shape[-1]))


def turn(angles: Tensor) -> Tensor:
    """Sines, then cosines."""
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sum_of_angles(coordinates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Angles (..., K, d) of coordinates (..., K, 2); a sum, not a product of matrices, which autocast would halve."""
    row, column = coordinates.to(rows.dtype).split(1, dim=-1)
    return row * rows + column * columns


def read_line(table: Tensor, grid: tuple[int, int], frequencies: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a table (P, 2 d) of a grid says at (0, 0), (d,), and adds per row and per column, (2, d)."""
    sine, cosine = table.float().unflatten(0, grid).chunk(2, dim=-1)  # (rows, columns, d)

    def step(sine: Tensor, cosine: Tensor) -> Tensor:
        """Mean angle from one entry of the first dimension to the next, (d,)."""
        if len(sine) < 2:
            return sine.new_zeros(sine.shape[-1])
        across = sine[1:] * cosine[:-1] - cosine[1:] * sine[:-1]
        along = cosine[1:] * cosine[:-1] + sine[1:] * sine[:-1]
        return torch.atan2(across.mean((0, 1)), along.mean((0, 1)))

    rates = torch.stack([step(sine, cosine), step(sine.transpose(0, 1), cosine.transpose(0, 1))])
    if frequencies is not None:
        known = frequencies.to(rates.dtype)
        lowest = known.masked_fill(known == 0, torch.inf).min(1, keepdim=True)  # turns least, so that its step is sure
        expected = rates.gather(1, lowest.indices) / lowest.values * known
        rates = rates + 2 * torch.pi * ((expected - rates) / (2 * torch.pi)).round()
        rates = known * (rates * known).sum(1, keepdim=True) / known.square().sum(1, keepdim=True)
    return torch.atan2(sine[0, 0], cosine[0, 0]), rates
