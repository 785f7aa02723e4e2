"""Sections 11 and 14, the report: a table for the terminal, a figure for a paper, at ordinary and at degenerate input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mura_anomaly_detection as mad

PARTS = ("XR_ELBOW", "XR_FINGER", "XR_FOREARM", "XR_HAND", "XR_HUMERUS", "XR_SHOULDER", "XR_WRIST")


def cohort(studies: int = 120, parts: tuple[str, ...] = PARTS, seed: int = 0) -> mad.Scored:
    """Draw studies of two views, spread over body parts and half as many patients."""
    random = np.random.default_rng(seed)
    index = np.repeat(np.arange(studies), 2)
    label = random.integers(0, 2, studies)[index]
    part = np.array(parts)[index % len(parts)]
    study = np.array([f"{p}/patient{i // 2:05d}/study{i}" for p, i in zip(part, index, strict=True)])
    path = tuple(f"{s}/image{i % 2}.png" for i, s in enumerate(study))
    patient = np.array([f"patient{i // 2:05d}" for i in index])
    logit = 2.5 * (label - 0.5) + random.normal(0, 1, len(index))
    return mad.Scored(path, part, patient, study, label, 1 / (1 + np.exp(-logit)))


def report_of(images: mad.Scored, **more: Any) -> dict[str, Any]:
    """Evaluate with few resamples and add what a run knows."""
    return {
        "split": "valid",
        "checkpoints": ["a.pth"],
        "threshold": 0.5,
        "threshold_source": "default",
        **mad.evaluate(images, 0.5, resamples=50),
        "bad_images": 0,
        "notes": ["valid is not the hidden test set of the paper. " * 4],
        **more,
    }


def only(images: mad.Scored, **chosen: Any) -> mad.Scored:
    """Keep the images whose field has the given value."""
    ((field, value),) = chosen.items()
    return images.take(getattr(images, field) == value)


DEGENERATE = {
    "one study": lambda: cohort(1),
    "only abnormal": lambda: only(cohort(), label=1),
    "only normal": lambda: only(cohort(), label=0),
    "one part": lambda: cohort(30, ("XR_KNEE",)),
    "fourteen parts": lambda: cohort(140, tuple(f"XR_PART_WITH_A_LONG_NAME_{i}" for i in range(14))),
    "one part of one class": lambda: cohort(40).take(~((cohort(40).part == "XR_HAND") & (cohort(40).label == 1))),
    "constant": lambda: mad.Scored(**vars(cohort()) | {"probability": np.full(240, 0.5)}),
    "certain and wrong": lambda: mad.Scored(**vars(cohort()) | {"probability": 1.0 - cohort().label}),
}


@pytest.fixture(params=DEGENERATE.values(), ids=list(DEGENERATE))
def images(request: pytest.FixtureRequest) -> mad.Scored:
    """Give each of the inputs that break careless code."""
    return request.param()


def test_the_report_survives_json(images: mad.Scored) -> None:
    report = report_of(images)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


# ---- table ----


def test_the_table_fits_100_columns(images: mad.Scored) -> None:
    report = report_of(images)
    members = {f"runs/densenet169_seed{i}_of_a_long_name.pth": report["levels"] for i in range(5)}
    table = mad.format_table(report | {"members": members})
    assert max(map(len, table.splitlines())) <= 100
    assert "nan" not in table
    assert "None" not in table


def test_the_table_shows_each_figure_with_its_interval() -> None:
    report = report_of(cohort())
    table = mad.format_table(report)
    for levels in [report["levels"], *report["parts"].values()]:
        for level in ("study", "image"):
            for figure in mad.METRICS:
                value, low, high = (levels[level][figure][key] for key in ("value", "low", "high"))
                assert f"{value:.3f} [{low:.3f},{high:.3f}]" in table
    head, overall = (line.split() for line in table.splitlines()[1:3])
    assert head == ["studies", "abnormal", "AUROC", "Brier", "ECE"]
    assert overall[:3] == ["overall", "120", str(report["levels"]["study"]["positives"])]
    assert overall[3] == f"{report['levels']['study']['auroc']['value']:.3f}"
    assert all(part in table for part in PARTS)


def test_the_table_names_the_threshold_and_its_source() -> None:
    table = mad.format_table(report_of(cohort(), threshold=0.412, threshold_source="val"))
    assert "abnormal above 0.412 (threshold: val)" in table


def test_undefined_figures_are_dashes() -> None:
    """One abnormal study that is called abnormal: no AUROC, no kappa, no specificity, and no interval at all."""
    images = only(cohort(), study=cohort().study[0])
    images = mad.Scored(**vars(images) | {"label": np.array([1, 1]), "probability": np.array([0.9, 0.9])})
    lines = mad.format_table(report_of(images)).splitlines()
    rows = [line.split() for line in lines if line.startswith("overall")]
    assert rows[0] == ["overall", "1", "1", "-", "0.010", "0.100"]
    assert rows[1] == ["overall", "-", "1.000", "1.000", "-"]


def test_members_stand_beside_the_ensemble() -> None:
    one, other = (report_of(cohort(seed=seed))["levels"] for seed in (0, 1))
    table = mad.format_table(report_of(cohort(), members={"first": one, "second": other}))
    names = [line.split()[0] for line in table.splitlines() if line[:1] in ("o", " ") and line.strip()]
    assert names.count("first") == names.count("second") == names.count("overall") == 4
    assert f"{other['study']['auroc']['value']:.3f}" in next(x for x in table.splitlines() if "second" in x)


def test_a_long_name_keeps_both_ends() -> None:
    assert mad.shorten("abcdefghijklm", 13) == "abcdefghijklm"
    assert mad.shorten("abcdefghijklmn", 13) == "abcdef~ijklmn"
    assert len(mad.shorten("abcdefghijklmn", 12)) == 12


# ---- figure ----


def test_the_figure_is_drawn_whatever_the_input(images: mad.Scored) -> None:
    drawn = io.BytesIO()
    mad.draw_report(report_of(images), images, drawn)
    with Image.open(drawn) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 1000
        assert np.asarray(picture.convert("L")).std() > 10


def svg(report: dict[str, Any], images: mad.Scored, folder: Path) -> str:
    """Draw as SVG, where text stays text."""
    mad.draw_report(report, images, folder / "report.svg")
    return (folder / "report.svg").read_text()


def test_the_figure_says_what_the_papers_point_is(tmp_path: Path) -> None:
    drawn = svg(report_of(cohort()), cohort(), tmp_path)
    assert "MURA paper, its hidden test set of 207 studies:" in drawn
    assert "another test set (AUROC 0.929)" in drawn


def test_the_figure_shows_counts_and_figures(tmp_path: Path) -> None:
    """Of three abnormal studies one is missed; the normal one is right."""
    names = np.array(["a", "b", "c", "d"])
    probability = np.array([0.9, 0.8, 0.2, 0.1])
    images = mad.Scored(tuple(names), np.full(4, "XR_HAND"), names, names, np.array([1, 1, 1, 0]), probability)
    drawn = svg(report_of(images), images, tmp_path)
    assert "66.7 %" in drawn  # 2 of 3 abnormal studies are called so
    assert "33.3 %" in drawn
    assert "100.0 %" in drawn
    assert "sensitivity 0.667, specificity 1.000" in drawn
    assert "hand (4)" in drawn
    assert "4 studies (3 abnormal), patients: 4" in drawn


def test_the_curve_ends_at_its_corners_and_takes_ties_as_one_step() -> None:
    from matplotlib.figure import Figure

    names = np.array(["a", "b", "c", "d"])
    probability = np.array([0.9, 0.4, 0.4, 0.1])
    images = mad.Scored(tuple(names), np.full(4, "XR_HAND"), names, names, np.array([1, 1, 0, 0]), probability)
    axes = Figure().add_subplot()
    mad.draw_roc(axes, report_of(images), images)
    curve = next(line for line in axes.get_lines() if str(line.get_label()).startswith("this model"))
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0], [0, 0.5], [0.5, 1], [1, 1]])


def test_the_confusion_matrix_has_labels_in_rows() -> None:
    """Three abnormal studies, of which one is missed; one normal study, which is called right."""
    from matplotlib.figure import Figure

    names = np.array(["a", "b", "c", "d"])
    probability = np.array([0.9, 0.8, 0.5, 0.1])
    images = mad.Scored(tuple(names), np.full(4, "XR_HAND"), names, names, np.array([1, 1, 1, 0]), probability)
    axes = Figure().add_subplot()
    mad.draw_confusion(axes, {"threshold": 0.5}, images)
    cells = {text.get_position(): text.get_text().split("\n") for text in axes.texts}  # (column, row)
    assert cells == {(0, 0): ["1", "100.0 %"], (1, 0): ["0", "0.0 %"], (0, 1): ["1", "33.3 %"], (1, 1): ["2", "66.7 %"]}


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    mad.draw_report(report_of(cohort(8)), cohort(8), io.BytesIO())
    assert dict(mpl.rcParams) == before
