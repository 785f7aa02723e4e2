"""Block 9: what the pictures show. Properties of what is drawn, not snapshots of pixels."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from conftest import SCRIPT
from matplotlib import pyplot
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

import mura_anomaly_detection as mura

SCALE = mura.HeatScale("abnormal", "logits", 8.0)
CYAN, GREEN = (0, 255, 255), (124, 252, 0)
AWKWARD = [
    "cost$5$.png",
    "$\\frac{.png",
    "a_{b}^c$x.png",
    "50%.png",
    "a\nb.png",
    "\udcff.png",
    "\x1b[2J.png",
]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved, without drawing them."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


# ----- explanation


def make_view(
    heat: Any,
    pixels: Any = 128,
    *,
    probability: float = 0.75,
    name: str = "image1.png",
    shape: tuple[int, int] = (200, 300),
    box: tuple[int, int, int, int] | None = None,
) -> mura.ViewResult:
    """Make a view; heat and pixels may be one number for all of it."""
    grey = np.broadcast_to(np.asarray(pixels, np.uint8), shape).copy()
    hot = np.broadcast_to(np.asarray(heat, np.float32), shape).copy()
    return mura.ViewResult(Path(name), grey, probability, hot, box)


def left_half(heat: float, shape: tuple[int, int] = (200, 300)) -> np.ndarray:
    """Heat in the left half of an image."""
    values = np.zeros(shape, np.float32)
    values[:, : shape[1] // 2] = heat
    return values


def panels(
    *views: mura.ViewResult, scale: Any = SCALE, lesion: Any = None
) -> list[list[np.ndarray]]:
    """Draw views; returns original, heatmap and overlay (H, W, 3) of each."""
    figure = Figure()
    mura.draw_explanation(figure, views, ["study1"], scale, lesion)
    pictures = [
        np.asarray(image.get_array())[..., :3].astype(int) for image in figure.axes[0].images
    ]
    assert len(pictures) == 3 * len(views)
    return [pictures[i : i + 3] for i in range(0, len(pictures), 3)]


def painted(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Pixels of exactly that colour, (H, W) bool."""
    return (picture == color).all(axis=2)


def test_without_heat_the_overlay_is_the_radiograph() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (200, 300))
    for cam_class in mura.CLASSES:
        ((original, _, overlay),) = panels(make_view(0, grey), scale=mura.HeatScale(cam_class, "logits", 8.0))
        assert np.ptp(original) > 150
        assert (overlay == original).all()


def test_no_veil_beside_the_heat() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (200, 300))
    ((original, _, overlay),) = panels(make_view(left_half(8.0), grey))
    middle = original.shape[1] // 2
    assert (overlay[:, middle + 8 :] == original[:, middle + 8 :]).all()
    assert (overlay[:, : middle - 8] != original[:, : middle - 8]).any(axis=2).mean() > 0.99


@pytest.mark.parametrize("cam_class", ["normal", "abnormal"])
def test_heat_shows_on_dark_and_on_white_bone(cam_class: str) -> None:
    """Its colours differ from the bone's grey, and are colours: no white, no grey."""
    cases = [(grey, level) for grey in (255, 230, 128, 0) for level in (0.5, 0.75, 1.0, 3.0)]
    views = [make_view(left_half(8 * level), grey) for grey, level in cases]
    drawn = panels(*views, scale=mura.HeatScale(cam_class, "logits", 8.0))
    for (grey, _), (_, _, overlay) in zip(cases, drawn, strict=True):
        hot = overlay[50, 10]
        assert np.abs(hot - grey).max() >= 50
        assert np.ptp(hot) >= 50


def test_faint_heat_stays_faint_and_opacity_grows_with_heat() -> None:
    """The eye must not be drawn to a twentieth of the scale."""
    for grey in (60, 230):
        drawn = panels(*[make_view(heat, grey) for heat in (0, 0.4, 2, 4)])
        changes = [np.abs(overlay[50, 50] - grey).max() for _, _, overlay in drawn]
        assert changes[0] == 0
        assert 0 < changes[1] <= 16
        assert changes[1] < changes[2] < changes[3]


def test_a_scale_reaches_as_far_as_the_strongest_heat_and_never_less_than_4() -> None:
    """An image without a finding is not painted in full colour: log odds of 4 are 0.98."""
    faint, strong = np.full((200, 300), 0.2, np.float32), left_half(9.0)
    assert mura.heat_scale("abnormal", "log odds", [faint, strong]).top == 9
    scale = mura.heat_scale("abnormal", "log odds", [faint])
    assert scale.top == 4
    ((original, _, overlay),) = panels(make_view(faint), scale=scale)
    assert 0 < np.abs(overlay - original).max() <= 16


def test_lightness_rises_with_heat() -> None:
    """A rainbow would make bands; a step up in heat is a step up in lightness, for both classes."""
    ramp = np.broadcast_to(np.linspace(0, 8, 300, dtype=np.float32), (200, 300))
    for cam_class in mura.CLASSES:
        ((_, colors, _),) = panels(make_view(ramp), scale=mura.HeatScale(cam_class, "logits", 8.0))
        lightness = colors[100] @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(lightness) >= -1.5).all()
        assert lightness[-1] - lightness[0] > 100


