"""The figures of a report, as SVG that follows the reader's colour scheme."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import color_sequences, rc_context
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from xmixup_jax.report.palette import DARK, LIGHT, MATRIX, properties
from xmixup_jax.report.scores import Reliability

# Figures are drawn in light colours, which `svg` replaces by the palette's custom properties.
TARGET, SOURCE, TEXT = LIGHT['target'], LIGHT['source'], LIGHT['text']
_NOTE, _AXIS, _RULE = LIGHT['note'], LIGHT['axis'], LIGHT['rule']
_PROPERTY = {colour: f'var(--{name})' for name, colour in LIGHT.items()} | {
    '#000000': 'var(--text)'  # Matplotlib's own
}
# An <img> follows the page's colour scheme by its own media query. The background is painted, so
# that a browser that does not apply the query still shows dark lines on white.
_CSS = (
    f'svg {{ {properties(LIGHT)}; fill: var(--text) }} '
    f'@media (prefers-color-scheme: dark) {{ svg {{ {properties(DARK)} }} }}'
)
_NAMED = 20  # classes whose names and numbers a confusion matrix has room for
# Squares along a side of a larger matrix. With more, some would fall between the pixels.
_SQUARES = 150
# Text stays text: it is small, can be searched, and has the reader's own font.
_STYLE: dict[Any, Any] = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'xmixup',
    'font.family': 'sans-serif',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'figure.facecolor': LIGHT['paper'],
    'axes.facecolor': LIGHT['paper'],
    'text.color': TEXT,
    'axes.labelcolor': TEXT,
    'xtick.labelcolor': TEXT,
    'ytick.labelcolor': TEXT,
    'axes.edgecolor': _AXIS,
    'xtick.color': _AXIS,
    'ytick.color': _AXIS,
    'grid.color': _AXIS,
    'legend.edgecolor': _RULE,
}

Points = Sequence[tuple[float, float]]


def svg(draw: Callable[[Figure], None], width: float = 4.6, height: float = 3.0) -> str:
    """A figure as an SVG document.

    Args:
      draw: draws into a new figure.
      width, height: of the figure, inches.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout='constrained')
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format='svg', metadata={'Date': None})
    document = file.getvalue().replace('</style>', f' {_CSS}</style>', 1)
    return re.sub(
        r'(fill|stroke): (#[0-9a-f]{6})\b',
        lambda found: f'{found[1]}: {_PROPERTY.get(found[2], found[2])}',
        document,
    )


