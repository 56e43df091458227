"""Token merging: which tokens merge into which, and the merging itself. Nothing here knows a network.

Paper: Token Merging: Your ViT But Faster, arXiv:2210.09461, section 3. Written from the text.

Letters: B images, N tokens in, U tokens out, r tokens merged away, C channels, c channels of the metric.

A ``Matching`` says for each token that comes out from which position it starts, and for each token merged away into
which row it goes. Bipartite soft matching (the method), k-th and random matching (its ablations) differ in how they
choose these; merging, averaging and undoing are the same for all.

All functions are out of place and differentiable with respect to the tokens; the choice itself has no gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops

MODES = ("sum", "mean", "amax")

Unmerge = Callable[[Tensor], Tensor]


class Merge(Protocol):
    """Merges tokens (B, N, C) to (B, U, C)."""

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor: ...


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """Merging, or undoing it, where nothing is merged."""
    return x


class Matching:
    """Which tokens merge into which. Calling it merges.

    Args:
        keep: position among the N tokens that each of the U rows starts from, (B, U) int64.
        source: positions of the tokens merged away, (B, r) int64.
        into: row that each of them joins, (B, r) int64.
        num_tokens: N.
        scatter: form of the computation, see ``ops.FORMS``.
        unordered: ``keep`` before rows were moved to the front; None if none were.
        num_restored: tokens that ``unmerge`` returns; None for N.
    """

    def __init__(
        self,
        keep: Tensor,
        source: Tensor,
        into: Tensor,
        num_tokens: int,
        scatter: str = "auto",
        *,
        unordered: Tensor | None = None,
        num_restored: int | None = None,
    ) -> None:
        self.keep, self.source, self.into = keep, source, into
        self.num_tokens = num_tokens
        self.scatter = scatter
        self.unordered = keep if unordered is None else unordered
        self.num_restored = num_tokens if num_restored is None else num_restored

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Reduce each merged token into the row it joins; the token that the row starts from takes part.

        Args:
            x: tokens, (m B, N, C); with m > 1 sample i uses match i mod B.
            mode: "sum", "mean" or "amax" (largest value per channel).

        Returns:
            (m B, U, C): first the tokens that stayed, then the others that tokens may have merged into.

        Raises:
            ValueError: for another mode, or if the batch is not a multiple of B.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        reduce = self._reducer(x)
        if mode != "mean":
            return reduce(x, mode)
        return reduce(x, "sum") / reduce(torch.ones_like(x[..., :1]), "sum")

    def average(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average merged tokens, each weighted by the number of patches it stands for.

        Args:
            x: tokens, (m B, N, C).
            size: patches that each token stands for, (m B, N, 1); None for one each.

        Returns:
            Tokens (m B, U, C) of the type of ``x`` and sizes (m B, U, 1). Sizes of half-precision tokens are float32:
            bfloat16 cannot count beyond 256.
        """
        if ops.fuses(self.scatter, x, size):
            return ops.merge_wavg(x, size, *self._tile(x.shape[0]))
        wide = ops.accumulation_type(x.dtype)
        size = torch.ones_like(x[..., :1], dtype=wide) if size is None else size
        if self.scatter == "torch_scatter" or x.is_meta:  # on meta operations are counted, those of the published code
            reduce = self._reducer(x)
            total = reduce(size, "sum")
            return (reduce(x * size, "sum") / total).to(x.dtype), total
        # Only what joins a row moves it, by its share of the distance: most rows are copied as they are.
        keep, source, into = self._tile(x.shape[0])
        rows, weight = take_rows(x, keep), take_rows(size, source)
        total = take_rows(size, keep).scatter_add(1, into[..., None], weight)
        flat = flat_index(into, rows.shape[1])
        joined = rows.flatten(0, 1).index_select(0, flat).view(*into.shape, x.shape[2])
        moves = (take_rows(x, source).to(wide) - joined) * (weight / total.gather(1, into[..., None]))
        if x.dtype != wide:  # moves of a row are added before they are rounded, in the place of one of them
            ranks = torch.arange(into.shape[1], device=x.device).expand_as(into)
            place = into.new_zeros(rows.shape[:2]).scatter(1, into, ranks).gather(1, into)
            moves = (
                moves.new_zeros(moves.shape)
                .flatten(0, 1)
                .index_add_(0, flat_index(place, into.shape[1]), moves.flatten(0, 1))
            )
        rows.flatten(0, 1).index_add_(0, flat, moves.flatten(0, -2).to(x.dtype))
        return rows, total

    def unmerge(self, x: Tensor, *, restore_order: bool = False) -> Tensor:
        """Put rows back at their positions; a merged token gets a copy of the row it joined.

        Args:
            x: rows, (m B, U, C).
            restore_order: also undo that protected tokens were moved to the front (a distillation token). The
                published code does not, so that class and distillation token come back elsewhere.

        Returns:
            (m B, N, C).
        """
        keep, source, into = self._tile(x.shape[0], ordered=restore_order)
        row = into.new_zeros(x.shape[0], self.num_restored)
        ranks = torch.arange(keep.shape[1], device=x.device).expand_as(keep)
        row = row.scatter(1, keep, ranks).scatter(1, source, into)
        return take_rows(x, row)

    def _tile(self, batch: int, *, ordered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """``keep`` (or ``unordered``), ``source`` and ``into`` repeated for a batch that is a multiple of B."""
        keep = self.keep if ordered else self.unordered
        if batch == self.keep.shape[0]:  # also without any image
            return keep, self.source, self.into
        times, rest = (
            batch // self.keep.shape[0],
            batch % self.keep.shape[0],
        )  # divmod of symbolic sizes cannot be compiled
        if rest:
            raise ValueError(f"the batch must be a multiple of the {self.keep.shape[0]} samples matched, got {batch}")
        return keep.repeat(times, 1), self.source.repeat(times, 1), self.into.repeat(times, 1)

    def _reducer(self, x: Tensor) -> Callable[[Tensor, str], Tensor]:
        """A function that reduces tensors with batch and tokens of ``x`` by "sum" or "amax"."""
        keep, source, into = self._tile(x.shape[0])
        shape = keep.shape
        keep, source = flat_index(keep, x.shape[1]), flat_index(source, x.shape[1])
        into = flat_index(into, shape[1])

        def reduce(x: Tensor, mode: str) -> Tensor:
            x = x.flatten(0, 1)
            rows, merged = x.index_select(0, keep), x.index_select(0, source)
            if self.scatter == "torch_scatter":
                rows = ops.torch_scatter().scatter(merged, into, dim=0, out=rows, reduce=_TORCH_SCATTER_NAMES[mode])
            elif mode == "sum":
                rows.index_add_(0, into, merged)  # rows are a copy: nobody's tensor is changed
            else:
                rows = rows.scatter_reduce(0, into[:, None].expand_as(merged), merged, mode, include_self=True)
            return rows.view(*shape, rows.shape[1])

        return reduce


_TORCH_SCATTER_NAMES = {"sum": "sum", "amax": "max"}


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B, N, C) at ``index`` (B, K): (B, K, C). Flat, because one index per row beats one per element."""
    return x.flatten(0, 1).index_select(0, flat_index(index, x.shape[1])).view(*index.shape, x.shape[2])


def flat_index(index: Tensor, rows: int) -> Tensor:
    """``index`` (B, K) into (B, rows) as one into (B rows), (B K)."""
    if index.shape[0] > 1:
        index = index + torch.arange(0, index.shape[0] * rows, rows, device=index.device)[:, None]
    return index.flatten()


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    *,
    prefix_tokens: int | None = None,
    scatter: str = "auto",
) -> tuple[Merge, Unmerge]:
    """Match the r most similar pairs between the tokens at even (a) and at odd positions (b), and merge a into b.

    Each a-token proposes its most similar b-token; the r best proposals are accepted. Tokens come out as [a-tokens that
    stayed, b-tokens], the former in their order if a class token is protected, by falling similarity if not.

    Args:
        metric: what is compared, by cosine, (B, N, c): the keys of the attention, averaged over the heads.
        r: tokens to merge away; at most half of those that may merge do.
        class_token: the first token merges with none.
        distill_token: neither does the second, and both stay in front.
        prefix_tokens: in place of both flags, so many tokens at the beginning merge with none and stay in front, in
            their order (class, distillation and register tokens).
        scatter: form of the computation, see ``ops.FORMS``.

    Returns:
        (merge, unmerge): a ``Matching`` and its ``unmerge``, or ``do_nothing`` twice.

    Source: ToMe, arXiv:2210.09461, section 3, "Bipartite Soft Matching".
    """
    rows, columns = int(class_token), int(distill_token)
    if prefix_tokens is not None:
        rows, columns = (prefix_tokens + 1) // 2, prefix_tokens // 2
    batch, num_tokens = metric.shape[:2]
    r = min(r, merge_limit(num_tokens, rows + columns))
    if r <= 0:
        return do_nothing, do_nothing
    if not columns and ops.fuses(scatter, metric.detach()):
        keep, source, into = ops.match(metric.detach(), r, rows, columns)
        matching = Matching(keep, source, into, num_tokens, scatter)
        return matching, matching.unmerge
    with torch.no_grad():
        scores = similarity(metric[:, ::2], metric[:, 1::2])  # (B, ceil(N / 2), floor(N / 2))
        scores[:, :rows] = -torch.inf
        scores[:, :, :columns] = -torch.inf
        best, partner = scores.max(dim=2)
        if torch.onnx.is_in_onnx_export():  # whose TopK keeps the order of equals, and which has no stable sort
            order = best.topk(best.shape[1], dim=1).indices
        else:
            order = best.argsort(dim=1, descending=True, stable=True)
        stay, leave = order[:, r:], order[:, :r]
        if rows:
            stay = stay.sort(dim=1).values
        odd = torch.arange(1, num_tokens, 2, device=metric.device).expand(batch, -1)
        into = partner.gather(1, leave) + stay.shape[1]
        unordered = torch.cat([2 * stay, odd], dim=1)  # (B, U)
        keep = move_to_front(unordered, stay.shape[1], columns) if columns else unordered
    matching = Matching(keep, 2 * leave, into, num_tokens, scatter, unordered=unordered)
    return matching, matching.unmerge


def merge_limit(num_tokens: int, protected: int) -> int:
    """Largest number of tokens that one bipartite matching merges away: half of those that may merge."""
    return max((num_tokens - protected) // 2, 0)


def move_to_front(keep: Tensor, stayed: int, pairs: int) -> Tensor:
    """Reorder [a-tokens that stayed, b-tokens] so that their first ``pairs`` alternate in front, as they came in."""
    front = torch.stack([keep[:, :pairs], keep[:, stayed : stayed + pairs]], dim=2).flatten(1)
    return torch.cat([front, keep[:, pairs:stayed], keep[:, stayed + pairs :]], dim=1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of all pairs, (B, Na, Nb), in float32 at least: neighbours differ by less than bfloat16 resolves."""
    dtype = ops.accumulation_type(a.dtype)
    with _without_autocast(a.device.type):
        a, b = normalize(a.to(dtype)), normalize(b.to(dtype))
        return a @ b.transpose(1, 2)


