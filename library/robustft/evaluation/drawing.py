"""What all figures share: colours, style, how text is placed, and how figures leave as files.

Colours mean the same everywhere: clean is blue, robust is orange, what was chosen is green; no
meaning hangs on colour alone. Figures are about as wide as a phone held upright shows them whole,
so that their text stays readable there.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Path2D
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from robustft.errors import ResourceError

__all__ = [
    "CHOSEN",
    "CLEAN",
    "HALO",
    "INK",
    "MUTED",
    "PAPER",
    "REST",
    "ROBUST",
    "SMALL",
    "STYLE",
    "THEME",
    "Label",
    "blank_figure",
    "end_labels",
    "eps_text",
    "inline_svg",
    "place_labels",
    "save_figures",
    "shade_below",
    "signed",
    "span_points",
    "text_columns",
    "tip",
]

INK, MUTED, GRID, PAPER = "#1f2430", "#667080", "#dfe3e8", "#fefefe"
CLEAN, ROBUST, CHOSEN, REST = "#0b6bb0", "#c24a00", "#00855f", "#9aa5b1"
# Clean and robust differ in hue also for red-green blindness, and have at least 4.5:1 contrast to
# the paper, so that a label may have the colour of its line.

THEME: dict[str, tuple[str, str]] = {
    INK: ("ink", "#e8ebf0"),
    MUTED: ("muted", "#a3adba"),
    GRID: ("grid", "#343b46"),
    PAPER: ("paper", "#171a20"),
    CLEAN: ("clean", "#6cb8f0"),
    ROBUST: ("robust", "#ff9a5c"),
    CHOSEN: ("chosen", "#3ccb9b"),
    REST: ("rest", "#66707d"),
}
"""Colour on paper -> (CSS variable in inline SVG, colour on dark ground)."""

WIDTH = 4.6
"""Inches; 331 points: a phone shows them about one to one, a desktop larger."""
SMALL = 7.5
"""Points: the smallest text."""
PNG_DPI = 220
"""About twice a common screen's density."""
MOST_LABELS = 6
"""More labels than this hide the points they name."""
CROWDED = 12
"""Among more points than this only the important ones are labelled."""
MIN_SPAN = 1.0
"""Percentage points: narrower axes would make noise look like an effect."""
HEADROOM = 0.2
"""Share of an axis kept free above the data, where notes stand."""
NEAR = 12.0
"""Points: a label farther from its point than this needs a line to it."""
MARKER = 4.5
"""Points: half the width of a marker with its edge, which labels leave free."""
PADDING = 1.5
"""Points: how far a label's halo goes beyond its text."""
LEADER: dict[str, Any] = {"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 5}
HALO: dict[str, Any] = {
    "boxstyle": "round,pad=0.15",
    "facecolor": PAPER,
    "edgecolor": "none",
    "alpha": 0.85,
}

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    # Layer and corruption names are text, whatever signs they hold.
    "text.parse_math": False,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelsize": 8.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.6,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    # Pictures stay apart and keep their own pixels.
    "image.composite_image": False,
}
"""For ``matplotlib.rc_context``: neither the user's matplotlibrc nor a script's state shows."""

Label = tuple[float, float, str, bool]
"""x, y, text, and whether it is important: bold and placed before the others."""

_TIP = "tip: "


def save_figures(figures: Mapping[str, Figure], directory: str | Path) -> dict[str, str]:
    """Write ``<name>.png`` for every figure and return the figures as ``inline_svg`` does.

    Raises:
        ResourceError: a file cannot be written.
    """
    folder = Path(directory)
    inline = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(STYLE):
                figure.savefig(path, dpi=PNG_DPI, metadata={"Software": None})
        except OSError as error:
            raise ResourceError(
                f"cannot write {path} ({error.strerror}): make room or choose another folder"
            ) from error
        inline[name] = inline_svg(name, figure)
    return inline


def inline_svg(name: str, figure: Figure) -> str:
    """Return a figure as SVG to put into HTML.

    It follows the page: its colours are the CSS variables of THEME, its size is the page's choice,
    points carry ``<title>`` elements that browsers show on hover, and its ids are prefixed with
    the name, so that several may stand in one page.
    """
    buffer = StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Comments repeat every text; the style element would apply to the whole page.
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(rf' id="{_TIP}([^"]*)">', r"><title>\1</title>", svg)
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", name)
    svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}-", svg)
    for color, (variable, _) in THEME.items():
        svg = svg.replace(color, f"var(--{variable})")
    width, height = figure.get_size_inches() * 72
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true" '
        'style="stroke-linejoin: round; stroke-linecap: butt" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg"'
    )
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"^<svg[^>]*", head, svg)).strip()