def test_one_scale_for_all_views() -> None:
    """Four logits have the same colour in every view, whatever else the view holds."""
    weak, strong = np.full((200, 300), 4.0), left_half(8.0) + 4
    (_, first, first_mix), (_, second, second_mix) = panels(make_view(weak), make_view(strong))
    assert (first[100, 5] == first[100, -5]).all()
    assert (first[100, -5] == second[100, -5]).all()
    assert (first_mix[100, -5] == second_mix[100, -5]).all()
    assert (second[100, 5] != second[100, -5]).any()


def test_heat_for_normal_cannot_be_read_as_heat_for_abnormal() -> None:
    for cam_class, strong, weak in (
        ("abnormal", 0, 2),
        ("normal", 2, 0),
    ):  # red above blue; blue above red
        for _, *colored in panels(make_view(4), make_view(8), scale=mura.HeatScale(cam_class, "logits", 8.0)):
            for picture in colored:
                assert picture[100, 100, strong] > picture[100, 100, weak] + 30


def test_the_figure_says_which_class_unit_and_scale() -> None:
    for cam_class in mura.CLASSES:
        figure = Figure()
        scale = mura.HeatScale(cam_class, "some unit", 5.0)
        mura.draw_explanation(figure, [make_view(1)], ["study1"], scale)
        titles = [text.get_text() for text in figure.axes[0].texts]
        assert titles == ["image1.png: abnormal 75.0%", f"heat: {cam_class}", "overlay"]
        bar = figure.axes[1]
        assert bar.get_ylabel() == f"heat for {cam_class}, some unit"
        assert bar.get_ylim() == (0, 5)
        assert figure.get_suptitle() == "study1"


def test_a_map_without_heat_says_so() -> None:
    figure = Figure()
    mura.draw_explanation(figure, [make_view(0), make_view(left_half(0.1))], ["study1"], SCALE)
    titles = [text.get_text() for text in figure.axes[0].texts]
    assert titles[1::3] == ["heat: abnormal, none", "heat: abnormal"]


def test_the_colour_bar_has_the_colours_of_the_heat() -> None:
    """Heat of half the scale looks as the middle of the bar, for either class."""
    for cam_class in mura.CLASSES:
        figure, scale = Figure(), mura.HeatScale(cam_class, "logits", 8.0)
        mura.draw_explanation(figure, [make_view(4)], ["study1"], scale)
        color = np.asarray(figure.axes[0].images[1].get_array())[50, 50, :3]
        (bar,) = (item for item in figure.axes[1].collections if isinstance(item, QuadMesh))
        assert bar.get_clim() == (0, 8)
        assert np.abs(255 * np.array(bar.to_rgba(4.0)[:3]) - color).max() < 2


def test_the_strongest_region_is_outlined_at_half_of_its_maximum() -> None:
    """A cone of 6 at its peak: the contour is the circle where it is 3; a second is left out."""
    y, x = np.mgrid[0:200, 0:300]
    cone = np.maximum(6 - np.hypot(y - 80, x - 90) / 10, 0)
    other = np.maximum(5.9 - np.hypot(y - 100, x - 240) / 10, 0)
    box = (60, 50, 121, 111)
    ((original, _, overlay),) = panels(make_view(cone + other, box=box))
    scale = original.shape[1] / 300
    rows, columns = np.nonzero(painted(overlay, CYAN))
    distance = np.hypot((rows + 0.5) / scale - 80.5, (columns + 0.5) / scale - 90.5)
    assert 28 < distance.min() <= distance.max() < 32
    angles = np.degrees(np.arctan2(rows / scale - 80.5, columns / scale - 90.5))
    assert (np.histogram(angles, 36, (-180, 180))[0] > 0).all(), "a closed line"
    assert not painted(original, CYAN).any()


def test_no_outline_without_a_box() -> None:
    """Of an image that is called normal the strongest of nothing would be outlined."""
    ((_, _, overlay),) = panels(make_view(left_half(8.0)))
    assert not painted(overlay, CYAN).any()


def test_a_known_lesion_is_boxed_on_original_and_overlay() -> None:
    (first,), (second,) = panels(make_view(0), lesion=(50, 40, 150, 100)), panels(make_view(0))
    for picture in (first[0], first[2]):
        rows, columns = np.nonzero(painted(picture, GREEN))
        scale = picture.shape[1] / 300
        edges = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / scale
        assert np.abs(edges - (50, 40, 150, 100)).max() < 2
        assert not painted(picture, GREEN)[int(70 * scale), int(100 * scale)], "not filled"
    assert not any(painted(picture, GREEN).any() for picture in (first[1], *second))


def test_original_keeps_its_grey_levels() -> None:
    """An image that uses few grey levels is not stretched: 100 to 140 stay mid grey."""
    ((original, *_),) = panels(make_view(0, np.linspace(100, 140, 300)))
    assert 100 <= original.min() <= 101
    assert 139 <= original.max() <= 140
    assert np.ptp(original, axis=2).max() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13, 16])