def normalize(metric: Tensor) -> Tensor:
    """Vectors of length one; a zero vector stays zero."""
    return metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)


def kth_bipartite_soft_matching(metric: Tensor, k: int, *, scatter: str = "auto") -> tuple[Merge, Unmerge]:
    """Merge all tokens into every k-th: an ablation that keeps N // k tokens.

    The last of every k tokens is a destination, which the k - 1 others of any group may join; tokens behind the last
    whole group are dropped, and ``unmerge`` returns (N // k) k tokens.

    Args:
        metric: what is compared, (B, N, c).
        k: tokens per group; 1 or less merges nothing.
        scatter: form of the computation, see ``ops.FORMS``.

    Raises:
        ValueError: if there are fewer than k tokens.

    Source: ToMe, arXiv:2210.09461, section 4.1, an alternative to alternating sets.
    """
    if k <= 1:
        return do_nothing, do_nothing
    batch, num_tokens = metric.shape[:2]
    groups = num_tokens // k
    if not groups:
        raise ValueError(f"k must be at most the number of tokens, {num_tokens}, got {k}")
    with torch.no_grad():
        position = torch.arange(groups * k, device=metric.device).view(groups, k)
        source, keep = position[:, :-1].flatten(), position[:, -1]
        into = similarity(metric[:, source], metric[:, keep]).argmax(dim=2)
    matching = Matching(
        keep.expand(batch, -1), source.expand(batch, -1), into, num_tokens, scatter, num_restored=groups * k
    )
    return matching, matching.unmerge