def curves(lines: Mapping[str, Points], ylabel: str, log: bool = False) -> str:
    """Lines over the training's steps.

    Args:
      lines: points (step, value) by name; lines without points are left out.
      ylabel: of the values.
      log: whether their axis is logarithmic.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, points), colour in zip(lines.items(), (TARGET, SOURCE, TEXT), strict=False):
            if points:
                marker = 'o' if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, ms=3)
        axes.set(xlabel='step', ylabel=ylabel)
        if log:
            axes.set_yscale('log')
        axes.grid(alpha=0.3)
        if sum(map(bool, lines.values())) > 1:
            axes.legend(frameon=False)

    return svg(draw, 3.4, 2.4)


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """Rows are the true classes, shares of their images; with numbers if there are few classes.

    Args:
      matrix: int [K, K], counts, [true, predicted].
      class_names: K names.
    """
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    if len(class_names) > _NAMED:
        return svg(lambda figure: _draw_shares(figure, shares), 5.0, 4.4)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        short = [_literal(name[:18]) for name in class_names]
        places = range(len(short))
        axes.set_xticks(places, short, rotation=90, fontsize=8)
        axes.set_yticks(places, short, fontsize=8)
        edges = (-0.5, len(short) - 0.5)
        axes.set(xlabel='predicted class', ylabel='true class', aspect='equal')
        axes.set(xlim=edges, ylim=edges[::-1])
        axes.tick_params(length=0)
        # Shapes, not a picture: text stays readable on them in both colour schemes.
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                cell = Rectangle((j - 0.5, i - 0.5), 1, 1, color=LIGHT['cell'], lw=0)
                cell.set_alpha(shares[i, j])
                axes.add_patch(cell)
                axes.text(j, i, count, ha='center', va='center', fontsize=7)

    side = 2.0 + 0.24 * len(class_names)
    return svg(draw, side, side)


def _draw_shares(figure: Figure, shares: np.ndarray) -> None:
    axes, count = figure.subplots(), len(shares)
    colours = LinearSegmentedColormap.from_list(
        'share', [(*to_rgb(MATRIX), 0.0), (*to_rgb(MATRIX), 1.0)]
    )
    side = -(-count // _SQUARES)
    squares = block_maximum(shares, side)
    edge = side * len(squares) - 0.5
    image = axes.imshow(
        squares,
        cmap=colours,
        vmin=0,
        vmax=1,
        interpolation='nearest',
        extent=(-0.5, edge, edge, -0.5),
    )
    axes.set(xlabel='predicted class', ylabel='true class')
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    label = "share of the class's images"
    if side > 1:
        label += f'\n(a square: the largest of {side} × {side} classes)'
    figure.colorbar(image, label=label, shrink=0.7)


def block_maximum(values: np.ndarray, side: int) -> np.ndarray:
    """The largest value of each square block; blocks at the end may be smaller.

    Args:
      values: [K, K], not negative.
      side: of a block.

    Returns:
      [ceil(K / side), ceil(K / side)].
    """
    count = -(-len(values) // side)
    padded = np.zeros((count * side,) * 2)
    padded[: len(values), : len(values)] = values
    return padded.reshape(count, side, count, side).max(axis=(1, 3))


def reliability(bins: Reliability) -> str:
    """Accuracy over confidence, and how many images are in each bin."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        width = np.diff(bins.edges)
        filled = bins.count > 0
        left = bins.edges[:-1][filled]
        upper.bar(
            left,
            bins.accuracy[filled],
            width[filled],
            align='edge',
            color=TARGET,
            ec=LIGHT['paper'],
        )
        upper.plot([0, 1], [0, 1], '--', color=_NOTE, label='perfectly calibrated')
        upper.set(ylabel='accuracy', ylim=(0, 1), xlim=(0, 1))
        upper.legend(frameon=False)
        lower.bar(
            left, bins.count[filled], width[filled], align='edge', color=_AXIS, ec=LIGHT['paper']
        )
        lower.set(xlabel='confidence', ylabel='images')

    return svg(draw, 4.6, 3.8)


def trade_off(points: dict[str, tuple[float, float, float]], baseline: str) -> str:
    """Accuracy against training time.

    Args:
      points: (training time as a multiple of the baseline's, mean top-1 in %, standard deviation)
        of each method.
      baseline: its name.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        marks = itertools.product('o^sDv', color_sequences['Dark2'])
        for name, (time, top1, spread) in sorted(points.items(), key=lambda item: -item[1][1]):
            marker, colour = next(marks)
            colour = {'xmixup': SOURCE, baseline: TEXT}.get(name, colour)
            size = 9 if name in ('xmixup', baseline) else 6
            axes.errorbar(time, top1, yerr=spread, color=colour, lw=1, alpha=0.35)
            axes.plot(time, top1, marker, ms=size, color=colour, label=f'{top1:.2f}  {name}')
        if baseline in points:
            axes.axhline(points[baseline][1], color=_AXIS, lw=1, alpha=0.6, zorder=0)
            axes.axvline(1.0, color=_AXIS, lw=1, alpha=0.6, zorder=0)
        axes.set(
            xlabel=f'training time, multiple of {baseline}',
            ylabel='top-1, % (mean ± standard deviation)',
        )
        axes.margins(x=0.1)
        figure.legend(loc='outside right upper', frameon=False, fontsize=9)
        axes.grid(alpha=0.3)

    return svg(draw, 8.0, 4.6)


def _literal(text: str) -> str:
    """Text in which Matplotlib finds no mathematics."""
    return text.replace('$', r'\$')
