"""The figures show what the rows say, at any size, and leave as files that a page can hold."""

import itertools
import math
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from robustft.errors import ResourceError
from robustft.evaluation import plots
from robustft.evaluation.drawing import CHOSEN, CLEAN, INK, MUTED, PAPER, ROBUST, THEME

Row = dict[str, Any]


def resnet_layers(blocks: tuple[int, ...]) -> list[str]:
    layers = ["conv1"]
    for stage, depth in enumerate(blocks, start=1):
        for block in range(depth):
            layers += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
            layers += [f"layer{stage}.{block}.shortcut.0"] if stage > 1 and block == 0 else []
    return [*layers, "linear"]


def criticality(layers: list[str], chosen: str) -> list[Row]:
    generator = random.Random(0)
    return [
        {
            "layer": layer,
            "index": index,
            "criticality": 0.09 if layer == chosen else 12.94 ** generator.uniform(-0.5, 1),
            "accuracy_drop": 2.86 if layer == chosen else generator.uniform(5, 53),
            "eligible": "shortcut" not in layer,
            "chosen": layer == chosen,
        }
        for index, layer in enumerate(layers)
    ]


def curve(trial: str = "a", gain: float = 0.02, loss: float = 0.011) -> list[Row]:
    rows = []
    for index in range(11):
        alpha = index / 10
        robust = 0.5363 + 0.004 * alpha - loss * alpha**3
        clean = 0.8146 + gain * alpha
        rows.append({"trial": trial, "alpha": alpha, "clean": clean, "robust": robust})
    return rows


def corruptions() -> list[Row]:
    names = ("gaussian_noise", "fog", "jpeg_compression")
    pairs = ((0.66, 0.69), (0.45, 0.44), (0.75, 0.77))
    return [
        {"corruption": name, "before": before, "after": after}
        for name, (before, after) in zip(names, pairs, strict=True)
    ]


def epochs() -> list[Row]:
    start = [
        {"stage": "start", "epoch": e, "train/loss": 2.1 / e, "train/robust": 0.05 * e, "lr": 0.1}
        for e in range(1, 7)
    ]
    start[-1] |= {"val/clean": 0.81, "val/robust": 0.53}
    tuned = [
        {"stage": "rift", "trial": trial, "epoch": e, "train/loss": 0.6 / e, "tuned/clean": 0.83}
        for trial in ("a", "b")
        for e in range(1, 5)
    ]
    return [*start, *tuned]


def trials(count: int = 3) -> list[Row]:
    return [
        {
            "trial": f"t{index}",
            "val/clean": 0.8146 + 0.003 * index,
            "val/robust": 0.5363 + 0.001 * (index % 3),
            "chosen": index == count - 1,
        }
        for index in range(count)
    ]


def all_figures() -> dict[str, Figure]:
    return {
        "criticality": plots.criticality_bars(
            criticality(resnet_layers((2, 2, 2, 2)), "layer2.1.conv2")
        ),
        "interpolation": plots.interpolation_curve(curve(), alpha=0.7, tolerance=0.001),
        "training": plots.training_curves(epochs(), trial="a"),
        "trials": plots.trial_plane(
            trials(), start=(0.8146, 0.5363), tolerance=0.001, curves=curve("t2")
        ),
        "corruptions": plots.corruption_bars(corruptions()),
    }


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return all_figures()


@pytest.mark.parametrize(
    "name", ["criticality", "interpolation", "training", "trials", "corruptions"]
)
def test_axes_are_labelled_with_units(figures: dict[str, Figure], name: str) -> None:
    labels = [axis.get_xlabel() + axis.get_ylabel() for axis in figures[name].axes]
    assert any("(%)" in label or "(nats" in label for label in labels)


