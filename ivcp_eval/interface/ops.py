"""Tensor helpers that methods share: budgets, ranking with one tie rule, attention rows, merge weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ivcp_eval.interface import Image, Signals


class Part(Protocol):
    """An image, or a clip: anything with alive tokens (N,), as indices into the row's visual tokens."""

    @property
    def tokens(self) -> Tensor: ...


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` on the CPU, the bytes of each device in one transfer: the host waits for a GPU once, not for each."""
    found = list(tensors)
    for device in {tensor.device for tensor in tensors} - {torch.device("cpu")}:
        here = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        parts = [tensors[place].detach().contiguous().reshape(-1).view(torch.uint8) for place in here]
        packed = torch.cat(parts).cpu().split([part.numel() for part in parts])
        for place, part in zip(here, packed, strict=True):
            # A copy each: not every part begins where its dtype may.
            found[place] = part.clone().view(tensors[place].dtype).reshape(tensors[place].shape)
    return found


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, whose values the host knows, on ``device``, without waiting for what a GPU has still to do.

    Pageable host memory is read before the call returns, so it may be changed or freed at once.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


LOWEST = torch.finfo(torch.float32).min
"""A score below every other, and above minus infinity, which marks what is not to be chosen (again)."""


def budget(ratio: float, n_tokens: int) -> int:
    """How many of an image's ``n_tokens`` visual tokens a retention ratio keeps: the one rounding rule.

    Python's ``round`` of the product (half to even, as in the released IVC-Prune code), and at least one token.
    """
    return min(n_tokens, max(1, round(ratio * n_tokens)))


def apportion(total: int, shares: Sequence[float], limits: Sequence[int]) -> list[int]:
    """``total`` split in proportion to ``shares``, none above its limit: largest remainders, ties to the first.

    What a limit cuts off goes to the others in the same proportion.

    Raises:
        ValueError: ``total`` is more than all limits together, or no share is positive where something is to be split.
    """
    if total > sum(limits):
        raise ValueError(f"{total} cannot be split: the limits {list(limits)} hold {sum(limits)} together")
    given, open_parts, left = [0] * len(shares), list(range(len(shares))), total
    while left:
        whole = sum(shares[i] for i in open_parts)
        if whole <= 0:
            raise ValueError(f"no positive share among {[shares[i] for i in open_parts]} for the {left} left to split")
        fair = {i: left * shares[i] / whole for i in open_parts}
        full = [i for i in open_parts if fair[i] >= limits[i]]
        if not full:
            down = {i: int(fair[i]) for i in open_parts}
            ranked = sorted(open_parts, key=lambda i: down[i] - fair[i])
            extra = set(ranked[: left - sum(down.values())])
            for i in open_parts:
                given[i] = down[i] + (i in extra)
            break
        for i in full:
            given[i] = limits[i]
            left -= limits[i]
        open_parts = [i for i in open_parts if i not in full]
    return given


def budgets(ratio: float, sizes: Sequence[int], alive: Sequence[int], groups: Sequence[Hashable]) -> list[int]:
    """How many tokens of each image may stay: that of all images of one group together, split by their ``sizes``.

    Args:
        sizes: tokens in the prompt. alive: those left, which is the most that may stay. groups: what images share.
    """
    found, together = [0] * len(sizes), dict[Hashable, list[int]]()
    for place, group in enumerate(groups):
        together.setdefault(group, []).append(place)
    for members in together.values():
        shares, limits = ([counts[place] for place in members] for counts in (sizes, alive))
        allowed = min(budget(ratio, sum(shares)), sum(limits))
        for place, share in zip(members, apportion(allowed, shares, limits), strict=True):
            found[place] = share
    return found


def ranking(score: Tensor) -> Tensor:
    """Indices of ``score`` (N,) from best to worst, in float32; NaN is worst, ties fall to the lower index."""
    clean = torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(clean, descending=True, stable=True).indices


def top(score: Tensor, k: int) -> Tensor:
    """The ``k`` best indices of ``score`` (N,), increasing. ``k`` is clipped to 0..N."""
    return ranking(score)[: max(0, k)].sort().values


def top_of_each_image(score: Tensor, images: Sequence[Image]) -> Tensor:
    """Indices into the visual tokens, increasing: of each image its ``budget`` best by ``score`` (V,)."""
    kept = [image.tokens[top(score[image.tokens], image.budget)] for image in images]
    return torch.cat(kept).sort().values


def best_of_rest(score: Tensor, kept: Tensor, k: int) -> Tensor:
    """The ``k`` best indices of ``score`` (N,) outside of ``kept`` (N,) bool, best first; NaN last, as in `ranking`."""
    finite = torch.nan_to_num(score.float(), nan=LOWEST, neginf=LOWEST)
    return ranking(finite.masked_fill(kept, -torch.inf))[: max(0, k)]


def filled_up(score: Tensor, kept: Tensor, k: int) -> Tensor:
    """(k,) int64, increasing: the ``kept`` tokens, (N,) bool and k at most, and the best by ``score`` of the others.

    As `best_of_rest`, but the host need not know how many are kept.
    """
    order = ranking(torch.nan_to_num(score.float(), nan=LOWEST, neginf=LOWEST))
    first = torch.sort(kept[order].to(torch.uint8), descending=True, stable=True).indices
    return order[first[: max(0, k)]].sort().values


def place_in_group(score: Tensor, group: Tensor) -> Tensor:
    """(N,) how many members of a token's own ``group`` (N,) have a better ``score`` (N,); ties as in `ranking`."""
    order = ranking(score)
    sorted_group, by_group = torch.sort(group[order], stable=True)
    order = order[by_group]
    first = torch.searchsorted(sorted_group, sorted_group)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - first
    return place


def coordinate_set(cos: Tensor, sin: Tensor, image: Image, ivc: float, share: float) -> Tensor:
    """(N,) bool: the implicit visual coordinates of IVC-Prune among an image's alive tokens.

    In every view of the image the best tokens by ``cos`` and the best by ``sin``, each ``ivc`` of the view's tokens
    but at most ``share`` of its part of the budget, and at most half of it, so that both fit.

    Args:
        cos, sin: (N,) mean of the tokens' rotary cosines and sines over the spectrum.
    """
    each = coordinate_shares(image, ivc, share)
    view = torch.zeros(cos.numel(), dtype=torch.int64, device=cos.device) if image.view is None else image.view
    most = to_device(torch.tensor(each), cos.device)[view]
    return (place_in_group(cos, view) < most) | (place_in_group(sin, view) < most)


def coordinate_shares(image: Image, ivc: float, share: float) -> list[int]:
    """Of every view of the image, how many tokens `coordinate_set` takes by each of its two scores."""
    found = []
    for n_view in image.span.views or (image.n_prompt,):
        part = image.budget * n_view / image.n_prompt
        found.append(min(round(ivc * n_view), round(share * part), int(part / 2)))
    return found


def first_best(score: Tensor) -> Tensor:
    """() int64: the lowest index of the maximum of ``score`` (N,), without a transfer to the host; NaN is worst."""
    clean = torch.where(score.isnan(), -torch.inf, score.float())
    places = torch.arange(clean.numel(), device=clean.device)
    return torch.where(clean == clean.amax(), places, clean.numel()).amin()


def mean_attention(signals: Signals, rows: Tensor, *, entering: bool = False, chunk: int = 64) -> Tensor:
    """(V,) float32: attention from the query ``rows`` (r,) to each visual token, mean over rows and heads.

    ``chunk`` rows at a time, so that long questions on long prompts stay small.
    """
    total = torch.zeros(signals.n_visual, device=signals.visual.device)
    for part in rows.split(chunk):
        total += signals.attention(part, entering=entering)[:, :, signals.visual].mean(dim=0).sum(dim=0)
    return total / max(1, rows.numel())


def last_token(signals: Signals) -> Tensor:
    """(1,) int64: the row's last token, whose attention many methods rank by."""
    return torch.full((1,), signals.hidden.shape[0] - 1, device=signals.visual.device)


def evenly(n: int, k: int) -> Tensor:
    """``k`` <= n distinct indices spread evenly over 0..n-1, increasing: the middles of k nearly equal stretches.

    Stretch j holds the indices i with ``i * k // n == j``; of two middles the lower is taken.
    """
    edges = -(-torch.arange(k + 1) * n // max(1, k))
    return (edges[:-1] + edges[1:] - 1) // 2


def partition(rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor]:
    """Cut a row-major grid into ``groups`` compact, evenly spread cells of nearly equal size.

    Bands of rows, about as many as keep the cells in the grid's own proportions; each band is cut into stretches of
    columns. Every group has at least one token.

    Returns:
        (group, centre): (rows * columns,) group of each token; (groups,) token in the middle of each group,
        increasing with the group.
    """
    bands = max(1, round(rows * (groups / (rows * columns)) ** 0.5))
    bands = min(rows, groups, max(bands, -(-groups // columns)))
    band_of_row = torch.arange(rows) * bands // rows
    per_band = torch.diff(torch.arange(bands + 1) * groups // bands)  # stretches in each band
    first_group = torch.cumsum(per_band, 0) - per_band
    widths = per_band[band_of_row][:, None]
    group = first_group[band_of_row][:, None] + torch.arange(columns)[None] * widths // columns
    middles, stretches = evenly(rows, bands).tolist(), per_band.tolist()
    within = {k: evenly(columns, k).tolist() for k in set(stretches)}
    centres = [row * columns + c for row, k in zip(middles, stretches, strict=True) for c in within[k]]
    return group.flatten(), torch.tensor(centres)


def image_partition(image: Image) -> tuple[Tensor, Tensor]:
    """`partition` of an image's alive tokens into ``budget`` groups; in one line where they form no full grid."""
    n, device = image.tokens.numel(), image.tokens.device
    rows, columns = image.span.grid or (1, n)
    if rows * columns != n:
        rows, columns = 1, n
    group, centre = partition(rows, columns, image.budget)
    return to_device(group, device), to_device(centre, device)


def sparse_weights(row: Tensor, column: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    """Sparse merge weights of ``size`` from the places and values (M,) of those that are not 0.

    A dense matrix would grow with the square of the visual tokens.
    """
    return torch.sparse_coo_tensor(torch.stack((row, column)), value, size, check_invariants=False).coalesce()


def itself(tokens: Tensor, n: int) -> Tensor:
    """(K, n) sparse float32 weights with which the ``tokens`` (K,) of n stay as they are."""
    return sparse_weights(
        torch.arange(tokens.numel(), device=tokens.device), tokens, torch.ones_like(tokens).float(), (tokens.numel(), n)
    )


def group_means(group: Tensor, n_groups: int) -> Tensor:
    """(n_groups, N) sparse float32 weights that average the members of each group; ``group``: (N,)."""
    members = torch.arange(group.numel(), device=group.device)
    sizes = torch.zeros(n_groups, device=group.device).index_add_(0, group, torch.ones_like(group).float())
    return sparse_weights(group, members, 1 / sizes[group], (n_groups, group.numel()))


def merged_selection(kept: Sequence[Tensor], weights: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """(keep, merge) of a `Selection` from each part's kept tokens (K_i,) and weights (K_i, N_i), both part-local.

    The parts are the row's images, or its clips. Weights may be dense or sparse; those returned are sparse.
    """
    keep = torch.cat([part.tokens[local] for part, local in zip(parts, kept, strict=True)])
    place = keep.argsort().argsort()
    rows, columns, values, first = [], [], [], 0
    for part, local, weight in zip(parts, kept, weights, strict=True):
        sparse = weight.to_sparse().coalesce()
        row, column = sparse.indices()
        rows.append(place[first + row])
        columns.append(part.tokens[column])
        values.append(sparse.values())
        first += local.numel()
    size = (keep.numel(), sum(part.tokens.numel() for part in parts))
    return keep.sort().values, sparse_weights(torch.cat(rows), torch.cat(columns), torch.cat(values), size)


def merged_states(merge: Tensor, states: Tensor, chunk: int = 256) -> Tensor:
    """(K, E) float32 ``merge @ states`` of weights (K, V), dense or sparse, and states (V, E).

    ``chunk`` rows are dense at a time: memory stays linear in V, and dense products come out alike in every run.
    """
    rows, states = torch.arange(merge.shape[0], device=merge.device), states.float()
    return torch.cat([merge.index_select(0, part).to_dense().float() @ states for part in rows.split(chunk)])


def merge_targets(merge: Tensor) -> Tensor:
    """(V,) int64: the row of weights (K, V), dense or sparse, in which each column is largest; -1 where none is > 0.

    Of equal weights the first row wins. Memory is that of the weights.
    """
    if merge.layout == torch.strided:
        if not merge.shape[0]:
            return merge.new_full((merge.shape[1],), -1, dtype=torch.int64)
        most, row = merge.max(dim=0)
        return torch.where(most > 0, row, -1)
    sparse = merge.to_sparse().coalesce()
    (rows, columns), weights = sparse.indices(), sparse.values().float()
    most = weights.new_zeros(merge.shape[1]).scatter_reduce(0, columns, weights, "amax")
    none = merge.shape[0]
    among = torch.where((weights == most[columns]) & (weights > 0), rows, none)
    first = rows.new_full((merge.shape[1],), none).scatter_reduce(0, columns, among, "amin")
    return torch.where(first < none, first, -1)


def block_rows(n: int) -> int:
    """How many of ``n`` rows to compare with all others at a time: few blocks, and memory linear in ``n``."""
    return min(2048, max(256, n // 8))


def unit_rows(states: Tensor) -> Tensor:
    """(N, E) float32 ``states`` of length 1; rows that are not finite become 0."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    finite = unit.isfinite().all(dim=1, keepdim=True)
    return unit.nan_to_num(0, 0, 0).masked_fill(~finite, 0)  # the first is what the engine counts broken states by


def max_similarity(rows: Tensor, others: Tensor) -> Tensor:
    """(N,) the largest inner product of each of ``rows`` (N, E) with one of ``others`` (M, E)."""
    n, m = len(rows), max(1, len(others))
    return torch.cat([(part @ others.T).amax(dim=1) for part in rows.split(max(256, block_rows(n + m) * (n + m) // m))])


def nearest_of(rows: Tensor, others: Tensor) -> Tensor:
    """(N,) int64 which of ``others`` (M, E) has the largest cosine to each of ``rows`` (N, E)."""
    rows, others = unit_rows(rows), unit_rows(others)
    return torch.cat([(part @ others.T).argmax(dim=1) for part in rows.split(block_rows(len(rows)))])


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float32 Euclidean distances of (N, E) and (M, E).

    From differences, not from inner products: states with a large common part (massive channels of hidden states, key
    biases) would lose in these what tells them apart.
    """
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


def unit_range(score: Tensor) -> Tensor:
    """(N,) float32 scores moved to 0..1 by the least and the largest finite one.

    Infinity becomes 1; minus infinity and NaN stay, and rank last.
    """
    clean = score.float()
    finite = clean.isfinite()
    low = torch.where(finite, clean, torch.inf).amin()
    high = torch.where(finite, clean, -torch.inf).amax()
    return ((clean - low) / (high - low).clamp_min(1e-12)).clamp_max(1)


def density_peaks(states: Tensor, k: int, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
    """DPC-kNN clusters of ``states`` (N, E): (k,) centres, best first, and (N,) the cluster of each state.

    Density is exp of minus the mean squared distance (divided by sqrt(E)) to the ``neighbours`` nearest states (None: k
    of them), itself included. Centres have the largest product of density and distance to the nearest denser state
    (the densest: to the farthest of all); every other state joins the nearest centre. Of equally dense states the lower
    index counts as denser; ties fall to the lower index. Memory is linear in N.
    """
    every = torch.arange(len(states), device=states.device)
    parts = every.split(block_rows(len(states)))

    def apart(rows: Tensor) -> Tensor:
        return distances(states[rows], states) / states.shape[1] ** 0.5

    known = apart(every) if len(parts) == 1 else None  # else too large to keep, and computed twice
    nearest, density, longest = min(neighbours or k, len(states)), [], []
    for rows in parts:
        distance = apart(rows) if known is None else known
        density.append((-(distance.topk(nearest, dim=1, largest=False).values ** 2).mean(dim=1)).exp())
        longest.append(distance.max())
    dense, farthest = torch.cat(density), torch.stack(longest).max()
    place = torch.empty_like(order := ranking(dense))
    place[order] = every
    parent = []
    for rows in parts:
        distance = apart(rows) if known is None else known
        parent.append(torch.where(place < place[rows, None], distance, farthest).amin(dim=1))
    centres = ranking(torch.cat(parent) * dense)[:k]
    cluster = torch.cat([distances(states[rows], states[centres]).argmin(dim=1) for rows in parts])
    cluster[centres] = torch.arange(k, device=cluster.device)
    return centres, cluster
