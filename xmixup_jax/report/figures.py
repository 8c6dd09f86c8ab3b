"""The figures of a report, as SVG."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import color_sequences, rc_context
from matplotlib.figure import Figure

from xmixup_jax.report.scores import Reliability

TARGET, SOURCE = '#1f5fa8', '#c4541c'
_NAMED = 20  # classes whose names and numbers a confusion matrix has room for
# Text stays text: it is small, can be searched, and has the reader's own font.
_STYLE: dict[Any, Any] = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'xmixup',
    'font.family': 'sans-serif',
    'axes.spines.top': False,
    'axes.spines.right': False,
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
    return file.getvalue()


def curves(lines: Mapping[str, Points], ylabel: str, log: bool = False) -> str:
    """Lines over the training's steps.

    Args:
      lines: points (step, value) by name; lines without points are left out.
      ylabel: of the values.
      log: whether their axis is logarithmic.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, points), colour in zip(lines.items(), (TARGET, SOURCE), strict=False):
            if points:
                marker = 'o' if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, ms=3)
        axes.set(xlabel='step', ylabel=ylabel)
        if log:
            axes.set_yscale('log')
        axes.grid(alpha=0.3)
        if sum(map(bool, lines.values())) > 1:
            axes.legend(frameon=False)

    return svg(draw)


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """Rows are the true classes, shares of their images; with numbers if there are few classes.

    Args:
      matrix: int [K, K], counts, [true, predicted].
      class_names: K names.
    """
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    named = len(class_names) <= _NAMED

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
        axes.set(xlabel='predicted class', ylabel='true class')
        axes.spines[:].set_visible(False)
        if named:
            short = [_literal(name[:18]) for name in class_names]
            axes.set_xticks(range(len(short)), short, rotation=90, fontsize=8)
            axes.set_yticks(range(len(short)), short, fontsize=8)
            for (i, j), count in np.ndenumerate(matrix):
                if count:
                    colour = 'white' if shares[i, j] > 0.6 else 'black'
                    axes.text(j, i, count, ha='center', va='center', fontsize=7, color=colour)
        figure.colorbar(image, label="share of the class's images", shrink=0.7)

    side = 3.2 + 0.2 * len(class_names) if named else 6.5
    return svg(draw, side + 0.8, side)


def reliability(bins: Reliability) -> str:
    """Accuracy over confidence, and how many images are in each bin."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        width = np.diff(bins.edges)
        filled = bins.count > 0
        left = bins.edges[:-1][filled]
        upper.bar(left, bins.accuracy[filled], width[filled], align='edge', color=TARGET, ec='w')
        upper.plot([0, 1], [0, 1], '--', color='0.4', label='perfectly calibrated')
        upper.set(ylabel='accuracy', ylim=(0, 1), xlim=(0, 1))
        upper.legend(frameon=False)
        lower.bar(left, bins.count[filled], width[filled], align='edge', color='0.6', ec='w')
        lower.set(xlabel='confidence', ylabel='images')

    return svg(draw, 4.6, 4.2)


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
            colour = {'xmixup': SOURCE, baseline: 'black'}.get(name, colour)
            size = 9 if name in ('xmixup', baseline) else 6
            axes.errorbar(time, top1, yerr=spread, color=colour, lw=1, alpha=0.35)
            axes.plot(time, top1, marker, ms=size, color=colour, label=f'{top1:.2f}  {name}')
        if baseline in points:
            axes.axhline(points[baseline][1], color='0.7', lw=1, zorder=0)
            axes.axvline(1.0, color='0.7', lw=1, zorder=0)
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