@pytest.mark.parametrize(
    "shape", [(200, 200), (100, 400), (400, 100)], ids=["square", "wide", "tall"]
)
def test_any_study_fits_a_screen(count: int, shape: tuple[int, int]) -> None:
    """1920 x 1080 pixels less a bar; large pictures, none over another or outside."""
    figure = Figure()
    mura.draw_explanation(
        figure, [make_view(1, shape=shape)] * count, ["study1", "abnormal"], SCALE
    )
    width, height = figure.get_size_inches() * mura.DPI
    assert width <= 1920
    assert height <= 1000
    axes = figure.axes[0]
    extents = np.array([image.get_extent() for image in axes.images])  # left, right, bottom, top
    left, right, bottom, top = extents.T
    assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0], rel=0.02)
    assert left.min() > 0
    assert top.min() > 0.5, "room for the heading"
    assert right.max() < axes.get_xlim()[1] - 0.7, "room for the colour bar"
    assert bottom.max() < axes.get_ylim()[0]
    for i, j in np.ndindex(3 * count, 3 * count):
        apart = (
            right[i] <= left[j] or right[j] <= left[i] or bottom[i] <= top[j] or bottom[j] <= top[i]
        )
        assert apart or i == j
    assert (top[0::3] == top[1::3]).all(), "the three panels of a view stand in a row"
    assert (top[0::3] == top[2::3]).all()
    area = ((right - left) * (bottom - top)).sum() / (width * height / mura.DPI**2)
    assert area > 0.3


@pytest.mark.parametrize("order", [1, -1])
def test_views_of_different_shapes_do_not_overlap(order: int) -> None:
    """An upright view and one that lies, in either order."""
    figure, shapes = Figure(), [(400, 200), (200, 400)][::order]
    views = [make_view(1, shape=shape) for shape in shapes]
    mura.draw_explanation(figure, views, ["study1"], SCALE)
    axes = figure.axes[0]
    left, right, bottom, top = np.array([image.get_extent() for image in axes.images]).T
    assert (right[:-1] <= left[1:])[[0, 1, 3, 4]].all(), "side by side"
    assert bottom[:3].max() < top[3:].min(), "one row below the other"
    assert right.max() < axes.get_xlim()[1] - 0.7, "room for the colour bar"
    assert bottom.max() < axes.get_ylim()[0]


def test_large_images_are_reduced_before_they_are_drawn() -> None:
    """An honest 18-megapixel image took 2.1 GB and 12 s for a figure of 1,155 pixels."""
    views = [make_view(left_half(8.0, (5000, 3600)), shape=(5000, 3600), box=(0, 0, 1800, 5000))]
    drawn = panels(*views * 2)
    assert sum(picture.size for view in drawn for picture in view) < 6.5e6
    original, heat, overlay = drawn[1]
    assert original.shape[0] / original.shape[1] == pytest.approx(5000 / 3600, rel=0.02)
    assert heat[100, 5].sum() > 100 > heat[100, -5].sum() == 0
    assert painted(overlay, CYAN).any()


def test_reduced_pixels_are_averaged_not_picked() -> None:
    """A chequerboard becomes grey; picked pixels would be a moire of black and white."""
    board = 255 * (np.indices((1500, 2250)).sum(axis=0) % 2)
    ((original, *_),) = panels(make_view(0, board, shape=board.shape))
    assert 120 <= original[5:-5, 5:-5].min() <= original.max() <= 136


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_any_shape_can_be_drawn(shape: tuple[int, int]) -> None:
    view = make_view(3, shape=shape, box=(0, 0, shape[1], shape[0]))
    content = mura.save_explanation([view], ["x"], SCALE)
    assert Image.open(io.BytesIO(content)).format == "PNG"


@pytest.mark.parametrize("views", [1, 3])
def test_a_long_heading_stays_within_the_figure(views: int) -> None:
    figure = Figure()
    heading = ["1.2.840.113619." * 12, "abnormal, confidence 99.1%"]
    mura.draw_explanation(figure, [make_view(1)] * views, heading, SCALE)
    figure.canvas.draw()
    (title,) = figure.texts
    box = title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.get_suptitle().split("\n")[1] == heading[1]


def test_names_are_data() -> None:
    """A dollar is no formula, a newline no new line, bytes that are no text cost no picture."""
    for name in [*AWKWARD, "x" * 300, "腕の骨.png"]:
        figure = Figure()
        mura.draw_explanation(figure, [make_view(1, name=name)], [name, "abnormal"], SCALE)
        heading, verdict = figure.get_suptitle().split("\n")
        title = figure.axes[0].texts[0]
        assert verdict == "abnormal"
        assert heading.isprintable()
        assert title.get_text().isprintable()
        assert not title.get_parse_math()
        assert title.get_text().startswith(mura.printable(name)[:6])
        assert title.get_text().endswith("75.0%")
        assert len(title.get_text()) < 100


def test_drawing_warns_of_nothing() -> None:
    """Not even of a script that the font lacks."""
    views = [make_view(left_half(3.0), name=name) for name in (*AWKWARD, "腕の骨.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mura.save_explanation(views, ["Röntgen 腕の骨"], SCALE)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [
        (".png", b"\x89PNG"),
        (".PNG", b"\x89PNG"),
        (".jpg", b"\xff\xd8"),
        (".jpeg", b"\xff\xd8"),
        (".pdf", b"%PDF"),
        (".svg", b"<?xml"),
    ],
)
def test_the_suffix_decides_the_format(suffix: str, start: bytes) -> None:
    for written in (suffix, suffix.upper()):
        content = mura.save_explanation([make_view(2)], ["x"], SCALE, suffix=written)
        assert content.startswith(start) and mura.PROGRAM.encode() in content