def random_bipartite_soft_matching(
    metric: Tensor, r: int, *, draw: Tensor | None = None, scatter: str = "auto"
) -> tuple[Merge, Unmerge]:
    """Merge r random tokens, each into the most similar of the others: an ablation. The others come out shuffled.

    Args:
        metric: what is compared, (B, N, c).
        r: tokens to merge away; 0 merges nothing.
        draw: random numbers that rank the tokens, (B, N) or (B, N, 1); the r smallest leave. None draws them.
        scatter: form of the computation, see ``ops.FORMS``.

    Raises:
        ValueError: if r leaves no token.

    Source: ToMe, arXiv:2210.09461, section 4.1, random sets.
    """
    if r <= 0:
        return do_nothing, do_nothing
    batch, num_tokens = metric.shape[:2]
    if r >= num_tokens:
        raise ValueError(f"r must be less than the number of tokens, {num_tokens}, got {r}")
    with torch.no_grad():
        if draw is None:
            draw = torch.rand(batch, num_tokens, device=metric.device)
        order = draw.view(batch, num_tokens).argsort(dim=1)
        source, keep = order[:, :r], order[:, r:]
        into = similarity(take_rows(metric, source), take_rows(metric, keep)).argmax(dim=2)
    matching = Matching(keep, source, into, num_tokens, scatter)
    return matching, matching.unmerge


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge by a weighted average: each token counts as many times as it stands for patches.

    Args:
        merge: what a matching function returned first.
        x: tokens, (B, N, C).
        size: patches that each token stands for, (B, N, 1); None for one each.

    Returns:
        Tokens (B, U, C) and their sizes (B, U, 1); the sum of tokens times size is conserved.

    Source: ToMe, arXiv:2210.09461, section 3, "Tracking Token Size".
    """
    if isinstance(merge, Matching):
        return merge.average(x, size)
    if size is None:
        size = torch.ones_like(x[..., :1], dtype=ops.accumulation_type(x.dtype))
    total = merge(size, mode="sum")
    return (merge(x * size, mode="sum") / total).to(x.dtype), total


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Track which of the first N tokens are in which token.

    Args:
        merge: what a matching function returned first.
        x: tokens about to be merged, (B, N', C); they give batch, number, type and device.
        source: membership so far, (B, N', N); None before the first merge.

    Returns:
        (B, U, N), 1 where a token of the input is part of a token that comes out, 0 elsewhere.
    """
    if source is None:
        source = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Computation in the tensors' own types, on devices that have automatic mixed precision at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