def tip(text: str) -> str:
    """Return the group id (``artist.set_gid``) that becomes a tooltip in the inline SVG."""
    return _TIP + text


def blank_figure(*, height: float) -> Figure:
    """Return an empty figure of the common width; ``height`` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def text_columns(figure: Figure, headers: Sequence[str], *, width: float) -> tuple[Axes, Axes]:
    """Return axes for a chart and, right of it on the same y axis, bare ones for columns of text.

    Column ``i`` is right-aligned at x = i + 1 of the second axes.

    Args:
        figure: an empty figure.
        headers: of the columns.
        width: of all columns together, relative to the chart's.
    """
    chart, text = figure.subplots(1, 2, sharey=True, width_ratios=(1, width))
    text.set_axis_off()
    text.set_xlim(0, len(headers))
    for column, header in enumerate(headers, start=1):
        text.annotate(
            header,
            (column / len(headers), 1),
            (0, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            size=SMALL,
            color=MUTED,
        )
    return chart, text


def span_points(axes: Axes, values: Iterable[float], *, lowest: float = -math.inf) -> None:
    """Fit the y axis to percentages, never narrower than MIN_SPAN, with room for notes above.

    Args:
        axes: whose y limits are set.
        values: percentages to show.
        lowest: values below it may leave the axis.
    """
    shown = [max(value, lowest) for value in values]
    low, high = min(shown), max(shown)
    missing = max(0.0, MIN_SPAN - (high - low)) / 2
    low, high = low - missing, high + missing
    axes.set_ylim(low - 0.08 * (high - low), high + HEADROOM / (1 - HEADROOM) * (high - low))


def shade_below(axes: Axes, level: float, text: str) -> None:
    """Shade what lies below ``level`` (the tolerance) and name the line."""
    bottom, top = axes.get_ylim()
    bottom = min(bottom, level - 0.12 * (top - bottom))
    axes.set_ylim(bottom, top)
    axes.axhspan(bottom, level, color=ROBUST, alpha=0.09, linewidth=0, zorder=0)
    axes.axhline(level, color=ROBUST, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        text,
        (0.01, level),
        (0, -3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="top",
        size=SMALL,
        color=ROBUST,
        bbox=HALO,
    )


def end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], *, at: float) -> None:
    """Write names right of the curves' last points, apart from each other.

    Args:
        axes: limits are set already; the x axis is extended to hold the names.
        ends: (y of the last point, name, colour).
        at: x of the last points.
    """
    low, high = axes.get_ylim()
    gap = 0.1 * (high - low)
    left = axes.get_xlim()[0]
    place = axes.get_subplotspec()
    columns = 1 if place is None else place.get_gridspec().ncols
    axes.set_xlim(left, at + (at - left or 1.0) * 0.2 * columns)
    previous = -math.inf
    for value, name, color in sorted(ends):
        previous = max(value, previous + gap)
        axes.annotate(
            name,
            (at, previous),
            (5, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
            color=color,
            annotation_clip=False,
        )


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], *, every: bool = False
) -> None:
    """Label points where there is room: important ones first, each text once, few in all.

    Args:
        figure: drawn already, but for its labels; its limits stay.
        axes: with the points.
        labels: points and what they are called; those without a text are only kept free.
        every: label all points, the unimportant ones too, however many they are. What finds no
            room beside its point stands farther away, with a line to it.
    """
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = figure.dpi / 72
    spots = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    taken += [Bbox([spot - MARKER * points, spot + MARKER * points]) for spot in spots]
    most = MOST_LABELS if len(labels) <= CROWDED else 0
    used: set[str] = set()
    lines: list[Path2D] = []
    order = sorted(zip(labels, spots, strict=True), key=lambda pair: not pair[0][3])
    for (x, y, text, bold), spot in order:
        known = text in used if every else any(text in other for other in used)
        if not text or known or (not (bold or every) and len(used) >= most):
            continue
        style: dict[str, Any] = {"va": "center", "size": SMALL, "color": MUTED, "zorder": 6}
        if bold:
            style |= {"size": 8, "color": INK, "weight": "bold"}
        measured = axes.annotate(text, (x, y), **style)
        size = np.asarray(measured.get_window_extent(renderer).size)
        measured.remove()
        offsets = _offsets(far=bold or every)
        places = [_Place.at(spot, size, offset, points) for offset in offsets]
        free = [place for place in places if place.is_free(axes.bbox, taken, lines)]
        # Where every leader runs over something, one that does is better than no name.
        place = next((one for one in free if not one.crosses(taken, lines)), None)
        place = place or (free[0] if free else None)
        if place is None:
            continue
        label = axes.annotate(
            text,
            (x, y),
            place.offset,
            textcoords="offset points",
            ha=_alignment(place.offset[0]),
            bbox=HALO,
            arrowprops=None if place.leader is None else LEADER,
            **style,
        )
        label.set_in_layout(False)
        taken.append(place.box)
        used.add(text)
        lines += [] if place.leader is None else [place.leader]


class _Place(NamedTuple):
    """Where a label may stand.

    Args:
        offset: of the text from its point, in points.
        box: text and halo, in pixels.
        leader: line from the point to the text, in pixels; None where the text is beside it.
        spot: the point, in pixels.
    """

    offset: tuple[float, float]
    box: Bbox
    leader: Path2D | None
    spot: NDArray[np.float64]

    @classmethod
    def at(
        cls,
        spot: NDArray[np.float64],
        size: NDArray[np.float64],
        offset: tuple[float, float],
        points: float,
    ) -> "_Place":
        """Return the place of a text of ``size`` pixels; ``points``: pixels of a point."""
        end = spot + points * np.array(offset)
        share = {"left": 0.0, "center": 0.5, "right": 1.0}[_alignment(offset[0])]
        box = Bbox.from_bounds(*(end - size * (share, 0.5)), *size).padded(PADDING * points)
        far = math.hypot(*offset) > NEAR
        return cls(offset, box, Path2D([spot, end]) if far else None, spot)

    def is_free(self, frame: Bbox, taken: Iterable[Bbox], lines: Iterable[Path2D]) -> bool:
        """Say whether the label is inside, on nothing else, and across no leader."""
        box = self.box
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
        return (
            inside
            and frame.y0 <= box.y0
            and box.y1 <= frame.y1
            and not any(box.overlaps(other) for other in taken)
            and not any(line.intersects_bbox(box) for line in lines)
        )

    def crosses(self, taken: Iterable[Bbox], lines: Iterable[Path2D]) -> bool:
        """Say whether the leader runs over a label, another point or another leader."""
        if self.leader is None:
            return False
        others = (box for box in taken if not box.contains(*self.spot))
        return any(self.leader.intersects_bbox(box) for box in others) or any(
            self.leader.intersects_path(line) for line in lines
        )


def _alignment(across: float) -> str:
    """Return how a text is aligned that stands ``across`` points right of its point."""
    return "left" if across > 0 else "right" if across < 0 else "center"


def signed(value: float) -> str:
    """Return percentage points with their sign and two decimals; the minus is a true one."""
    return f"{value:+.2f}".replace("-", "\u2212")


def eps_text(norm: str, eps: float) -> str:
    """Return a radius as it is usually written: "8/255" or "0.5/255" for Linf, else "0.5"."""
    grey_levels = 255 * eps
    # Radii may have passed through float32; others than quarters of a level read better plain.
    if norm == "Linf" and grey_levels > 0.2 and abs((4 * grey_levels + 0.5) % 1 - 0.5) < 1e-3:
        return f"{round(4 * grey_levels) / 4:g}/255"
    return f"{eps:.4g}"


def _offsets(*, far: bool) -> Iterator[tuple[float, float]]:
    """Yield offsets in points, nearest first; only labels with a leader may go far."""
    beside, apart = (0, 180, 45, 135, -45, -135, 90, -90), (45, 135, 90, -45, -135, -90, 0, 180)
    for radius in (9, *range(14, 150, 8)) if far else (9,):
        for angle in beside if radius < NEAR else apart:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            yield (round(radius * across, 3), round(radius * up, 3))