def test_settings_of_matplotlib_are_left_alone(saved: list[Figure]) -> None:
    before = dict(mpl.rcParams)
    mura.save_explanation([make_view(1)], ["x"], SCALE)
    mura.plot_history(history(train_loss=[1.0]), 1)
    mura.plot_report(*evaluated(cohort(8)))
    assert dict(mpl.rcParams) == before
    assert len(saved) == 3


# ----- gallery


def predictions(label: Any, probability: Any, body_part: str = "XR_HAND") -> mura.Predictions:
    """Make predictions of as many images, each its own study and patient."""
    names = np.array([f"{body_part}/patient{i:05}/study1_x" for i in range(len(label))])
    paths = np.array([f"{name}/image1.png" for name in names])
    parts = np.full(len(names), body_part)
    return mura.Predictions(
        paths, parts, names, names, np.array(label), np.array(probability, float)
    )


def test_gallery_shows_the_worst_first() -> None:
    label = [0, 0, 0, 1, 1, 1, 0, 1]
    probability = [0.9, 0.97, 0.2, 0.05, 0.3, 0.8, 0.45, 0.52]
    pages = {
        name: (heading, list(rows))
        for name, heading, rows in mura.gallery_pages(predictions(label, probability), 0.5)
    }
    rows = {name.removesuffix("_1.png"): rows for name, (_, rows) in pages.items()}
    assert rows["false_positives"] == [1, 0]
    assert rows["false_negatives"] == [3, 4]
    assert rows["least_certain"][:3] == [7, 6, 4]
    assert sorted(rows["right"]) == [2, 5, 6, 7]
    headings = [heading.lower() for heading, _ in pages.values()]
    for text, heading in zip(
        ("false positives", "false negatives", "least certain", "right"), headings, strict=True
    ):
        assert text in heading


def test_gallery_follows_the_threshold() -> None:
    """Above 0.1 is abnormal: 0.2 is no false negative, and 0.11 less certain than 0.5."""
    pages = mura.gallery_pages(predictions([1, 1, 0], [0.2, 0.05, 0.11]), 0.1)
    rows = {name: list(rows) for name, _, rows in pages}
    assert rows["false_negatives_1.png"] == [1]
    assert rows["false_positives_1.png"] == [2]
    assert rows["least_certain_1.png"] == [2, 1, 0]
    assert rows["right_1.png"] == [0]


def test_gallery_has_at_most_12_a_sheet_and_a_spread_of_right_ones() -> None:
    random = np.random.default_rng(0)
    label, probability = np.arange(400) % 2, random.random(400)
    pages = list(mura.gallery_pages(predictions(label, probability), 0.5))
    assert [name for name, _, _ in pages] == [
        "false_positives_1.png",
        "false_positives_2.png",
        "false_negatives_1.png",
        "false_negatives_2.png",
        "least_certain_1.png",
        "right_1.png",
    ]
    assert all(0 < len(rows) <= 12 for _, _, rows in pages)
    two = np.concatenate([rows for _, _, rows in pages[:2]])
    assert (np.diff(probability[two]) <= 0).all()
    assert probability[two[-1]] >= np.sort(probability[label == 0])[-24]
    right = pages[-1][2]
    assert ((probability[right] > 0.5) == label[right]).all()
    assert np.ptp(np.abs(probability[right] - 0.5)) > 0.3, "not only the surest"
    assert 0 < label[right].mean() < 1


def test_gallery_of_a_perfect_model_has_no_empty_sheet() -> None:
    pages = list(mura.gallery_pages(predictions([0, 1], [0.1, 0.9]), 0.5))
    assert [name for name, _, _ in pages] == ["least_certain_1.png", "right_1.png"]
    pages = list(mura.gallery_pages(predictions([0], [0.9]), 0.5))
    assert [name for name, _, _ in pages] == ["false_positives_1.png", "least_certain_1.png"]


def test_gallery_captions_say_which_image_its_label_and_probability() -> None:
    images = predictions([1, 0], [0.034, 0.9999])
    assert mura.tile_caption(images, 0).split("\n") == [
        "patient00000/study1_x/image1.png",
        "label abnormal, p 3.4%",
    ]
    assert mura.tile_caption(images, 1).endswith("label normal, p above 99.9%")


@pytest.mark.parametrize("count", [1, 5, 12])
def test_gallery_sheet_shows_each_tile_with_its_caption(count: int, saved: list[Figure]) -> None:
    grey, heat = np.full((300, 200), 90, np.uint8), left_half(8.0, (300, 200))
    tiles = [(grey, heat * (i % 2), f"image{i}.png\nnormal") for i in range(count)]
    mura.gallery_sheet(tiles, "Least certain", SCALE)
    axes = saved[0].axes[0]
    assert [text.get_text() for text in axes.texts] == [caption for *_, caption in tiles]
    assert len(axes.images) == count
    for i, image in enumerate(axes.images):
        picture = np.asarray(image.get_array())
        assert picture.shape[0] / picture.shape[1] == pytest.approx(1.5, rel=0.02)
        assert (picture[20, -9] == 90).all()
        assert (np.ptp(picture[20, 9].astype(int)) > 50) == i % 2
    width, height = saved[0].get_size_inches() * mura.DPI
    assert max(width / 1920, height / 1000) <= 1
    assert saved[0].get_suptitle() == "Least certain"


