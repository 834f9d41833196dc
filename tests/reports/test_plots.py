"""Figures show the numbers that they were given, in colours that can be told apart from their ground."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from importlib.resources import files
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.text import Text

from fedkd.reports.page import svg as report_svg
from fedkd.reports.plots.curves import Curve, accuracy_by_round, curves, tick_of_bytes
from fedkd.reports.plots.maps import MOST_COLUMNS, grid, shards, soft_labels
from fedkd.reports.plots.points import Clients, Reliability, clients, reliability, seconds
from fedkd.reports.plots.style import WIDTH

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(figure: Figure, axes: int = 0) -> dict[str, Any]:
    return {str(line.get_label()): line for line in figure.axes[axes].get_lines()}


def cells_of(figure: Figure, axes: int = 0) -> dict[tuple[int, int], float]:
    """Return the opacity of each cell by (row, column), from the outlines that were drawn."""
    found = {}
    for patch in figure.axes[axes].patches:
        if isinstance(patch, PathPatch):
            corners = np.asarray(patch.get_path().vertices).reshape(-1, 5, 2)
            for x, y in corners.mean(1) + 0.1:  # the first corner stands there twice
                found[round(float(y)), round(float(x))] = float(patch.get_alpha() or 0)
    return found


def rectangles(figure: Figure, axes: int = 0) -> list[Rectangle]:
    return [patch for patch in figure.axes[axes].patches if isinstance(patch, Rectangle)]


# --- Curves ---------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_and_its_band_one_standard_deviation() -> None:
    values = np.array([[10.0, 35.0, 41.5], [14.0, 31.0, 47.5], [9.0, 39.0, 55.0]])
    figure = curves(
        [Curve("DSFL", [1, 2, 3], values.tolist(), 1)],
        {"teacher 90.0": 90.0},
        xlabel="round",
        ylabel="test accuracy in %",
    )
    line = lines_of(figure)["DSFL"]
    assert np.asarray(line.get_ydata()) == pytest.approx(values.mean(0))
    (band,) = figure.axes[0].collections
    outline = np.asarray(band.get_paths()[0].vertices)
    reached = {tuple(point) for point in np.round(outline, 6).tolist()}
    for x, mean, std in zip((1, 2, 3), values.mean(0), values.std(0, ddof=1), strict=True):
        assert (x, round(mean - std, 6)) in reached
        assert (x, round(mean + std, 6)) in reached
    assert lines_of(figure)["teacher 90.0"].get_ydata() == [90.0, 90.0]


def test_a_seed_without_a_value_is_left_out_of_the_mean() -> None:
    figure = curves([Curve("CFD", [1, 2], [[10.0, nan], [20.0, 50.0]])], {}, xlabel="x", ylabel="y")
    assert lines_of(figure)["CFD"].get_ydata() == pytest.approx([15.0, 50.0])


def test_methods_differ_in_colour_and_in_marker() -> None:
    names = ["a", "b", "c", "d", "e", "f", "g"]
    drawn = [Curve(name, [1, 2], [[1.0, 2.0]], slot) for slot, name in enumerate(names)]
    found = lines_of(curves(drawn, {}, xlabel="x", ylabel="y"))
    looks = {(found[n].get_color(), found[n].get_marker(), found[n].get_linestyle()) for n in names}
    assert len(looks) == len(names)
    assert len({found[n].get_marker() for n in names}) == len(names)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.5 kB"), (384_000, "384 kB"),
     (2_000_000, "2 MB"), (7.25e9, "7.2 GB"), (5e12, "5000 GB")],
)  # fmt: skip
def test_bytes_have_a_unit(count: float, text: str) -> None:
    assert tick_of_bytes(count) == text


@pytest.mark.parametrize("span", [1.5, 7.0, 90.0, 20_000.0])
def test_a_byte_axis_has_ticks_however_narrow(span: float) -> None:
    curve = Curve("DSFL", [640_000, 640_000 * span], [[30.0, 70.0]])
    figure = curves([curve], {}, xlabel="bytes", ylabel="y", scale="bytes")
    low, high = figure.axes[0].get_xlim()
    ticks = [t for t in figure.axes[0].get_xticks() if low <= t <= high]
    assert 1 <= len(ticks) <= 8
    assert figure.axes[0].get_xscale() == "log"


def test_accuracy_by_round_writes_an_svg_that_says_its_labels(tmp_path: Path) -> None:
    path = accuracy_by_round({"A & B": [(1, 0.5), (2, 0.75)]}, {"teacher": 0.9}, tmp_path / "a.svg")
    texts = [text.text for text in ET.parse(path).iter(f"{SVG}text")]
    assert {"A & B", "teacher 90.0", "round"} <= set(texts)
    again = accuracy_by_round(
        {"A & B": [(1, 0.5), (2, 0.75)]}, {"teacher": 0.9}, tmp_path / "b.svg"
    )
    assert path.read_bytes() == again.read_bytes()


# --- Shards and other maps ------------------------------------------------------------------------


def test_the_area_of_a_bubble_is_the_count() -> None:
    counts = [[3, 0, 12], [48, 1, 0]]
    (bubbles,) = shards(counts, ["a", "b", "c"]).axes[0].collections
    assert isinstance(bubbles, PathCollection)
    areas = dict(
        zip(map(tuple, np.asarray(bubbles.get_offsets())), bubbles.get_sizes(), strict=True)
    )
    assert set(areas) == {(0, 0), (0, 2), (1, 0), (1, 1)}
    for (client, kind), area in areas.items():
        assert area / areas[1, 0] == pytest.approx(counts[int(client)][int(kind)] / 48)


def test_many_clients_are_a_map_sorted_by_their_most_frequent_class() -> None:
    rng = np.random.default_rng(7)
    counts = rng.integers(0, 40, size=(61, 7)) * (rng.random((61, 7)) < 0.4)
    counts[:, 3] += 1
    figure = shards(counts.tolist(), [str(c) for c in range(7)])
    shares = counts / counts.sum(1, keepdims=True)
    order = sorted(range(61), key=lambda k: (counts[k].argmax(), -shares[k].max()))
    drawn = cells_of(figure)
    for column, client in enumerate(order):
        for kind in range(7):
            assert drawn.get((kind, column), 0.0) == pytest.approx(shares[client, kind], abs=0.021)
    bars = [patch.get_height() for patch in rectangles(figure, 1)]
    assert sum(bars) == 61


def test_a_thousand_clients_share_columns() -> None:
    counts = [[5, 0] if k % 2 else [0, 5] for k in range(1001)]
    figure = shards(counts, ["a", "b"])
    assert max(x for _, x in cells_of(figure)) < MOST_COLUMNS
    assert "6 per column" in figure.axes[0].get_xlabel()


def test_soft_labels_say_each_percentage_and_leave_absent_classes_empty() -> None:
    figure = soft_labels([[0.75, 0.25, 0.0], None, [0.1, 0.2, 0.7]], ["a", "b", "c"])
    texts = {
        (round(t.get_position()[1]), round(t.get_position()[0])): t.get_text()
        for t in figure.axes[0].texts
    }
    assert texts == {(0, 0): "75", (0, 1): "25", (2, 0): "10", (2, 1): "20", (2, 2): "70"}
    assert {y for y, _ in cells_of(figure)} == {0, 2}


def test_a_grid_stars_the_best_point_and_frames_the_flat_region() -> None:
    values = [[70.0, 71.0, 74.0], [72.0, 75.5, nan]]
    flat = [(1, 1), (0, 2), (0, 1)]
    figure = grid(
        values, rows=("α", ["0.3", "0.9"]), columns=("τ", ["1", "2", "5"]), best=(1, 1), flat=flat
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["70.0", "71.0", "74.0", "72.0", "★ 75.5"]
    # Three cells in an L have eight outer edges.
    assert len(figure.axes[0].get_lines()) == 8
    shades = cells_of(figure)
    assert max(shades, key=lambda at: shades[at]) == (1, 1)


# --- Clients, calibration, time -------------------------------------------------------------------


def test_clients_are_sorted_by_their_accuracy_before_and_keep_their_own_after() -> None:
    before, after = [30.0, 10.0, 20.0], [31.0, 90.0, 55.0]
    figure = clients([Clients("DSFL", before, after)], before="trained alone")
    first, last = figure.axes[0].get_lines()
    assert np.asarray(first.get_ydata()).tolist() == [10.0, 20.0, 30.0]
    assert np.asarray(last.get_ydata()).tolist() == [90.0, 55.0, 31.0]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "2", "0"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_there_is_a_panel_for_each_method(count: int) -> None:
    panels = [Clients(f"m{n}", [1.0, 2.0], [3.0, 4.0], n) for n in range(count)]
    figure = clients(panels, before="x")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [p.label for p in panels]


def test_reliability_leaves_out_empty_bins_and_sizes_markers_by_the_answers() -> None:
    line = Reliability(
        "student 4.0", [5.0, nan, 80.0], [10.0, nan, 60.0], [0.25, 0.0, 0.75], "student"
    )
    figure = reliability({"DSFL": [line]})
    (marks,) = figure.axes[0].collections
    assert np.asarray(marks.get_offsets()).tolist() == [[5.0, 10.0], [80.0, 60.0]]
    assert isinstance(marks, PathCollection)
    small, large = marks.get_sizes()
    assert small < large


def test_bars_of_time_add_up() -> None:
    bars = {"DSFL": {"digest": 1.5, "revisit": 0.5}, "FedAvg": {"revisit": 0.25}}
    figure = seconds(bars)
    ends: dict[float, float] = {}
    for patch in rectangles(figure):
        place = round(patch.get_y() + patch.get_height() / 2)
        ends[place] = max(ends.get(place, 0), patch.get_x() + patch.get_width())
    assert ends == {0: 2.0, 1: 0.25}
    assert [text.get_text() for text in figure.axes[0].texts] == ["2.0", "0.2"]


# --- As text --------------------------------------------------------------------------------------


def drawn() -> Figure:
    curve = Curve("a$b$ <i>&", [0.0005, 0.01], [[1.0, 2.0], [2.0, 4.0]])
    return curves([curve], {}, xlabel="learning-rate", ylabel="y", scale="numbers")


def test_a_figure_in_a_page_is_the_same_every_time_and_well_formed() -> None:
    text = report_svg.inline(drawn(), "s-loss", "Title <x>", r"what \1 & is seen")
    assert text == report_svg.inline(drawn(), "s-loss", "Title <x>", r"what \1 & is seen")
    root = ET.fromstring(text)
    names = [element.text for element in root if element.tag in ("title", "desc")]
    assert names == ["Title <x>", r"what \1 & is seen"]
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "s-loss-title s-loss-desc"


def test_labels_are_left_as_they_are() -> None:
    texts = [e.text for e in ET.fromstring(report_svg.inline(drawn(), "s", "t", "d")).iter("text")]
    assert {"a$b$ <i>&", "0.0005", "0.01"} <= set(texts)


def test_ids_belong_to_the_figure_and_references_find_them() -> None:
    text = report_svg.inline(drawn(), "s-loss", "t", "d")
    ids = re.findall(r' id="([^"]+)"', text)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert used
    assert used <= set(ids)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("s-loss-") for name in ids)


def test_only_variables_colour_a_figure_in_a_page() -> None:
    figures = [
        drawn(),
        shards([[3, 4], [5, 6]], ["a", "b"]),
        soft_labels([[0.9, 0.1], [0.3, 0.7]], ["a", "b"]),
        seconds({"a": {"digest": 1.0}}),
        clients([Clients("a", [1.0], [2.0])], before="x"),
    ]
    for figure in figures:
        assert not re.findall(r"#[0-9a-f]{6}\b", report_svg.inline(figure, "s", "t", "d"))


def test_files_are_an_svg_and_a_png_in_the_colours_of_print(tmp_path: Path) -> None:
    svg, png = report_svg.save(drawn(), tmp_path / "loss.v1")
    assert (svg.name, png.name) == ("loss.v1.svg", "loss.v1.png")
    assert "var(--" not in svg.read_text(encoding="utf-8")
    assert png.read_bytes().startswith(b"\x89PNG")


# --- Contrast (WCAG 2.2) --------------------------------------------------------------------------


def luminance(colour: tuple[float, ...]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(text: str) -> tuple[float, ...]:
    return tuple(int(text[n : n + 2], 16) / 255 for n in (1, 3, 5))


def themes() -> list[dict[str, tuple[float, ...]]]:
    page = (files("fedkd.reports.page") / "report.html.jinja").read_text(encoding="utf-8")
    dark = page[page.index("prefers-color-scheme: dark") :]
    found = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", dark))
    light = {name: colour for colour, name in report_svg.VARIABLES.items()}
    assert set(light) <= set(found)
    return [{name: rgb(theme[name]) for name in light} for theme in (light, found)]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_and_strokes_stand_out(theme: dict[str, tuple[float, ...]]) -> None:
    paper = theme["paper"]
    assert contrast(theme["ink"], paper) > 12
    assert contrast(theme["muted"], paper) > 4.5
    # Okabe and Ito's orange and sky blue are light on white: their markers tell them apart.
    for name in ("c0", "c1", "c2"):
        assert contrast(theme[name], paper) > 3


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_numbers_can_be_read_on_every_shade(theme: dict[str, tuple[float, ...]]) -> None:
    for percent in range(1, 101):
        figure = soft_labels([[percent / 100]], ["a"])
        (text,) = figure.axes[0].texts
        ink = theme[report_svg.VARIABLES[str(text.get_color())]]
        alpha = cells_of(figure).get((0, 0), 0.0)
        cell = tuple(
            alpha * h + (1 - alpha) * p for h, p in zip(theme["heat"], theme["paper"], strict=True)
        )
        assert contrast(ink, cell) > 3, percent


def test_the_width_fits_a_phone() -> None:
    figure = drawn()
    assert figure.get_size_inches()[0] == WIDTH
    texts: list[Any] = figure.findobj(Text)
    smallest = min(text.get_fontsize() for text in texts)
    assert smallest * 370 / (72 * WIDTH) > 9  # px
