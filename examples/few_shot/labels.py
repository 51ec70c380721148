"""Names at points: each beside its own, where it covers no other name and no marker, and joined to it by a line.

Every name tries places around its point and takes the one that costs least, in a few rounds, so that each can move once
the others stand; of several orders of names the best is kept. Lengths are in points of 1/72 inch; a box is (left,
bottom, right, top).
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation


#: Names to place are annotations with this gid.
LABEL = "label"
#: Gaps between a point and its name, and how many directions are tried.
GAPS, DIRECTIONS = (8, 16, 26, 38, 52, 68, 86), 16
#: Half the side of a marker, and the room around a name.
MARKER, ROOM = 6.0, 1.5
#: What a place costs beside its gap: for covering another name, a marker or other text such as that of a line of equal
#: score, for lying outside of the axes, and for each line to a point that passes through a name or a marker.
ON_NAME, ON_MARKER, ON_TEXT, OUTSIDE, THROUGH = 1000.0, 600.0, 40.0, 2000.0, 150.0
#: Rounds at most, and orders of names that are tried.
ROUNDS, ORDERS = 6, 8
#: Where a line is looked at, as shares of its length.
ALONG = np.linspace(0.0, 1.0, 20)


def add_label(axes: Axes, name: str, point: tuple[float, float], colour: str) -> None:
    """A name that `place_labels` moves beside its point (x, y), once everything else is drawn."""
    axes.annotate(
        name,
        point,
        (0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8,
        color=colour,
        gid=LABEL,
        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        zorder=6,
    )


def place_labels(axes: Axes) -> None:
    """Move the names of axes whose size does not change any more: the figure was drawn once."""
    labels = [text for text in axes.texts if isinstance(text, Annotation) and text.get_gid() == LABEL]
    if not labels:
        return
    scale = 72 / axes.figure.dpi  # pixels -> points
    inside = scale * np.array(axes.get_window_extent().extents)
    texts = [scale * np.array(t.get_window_extent().extents) for t in axes.texts if t not in labels]
    points = np.array([scale * axes.transData.transform(label.xy) for label in labels])
    sizes = [scale * np.array(label.get_bbox_patch().get_window_extent().size) + 2 * ROOM for label in labels]
    for label, offset in zip(labels, offsets_of(points, np.array(sizes), texts, inside), strict=True):
        label.set_position(tuple(offset))


def offsets_of(points: np.ndarray, sizes: np.ndarray, texts: list[np.ndarray], inside: np.ndarray) -> np.ndarray:
    """From N points to the middles of their names.

    Args:
        points: (N, 2).
        sizes: width and height of each name, (N, 2).
        texts: boxes (4,) that had better not be covered.
        inside: box (4,) that names should lie in.

    Returns:
        offsets (N, 2), the best of those found in several orders.
    """
    fixed = np.reshape(texts, (-1, 4)), inside
    rng = np.random.default_rng(0)
    found = [settled(points, sizes, *fixed, rng.permutation(len(points))) for _ in range(ORDERS)]
    return min(found, key=lambda pair: pair[1])[0]


def settled(
    points: np.ndarray, sizes: np.ndarray, texts: np.ndarray, inside: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, float]:
    """Offsets (N, 2) once no name moves any more, or after so many rounds, and what they cost together."""
    offsets, costs = np.zeros_like(points), np.zeros(len(points))
    placed: list[int] = []
    for _ in range(ROUNDS):
        before = offsets.copy()
        for i in order:
            found = directions(sizes[i])  # (K, 2)
            others = [j for j in placed if j != i]
            each = place_costs(i, found, points, sizes, offsets, others)
            boxes = boxes_of(points[i] + found, sizes[i])  # (K, 4)
            each += ON_TEXT * overlaps(boxes, texts).sum(axis=1)
            each += OUTSIDE * ((boxes[:, :2] < inside[:2]) | (boxes[:, 2:] > inside[2:])).any(axis=1)
            offsets[i], costs[i] = found[np.argmin(each)], each.min()
            placed = [*others, i]
        if np.array_equal(before, offsets):
            break
    return offsets, float(costs.sum())


def place_costs(
    i: int, found: np.ndarray, points: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, others: list[int]
) -> np.ndarray:
    """What it costs beside other names and all markers to have name `i` at each of K offsets, (K,)."""
    markers = np.hstack([points - MARKER, points + MARKER])  # (N, 4)
    boxes = boxes_of(points[i] + found, sizes[i])  # (K, 4)
    names = boxes_of(points[others] + offsets[others], sizes[others])
    costs = np.hypot(*np.maximum(np.abs(found) - sizes[i] / 2, 0).T)
    costs += ON_MARKER * overlaps(boxes, markers).sum(axis=1) + ON_NAME * overlaps(boxes, names).sum(axis=1)
    apart = markers[~overlaps(markers[i : i + 1], markers)[0]]  # a line leaves a crowd of markers anyhow
    costs += THROUGH * crossings(points[i], found, np.vstack([names, apart])).sum(axis=1)
    for j in others:
        costs += THROUGH * crossings(points[j], offsets[j : j + 1], boxes)[0]
    return costs


def directions(size: np.ndarray) -> np.ndarray:
    """Offsets (K, 2) of a name of this size, whose edge is one of `GAPS` away."""
    angles = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # (D, 2)
    return np.vstack([gap * around + around * size / 2 for gap in GAPS])


def boxes_of(middles: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) of names with these middles, (N, 2)."""
    return np.hstack([middles - sizes / 2, middles + sizes / 2])


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each of K boxes overlaps with each of M others, (K, M)."""
    a, b = boxes[:, None], others[None]  # (K, 1, 4) and (1, M, 4)
    return ((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(axis=2)


def crossings(point: np.ndarray, offsets: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether the line from a point (2,) along each of K offsets passes through each of M boxes, (K, M)."""
    lines = (point + ALONG[:, None, None] * offsets)[:, :, None]  # (L, K, 1, 2)
    return ((lines > boxes[:, :2]) & (lines < boxes[:, 2:])).all(axis=3).any(axis=0)