def test_gallery_sheet_is_a_png() -> None:
    content = mura.gallery_sheet(
        [(np.zeros((9, 9), np.uint8), np.ones((9, 9)), "a$b\n\udcff")], "x", SCALE
    )
    assert Image.open(io.BytesIO(content)).format == "PNG"


# ----- history


def history(**columns: list[float]) -> list[dict[str, float]]:
    """Make rows of a history; a column not given is NaN throughout."""
    count = len(next(iter(columns.values())))
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc", "val_kappa")
    return [
        {"epoch": i + 1.0, **{name: columns.get(name, [np.nan] * count)[i] for name in names}}
        for i in range(count)
    ]


def test_curves_show_the_history(saved: list[Figure]) -> None:
    rows = history(
        train_loss=[0.7, 0.5], val_loss=[0.8, 0.6], val_accuracy=[0.5, 0.9], val_auroc=[0.6, np.nan]
    )
    mura.plot_history(rows, 1)
    curves = {line.get_label(): line.get_xydata() for axes in saved[0].axes for line in axes.lines}
    curves.pop("kept: epoch 1")
    assert list(curves) == [
        "train loss",
        "val loss",
        "train accuracy",
        "val accuracy",
        "val auroc",
        "val kappa",
    ]
    assert curves["train loss"].tolist() == [[1, 0.7], [2, 0.5]]
    assert curves["val loss"].tolist() == [[1, 0.8], [2, 0.6]]
    assert curves["val accuracy"].tolist() == [[1, 0.5], [2, 0.9]]
    np.testing.assert_array_equal(curves["val auroc"], [[1, 0.6], [2, np.nan]], "a gap, not a zero")
    assert [len(axes.lines) for axes in saved[0].axes] == [3, 3, 3]


@pytest.mark.parametrize(("count", "best"), [(1, 1), (2, 1), (100, 63)])
def test_the_kept_epoch_is_marked_and_ticks_are_epochs(
    count: int, best: int, saved: list[Figure]
) -> None:
    mura.plot_history(history(train_loss=[0.7] * count), best)
    for axes in saved[0].axes:
        mark = axes.lines[-1]
        assert set(mark.get_xdata()) == {best}
        assert mark.get_label() == f"kept: epoch {best}"
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 1 <= len(ticks) <= 12
        assert all(tick == int(tick) for tick in ticks)
        assert axes.lines[0].get_marker() != "None", "one epoch leaves a visible mark"
    assert saved[0].axes[0].get_legend() is not None