def test_no_text_leaves_the_figure_or_overlaps_its_column(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        figure.draw_without_rendering()
        frame = figure.bbox
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        for text in figure.findobj(Text):
            shown = text.get_text() and text.get_visible() and text.axes not in (None,)
            if shown and text.axes.axison and text not in text.axes.get_xticklabels():
                text_box = Text.get_window_extent(text, renderer)
                assert text_box.x0 >= frame.x0 - 1, text.get_text()
                assert text_box.x1 <= frame.x1 + 1, text.get_text()


@pytest.mark.parametrize("blocks", [(2, 2, 2, 2), (3, 4, 6, 3)])
def test_criticality_shows_every_layer_legibly(blocks: tuple[int, ...]) -> None:
    layers = resnet_layers(blocks)
    assert len(layers) in (21, 37)
    figure = plots.criticality_bars(criticality(layers, "layer2.1.conv2"))
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == layers
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
    bold = [label.get_text() for label in labels if label.get_fontweight() == "bold"]
    assert bold == ["layer2.1.conv2"]


def bars(figure: Figure) -> list[Any]:
    return list(figure.axes[0].patches)


def test_criticality_scale_follows_the_spread() -> None:
    wide = plots.criticality_bars(criticality(resnet_layers((2, 2, 2, 2)), "layer2.1.conv2"))
    assert wide.axes[0].get_xscale() == "symlog"
    assert "logarithmic" in wide.axes[0].get_xlabel()
    rows = [
        {"layer": f"l{i}", "index": i, "criticality": 1.0 + i, "accuracy_drop": 5.0}
        for i in range(4)
    ]
    narrow = plots.criticality_bars(rows)
    assert narrow.axes[0].get_xscale() == "linear"
    assert [bar.get_width() for bar in bars(narrow)] == [1.0, 2.0, 3.0, 4.0]


def test_infinite_criticality_fills_the_axis_and_is_hatched() -> None:
    rows = criticality(resnet_layers((1, 1)), "layer1.0.conv1")
    rows[0]["criticality"] = math.inf
    figure = plots.criticality_bars(rows)
    bar = bars(figure)[0]
    assert bar.get_hatch()
    assert bar.get_width() == pytest.approx(figure.axes[0].get_xlim()[1])
    assert "not finite" in figure.axes[0].get_xlabel()
    assert "inf" in texts(figure)


def test_all_zero_criticalities_can_be_drawn() -> None:
    rows = [{"layer": "l", "index": 0, "criticality": 0.0, "accuracy_drop": 0.0}]
    assert "0.00" in texts(plots.criticality_bars(rows))


def test_interpolation_marks_alpha_and_the_tolerance_line() -> None:
    rows = curve()
    figure = plots.interpolation_curve(rows, alpha=0.7, tolerance=0.001)
    robust = figure.axes[1]
    levels = [line.get_ydata()[0] for line in robust.lines if len(set(line.get_ydata())) == 1]
    assert any(math.isclose(level, 53.63 - 0.1) for level in levels)
    low, _ = robust.get_ylim()
    assert low < 53.53, "the line must stand inside the axes"
    note = next(text for text in texts(figure) if text.startswith("alpha 0.7: 82.86"))
    assert "(+1.40)" in note


def test_a_collapsing_trial_does_not_flatten_the_chosen_curve() -> None:
    rows = [*curve("good"), *curve("bad", loss=0.5)]
    figure = plots.interpolation_curve(rows, alpha=0.5, tolerance=0.001, trial="good")
    low, high = figure.axes[1].get_ylim()
    assert high - low < 3
    bold = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert [round(y, 2) for y in bold[0].get_ydata()] == [
        round(100 * row["robust"], 2) for row in curve("good")
    ]


def test_a_collapsing_chosen_curve_says_how_far_it_falls() -> None:
    figure = plots.interpolation_curve(curve(loss=0.5), alpha=0.1, tolerance=0.001)
    assert "falls to 4.0 %" in texts(figure)


def test_training_draws_only_the_columns_that_exist() -> None:
    figure = plots.training_curves(epochs(), trial="a")
    assert len(figure.axes) == 4
    names = set(texts(figure))
    assert {"train/loss", "train/robust", "val/clean", "tuned/clean"} <= names
    assert "lr" not in names
    only_loss = plots.training_curves([{"epoch": 1, "train/loss": 2.0}])
    assert len(only_loss.axes) == 1


def test_plane_labels_the_chosen_and_counts_those_that_stayed() -> None:
    rows = trials(30)
    for row in rows[:4]:
        row |= {"val/clean": 0.8146, "val/robust": 0.5363}
    figure = plots.trial_plane(rows, start=(0.8146, 0.5363), tolerance=0.001)
    shown = texts(figure)
    assert "chosen: t29" in shown
    assert "start and 4 trials that stayed" in shown
    assert "t12" not in shown, "a crowd is not labelled"


def test_plane_skips_failed_trials() -> None:
    rows = [*trials(), {"trial": "failed", "val/clean": math.nan, "val/robust": None}]
    assert "failed" not in texts(plots.trial_plane(rows))


def test_corruptions_show_each_change_and_the_mean() -> None:
    shown = texts(plots.corruption_bars(corruptions()))
    assert {"+3.00", "\u22121.00", "+2.00", "+1.33", "gaussian noise", "mean"} <= set(shown)


@pytest.mark.parametrize(
    "draw",
    [
        plots.criticality_bars,
        plots.corruption_bars,
        plots.trial_plane,
        plots.training_curves,
        lambda rows: plots.interpolation_curve(rows, alpha=0, tolerance=0),
    ],
)
def test_nothing_to_draw_is_refused(draw: Any) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([])


def test_files_and_inline_svg(figures: dict[str, Figure], tmp_path: Path) -> None:
    inline = plots.save_figures(figures, tmp_path / "plots")
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == sorted(figures)
    for name, svg in inline.items():
        assert imread(tmp_path / "plots" / f"{name}.png").shape[1] > 900
        ids = [e.get("id") for e in ET.fromstring(svg).iter() if e.get("id") is not None]
        assert len(ids) == len(set(ids))
        assert all(identifier.startswith(name) for identifier in ids if identifier)
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "every colour follows the page"
        for target in re.findall(r'(?:"|\()#([^")]+)', svg):
            assert target in ids
    assert "<title>layer2.1.conv2: 0.09 nats" in inline["criticality"]


def test_svg_is_the_same_every_time(tmp_path: Path) -> None:
    drawings = [
        plots.save_figures({"c": plots.corruption_bars(corruptions())}, tmp_path) for _ in range(2)
    ]
    assert drawings[0] == drawings[1]


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    rows = [{"corruption": "<script>$x_$--></script>", "before": 0.5, "after": 0.6}]
    svg = plots.save_figures({"c": plots.corruption_bars(rows)}, tmp_path)["c"]
    assert "<script" not in svg
    titles = [e.text for e in ET.fromstring(svg).iter() if e.tag.endswith("title")]
    assert any(title and title.startswith("<script>$x_$--></script>: ") for title in titles)


def test_an_unwritable_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ResourceError, match="choose another folder"):
        plots.save_figures({"c": plots.corruption_bars(corruptions())}, blocked / "plots")


def test_global_style_is_neither_used_nor_changed() -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        figure = plots.corruption_bars(corruptions())
        assert matplotlib.rcParams["font.size"] == 30
    assert matplotlib.colors.to_hex(figure.axes[0].get_facecolor()) == PAPER
    assert dict(matplotlib.rcParams) == before


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [INK, MUTED, CLEAN, ROBUST, CHOSEN])
def test_text_colours_have_the_contrast_of_wcag_aa_on_light_and_dark(color: str) -> None:
    for front, back in ((color, PAPER), (THEME[color][1], THEME[PAPER][1])):
        bright, dark = sorted((luminance(front), luminance(back)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5