@pytest.mark.parametrize("count", [1, 100])
def test_history_is_a_png_and_its_legends_lie_below_the_curves(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = keep_figures(monkeypatch)
    content = mura.plot_history(history(train_loss=[0.7] * count, val_kappa=[0.1] * count), 1)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1200
    for axes in figures[0].axes:
        assert axes.get_legend().get_window_extent().y1 <= axes.get_window_extent().y0


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved, drawn as they are."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


# ----- report


def cohort(
    studies: int = 60, parts: tuple[str, ...] = ("XR_ELBOW", "XR_HAND"), seed: int = 0
) -> mura.Predictions:
    """Draw studies of two views, spread over body parts and half as many patients."""
    random = np.random.default_rng(seed)
    index = np.repeat(np.arange(studies), 2)
    label = random.integers(0, 2, studies)[index]
    part = np.array(parts)[index % len(parts)]
    study = np.array(
        [f"{p}/patient{i // 2:05d}/study{i}" for p, i in zip(part, index, strict=True)]
    )
    path = np.array([f"{s}/image{i % 2}.png" for i, s in enumerate(study)])
    patient = np.array([f"patient{i // 2:05d}" for i in index])
    logit = 2.5 * (label - 0.5) + random.normal(0, 1, len(index))
    return mura.Predictions(path, part, patient, study, label, 1 / (1 + np.exp(-logit)))


def evaluated(
    images: mura.Predictions, threshold: float = 0.5, **more: Any
) -> tuple[dict[str, Any], Any, Any]:
    """Evaluate with few resamples; returns the report, images and studies."""
    report = {
        "split": "valid",
        "checkpoints": ["a.pth"],
        "date": "2026-01-31T12:00:00+01:00",
        "threshold": threshold,
        "threshold_source": "default",
        "is_mura": False,
        **mura.Evaluation(threshold, 20).report(images),
        **more,
    }
    return report, images, mura.pool_studies(images)


def metric(
    value: float | None, low: float | None = None, high: float | None = None
) -> dict[str, float | None]:
    """Make a metric of a report."""
    return {"value": value, "low": low, "high": high}


def drawn_report(
    figures: list[Figure], report: dict[str, Any], images: Any, studies: Any
) -> dict[str, Any]:
    """Draw a report; returns its axes by their letter."""
    mura.plot_report(report, images, studies)
    titles = {axes.get_title(loc="left"): axes for axes in figures[-1].axes}
    return {title[0]: axes for title, axes in titles.items() if title}


def lines_of(axes: Any, label: str) -> list[np.ndarray]:
    """Points of the lines with that label."""
    return [line.get_xydata() for line in axes.lines if str(line.get_label()).startswith(label)]


def test_roc_takes_ties_as_one_step(saved: list[Figure]) -> None:
    report, images, studies = evaluated(predictions([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.1]))
    (curve,) = lines_of(drawn_report(saved, report, images, studies)["a"], "studies")[:1]
    np.testing.assert_allclose(curve, [[0, 0], [0, 0.5], [0.5, 1], [1, 1]])


def test_roc_and_precision_recall_agree_with_scikit_learn(saved: list[Figure]) -> None:
    from sklearn.metrics import precision_recall_curve, roc_curve

    report, images, studies = evaluated(cohort())
    axes = drawn_report(saved, report, images, studies)
    for level, found in (("images", images), ("studies", studies)):
        x, y, _ = roc_curve(found.label, found.probability, drop_intermediate=False)
        np.testing.assert_allclose(lines_of(axes["a"], level)[0], np.transpose([x, y]))
        precision, recall, _ = precision_recall_curve(found.label, found.probability)
        expected = np.transpose([recall, precision])[-2::-1]  # less the point (0, 1) that it adds
        expected = np.vstack([[0, expected[0, 1]], expected])
        np.testing.assert_allclose(lines_of(axes["b"], level)[0], expected)
    assert {line.get_drawstyle() for line in axes["b"].lines if line.get_label() == "studies"} == {
        "steps-pre"
    }


def test_prevalence_is_that_of_studies(saved: list[Figure]) -> None:
    """One abnormal study of three views, three normal ones of one: 1 of 4, though 3 of 6 images."""
    names = np.array(["a", "a", "a", "b", "c", "d"])
    label, probability = np.array([1, 1, 1, 0, 0, 0]), np.array([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    images = mura.Predictions(np.array(list("123456")), np.full(6, "XR_HAND"), names, names, label, probability)
    ((line, *_),) = lines_of(drawn_report(saved, *evaluated(images))["b"], "prevalence")
    assert line[1] == 0.25


def test_operating_point_and_its_intervals_stand_where_they_belong(saved: list[Figure]) -> None:
    """Intervals of different lengths, so that none can be swapped or mirrored unseen."""
    report, images, studies = evaluated(cohort())
    report["levels"]["study"] |= {
        "sensitivity": metric(0.8, 0.6, 0.9),
        "specificity": metric(0.7, 0.65, 0.95),
        "ppv": metric(0.5, 0.4, 0.55),
    }
    axes = drawn_report(saved, report, images, studies)
    for letter, x, y in (
        ("a", (0.3, 0.05, 0.35), (0.8, 0.6, 0.9)),
        ("b", (0.8, 0.6, 0.9), (0.5, 0.4, 0.55)),
    ):
        ((point,),) = lines_of(axes[letter], "studies, threshold 0.5")
        assert tuple(point) == pytest.approx((x[0], y[0]))
        bars = [
            np.sort(line.get_xydata(), axis=0)
            for line in axes[letter].lines
            if len(line.get_xydata()) == 2
        ]
        assert any(np.allclose(bar, [[x[1], y[0]], [x[2], y[0]]]) for bar in bars)
        assert any(np.allclose(bar, [[x[0], y[1]], [x[0], y[2]]]) for bar in bars)


def test_the_papers_point_only_where_the_data_is_mura(saved: list[Figure]) -> None:
    report, images, studies = evaluated(cohort(8))
    axes = drawn_report(saved, report, images, studies)["a"]
    assert not lines_of(axes, "MURA paper")
    axes = drawn_report(saved, report | {"is_mura": True}, images, studies)["a"]
    ((point,),) = lines_of(axes, "MURA paper")
    assert tuple(point) == pytest.approx((1 - 0.887, 0.815))
    label = axes.get_legend().get_texts()[-1].get_text()
    for text in ("hidden test set", "207 studies", "0.929"):
        assert text in label


def test_reliability_of_hand_worked_bins(saved: list[Figure]) -> None:
    """Ten studies at 0.72, eight abnormal; one normal at 0.1, which is the second bin's first."""
    label, probability = [1] * 8 + [0] * 2 + [0], [0.72] * 10 + [0.1]
    axes = drawn_report(saved, *evaluated(predictions(label, probability)))["d"]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert sorted(points) == [pytest.approx((0.1, 0)), pytest.approx((0.72, 0.8))]
    bars = [
        line.get_xydata()
        for line in axes.lines
        if np.ptp(line.get_ydata()) > 0 == np.ptp(line.get_xdata())
    ]
    wilson = {0.72: (0.4902, 0.9433), 0.1: (0.0, 0.7935)}  # 8 of 10 and 0 of 1 (Wilson 1927)
    assert {
        round(bar[0, 0], 2): tuple(np.round(np.sort(bar[:, 1]), 4) + 0.0) for bar in bars
    } == wilson
    (top,) = axes.child_axes
    assert [text.get_text() for text in top.get_xticklabels()] == ["1", "10"]
    assert list(top.get_xticks()) == pytest.approx([0.1, 0.72])
    assert not [line for line in axes.lines if len(line.get_xydata()) > 2], (
        "no line through the bins"
    )


def test_reliability_has_ten_bins_and_1_is_in_the_last(saved: list[Figure]) -> None:
    found = evaluated(predictions([1, 0, 1, 1], [0.09, 0.11, 0.92, 1.0]))
    axes = drawn_report(saved, *found)["d"]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == pytest.approx([0.09, 0.11, 0.96])


def test_the_confusion_matrix_has_labels_in_rows_and_follows_the_threshold(
    saved: list[Figure],
) -> None:
    """Three abnormal studies, one of them missed at 0.55; one normal study, called right."""
    found = evaluated(predictions([1, 1, 1, 0], [0.9, 0.8, 0.55, 0.1]), threshold=0.55)
    axes = drawn_report(saved, *found)["c"]
    cells = {
        text.get_position(): text.get_text().split("\n") for text in axes.texts
    }  # (column, row)
    assert cells == {
        (0, 0): ["1", "100.0%"],
        (1, 0): ["0", "0.0%"],
        (0, 1): ["1", "33.3%"],
        (1, 1): ["2", "66.7%"],
    }
    for names, label in (
        (axes.get_xticklabels(), axes.get_xlabel()),
        (axes.get_yticklabels(), axes.get_ylabel()),
    ):
        assert [name.get_text() for name in names] == ["normal", "abnormal"]
        assert label == ("label" if label == axes.get_ylabel() else "prediction")


def test_kappa_by_body_part_with_numbers(saved: list[Figure]) -> None:
    report, images, studies = evaluated(cohort())
    wanted = {
        "overall": metric(0.5, 0.3, 0.6),
        "elbow": metric(-0.2, -0.4, 0.1),
        "hand": metric(None),
    }
    for levels, kappa in zip(
        [report["levels"], *report["body_parts"].values()], wanted.values(), strict=True
    ):
        levels["study"]["kappa"] = kappa
    axes = drawn_report(saved, report, images, studies)["e"]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["overall (60)", "elbow (30)", "hand (30)"]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert points[:2] == [(0.5, 0), (-0.2, 1)]
    bars = [
        np.sort(line.get_xdata()).tolist() for line in axes.lines if len(set(line.get_ydata())) == 1
    ]
    assert [0.3, 0.6] in bars
    assert [-0.4, 0.1] in bars
    numbers = [text.get_text() for text in axes.child_axes[0].get_yticklabels()]
    for number, kappa in zip(numbers, wanted.values(), strict=True):
        assert number == mura.format_value(kappa)
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "overall stands above"


def test_the_report_names_model_date_and_sizes(saved: list[Figure]) -> None:
    report, images, studies = evaluated(cohort(), checkpoints=["a.pth", "cost$5$.pth"])
    mura.plot_report(report, images, studies)
    texts = " ".join(text.get_text() for text in saved[0].findobj(mpl.text.Text))
    sizes = report["levels"]["study"]
    for part in (
        "a.pth, cost$5$.pth",
        "2026-01-31",
        "valid",
        "60 studies",
        f"({sizes['positives']} abnormal)",
        f"{sizes['patients']} patients",
        mura.format_value(sizes["auroc"]),
        mura.format_value(sizes["average_precision"]),
    ):
        assert part in texts
    assert "12:00" not in texts


def subset(images: mura.Predictions, chosen: Any) -> mura.Predictions:
    """Keep the chosen images, a mask (N,)."""
    return images.take(np.asarray(chosen))


DEGENERATE = {
    "one study": lambda: subset(cohort(1), [True, True]),
    "only abnormal": lambda: subset(cohort(), cohort().label == 1),
    "only normal": lambda: subset(cohort(), cohort().label == 0),
    "fourteen parts": lambda: cohort(
        140, tuple(f"XR_PART_WITH_A_LONG_NAME_{i}" for i in range(14))
    ),
    "strange names": lambda: cohort(12, ("XR_$HAND_{$", "XR_\udcff\n", "")),
    "constant": lambda: predictions([0, 1] * 9, [0.5] * 18),
    "certain and wrong": lambda: predictions([0, 1] * 9, [1.0, 0.0] * 9),
}


@pytest.mark.parametrize("images", DEGENERATE.values(), ids=list(DEGENERATE))
def test_a_report_can_be_drawn_of_any_input(images: Any, saved: list[Figure]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = drawn_report(saved, *evaluated(images()))
    assert "".join(axes) == "abcde"
    assert not axes["a"].texts, "no text on the curve"
    assert not axes["b"].texts


@pytest.mark.parametrize("case", ["only normal", "fourteen parts", "strange names"])
def test_the_report_is_a_png_and_no_text_lies_on_another(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = keep_figures(monkeypatch)
    report, images, studies = evaluated(DEGENERATE[case](), is_mura=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = mura.plot_report(report, images, studies)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 1000
    by_letter = {axes.get_title(loc="left")[:1]: axes for axes in figures[0].axes}
    figures[0].draw_without_rendering()  # at its own resolution, of which extents are told
    legends = []
    for axes in (by_letter["a"], by_letter["b"]):
        lines = [text.get_window_extent() for text in axes.get_legend().get_texts()]
        assert max(line.y1 for line in lines) <= axes.get_window_extent().y0
        legends += lines
    texts = figures[0].findobj(mpl.text.Text)
    heading = next(text.get_window_extent() for text in texts if "a.pth" in text.get_text())
    titles = {
        text.get_text()[0]: text.get_window_extent()
        for text in texts
        if text.get_text()[1:3] == "  "
    }
    assert heading.y0 >= max(titles[letter].y1 for letter in "abc")
    assert min(legend.y0 for legend in legends) >= max(titles[letter].y1 for letter in "de")


# ----- windows


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stdout be a terminal, and matplotlib prefer windows that open."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(pyplot, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(pyplot, "switch_backend", lambda name: None)


def test_window_on_a_terminal_with_a_display(terminal: None) -> None:
    assert mura.can_show(no_show=False)
    assert not mura.can_show(no_show=True)


def test_no_window_off_a_terminal(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert not mura.can_show(no_show=False)


@pytest.mark.parametrize("backend", ["agg", "Agg", "pdf", "svg"])
def test_no_window_where_mplbackend_only_writes_files(
    backend: str, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyplot, "get_backend", lambda: backend)
    assert not mura.can_show(no_show=False)


def test_no_window_where_the_toolkit_cannot_start(
    terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPLBACKEND=TkAgg without a display: matplotlib says so only when the backend is loaded."""

    def refuse(name: str) -> None:
        raise ImportError("Cannot load backend 'TkAgg': 'headless' is running")

    monkeypatch.setattr(pyplot, "switch_backend", refuse)
    assert not mura.can_show(no_show=False)


def test_a_window_is_kept_open_and_has_the_inputs_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backend_bases import FigureManagerBase

    titles: list[str] = []
    monkeypatch.setattr(
        FigureManagerBase, "set_window_title", lambda _, title: titles.append(title)
    )
    pyplot.close("all")
    mura.save_explanation([make_view(2)], ["x"], SCALE, window="study1\n")
    assert mura.save_explanation([make_view(2)], ["x"], SCALE).startswith(b"\x89PNG")
    assert len(pyplot.get_fignums()) == 1
    assert titles[-1] == "study1\\n"
    pyplot.close("all")


def test_show_windows_waits_for_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pyplot, "show", lambda: calls.append("shown"))
    mura.show_windows()
    assert calls == ["shown"]


@pytest.fixture
def display() -> Iterator[str]:
    """Start a virtual screen."""
    pytest.importorskip("tkinter")
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not installed")
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1600x1000x24"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    ) as server:
        os.close(writing)
        with os.fdopen(reading) as number:
            yield f":{number.readline().strip()}"
        server.terminate()


WINDOW = """
import sys
from pathlib import Path
import numpy as np
import mura_anomaly_detection as mura
from matplotlib import pyplot
sys.stdout.isatty = lambda: True
assert mura.can_show(False)
grey, heat = np.zeros((60, 40), np.uint8), np.ones((60, 40), np.float32)
view = mura.ViewResult(Path("image1.png"), grey, 0.5, heat)
mura.save_explanation([view], ["study1"], mura.HeatScale("abnormal", "logits", 4.0), window="study1")
pyplot.show(block=False)
window = pyplot.gcf().canvas.manager.window
window.update()
print(window.winfo_viewable(), window.title(), window.winfo_width() > 500)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that imports the program."""
    clean = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_real_window(display: str) -> None:
    done = python(WINDOW, DISPLAY=display)
    assert done.stdout.split() == ["1", "study1", "True"], done.stderr


KERNEL = """
import mura_anomaly_detection as mura
mura.choose_backend()
names = "epoch train_loss val_loss train_accuracy val_accuracy val_auroc val_kappa"
row = dict.fromkeys(names.split(), 0.5)
print(mura.plot_history([row], 1)[:4])
from matplotlib import pyplot
print(pyplot.get_backend())
"""


def test_a_backend_that_cannot_be_imported_costs_one_line() -> None:
    """A notebook's kernel exports its own to every command; importing matplotlib fails at it."""
    name = "module://matplotlib_inline.backend_inline"
    if importlib.util.find_spec("matplotlib_inline"):
        name = "nonsense"  # at which it fails as well
    done = python(KERNEL, MPLBACKEND=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == repr(b"\x89PNG")
    assert done.stdout.split()[-1].lower() == "agg"
    (line,) = done.stderr.splitlines()
    assert f"MPLBACKEND={name}" in line


@pytest.mark.parametrize(
    ("name", "kept"),
    [("svg", "svg"), ("TkAgg", "TkAgg"), ("nonsense", "Agg"), ("module://no_such.backend", "Agg")],
)
def test_a_backend_that_can_be_imported_is_kept(
    name: str, kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "TkAgg":
        pytest.importorskip("tkinter")
    monkeypatch.setenv("MPLBACKEND", name)
    with mpl.rc_context():
        mura.choose_backend()
        assert os.environ["MPLBACKEND"] == mpl.rcParams["backend"] == kept
    assert bool(capsys.readouterr().err) is (name != kept)


def test_no_backend_asked_for_none_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND")
    mura.choose_backend()
    assert "MPLBACKEND" not in os.environ
