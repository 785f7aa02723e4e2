"""Sections 15 and 16, prediction and export: every input gets one answer, the same as --evaluate gives, or its reason."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image

import mura_anomaly_detection as mad

Ask = Callable[..., int]
CPU = mad.Arithmetic(torch.device("cpu"), bf16=False, channels_last=True)


@pytest.fixture
def ask(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run --predict within a folder of its own; the checkpoint is the tiny one unless another is named."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> int:
        checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", trained]
        return run_inside("--predict", *arguments, *checkpoint, "--device", "cpu", "--precision", "fp32", "--no-show")

    return run


@pytest.fixture(scope="module")
def studies(phantoms: Path) -> list[Path]:
    """Give the study folders of valid/, those with most views first."""
    found = sorted((phantoms / "valid").glob("*/*/*/"))
    return sorted(found, key=lambda folder: -len(list(folder.glob("*.png"))))


@pytest.fixture(scope="module")
def image(studies: list[Path]) -> Path:
    """Give one readable image."""
    return studies[0] / "image1.png"


@pytest.fixture(scope="module")
def other(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a second model: other weights, size, fit, normalisation, temperature and threshold, no mirror images."""
    content = mad.read_tensors(trained, "model")
    torch.manual_seed(11)
    state = {k: v + 0.02 * torch.randn_like(v) if v.dim() == 4 else v for k, v in content["state_dict"].items()}
    state["head.weight"] = torch.randn_like(state["head.weight"])
    changed = {
        "state_dict": state,
        "image_size": 96,
        "fit": "letterbox",
        "temperature": 2.0,
        "threshold": 0.4,
        "tta": False,
        "normalization": {"kind": "imagenet", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    path = tmp_path_factory.mktemp("other") / "other.pth"
    mad.write_tensors(path, {**{k: v for k, v in content.items() if k not in ("format", "version")}, **changed})
    return path


@pytest.fixture
def bad(image: Path, tmp_path: Path) -> dict[str, Path]:
    """Make what cannot be predicted, by name of the reason."""
    folder = tmp_path / "bad"
    folder.mkdir()
    data = image.read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "zero.png").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "image1.png").mkdir()
    return {name: folder / name for name in ("cut.png", "text.png", "zero.png", "empty", "image1.png", "missing.png")}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logit_of(checkpoint: Path, path: Path, sides: Sequence[bool] = ()) -> float:
    """Compute an image's logit by the plain sequence of steps: mean over `sides`, mirrored or not, or the model's own."""
    member = mad.load_member(checkpoint, CPU)
    square = mad.fit_square(mad.read_radiograph(path), member.image_size, member.fit)
    batch = member.normalization(torch.from_numpy(square)[None, None].float() / 255)
    with torch.inference_mode():
        logits = [float(member.network(batch.flip(3) if side else batch)) for side in sides or (False, True)[: 1 + member.tta]]
    return float(np.mean(logits))


def probability_of(checkpoint: Path, path: Path) -> float:
    """Compute an image's calibrated probability."""
    return float(1 / (1 + np.exp(-logit_of(checkpoint, path) / mad.load_member(checkpoint, CPU).temperature)))


# ----- collecting


def tree(root: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def collected(*paths: Path, root: Path) -> list[tuple[str, list[str], str]]:
    """Collect inputs, as path, views and the error of one without views, relative to a folder."""
    return [
        (
            path.relative_to(root).as_posix(),
            [view.relative_to(root).as_posix() for view in views],
            "" if views else mad.Result(path, (), 0.5).error,
        )
        for path, views in mad.collect_inputs(paths)
    ]


def test_study_folders_pool_and_other_folders_do_not(tmp_path: Path) -> None:
    tree(tmp_path, "p1/study1_positive/image2.png", "p1/study1_positive/image10.png", "loose/b.png", "loose/a.jpg")
    assert collected(tmp_path, root=tmp_path) == [
        ("loose/a.jpg", ["loose/a.jpg"], ""),
        ("loose/b.png", ["loose/b.png"], ""),
        ("p1/study1_positive", ["p1/study1_positive/image2.png", "p1/study1_positive/image10.png"], ""),
    ]


def test_order_is_as_given_and_natural_within(tmp_path: Path) -> None:
    tree(tmp_path, *(f"in/patient{i}/study1/image1.png" for i in (10, 9, 100)), "z.png", "a.png")
    order = [path for path, _, _ in collected(tmp_path / "z.png", tmp_path / "in", tmp_path / "a.png", root=tmp_path)]
    assert order == ["z.png", "in/patient9/study1", "in/patient10/study1", "in/patient100/study1", "a.png"]


def test_stray_files_are_not_inputs(tmp_path: Path) -> None:
    tree(tmp_path, "study1/image1.png", "study1/._image1.png", "study1/notes.txt", ".hidden/x.png", "Thumbs.db")
    assert collected(tmp_path, root=tmp_path) == [("study1", ["study1/image1.png"], "")]


def test_named_file_is_an_input_whatever_it_is_called(tmp_path: Path) -> None:
    tree(tmp_path, "scan")
    assert collected(tmp_path / "scan", tmp_path / "gone.png", root=tmp_path) == [
        ("scan", ["scan"], ""),
        ("gone.png", ["gone.png"], ""),
    ]


def test_folders_without_images_are_an_input_each(tmp_path: Path) -> None:
    tree(tmp_path, "empty/sub/notes.txt")
    assert collected(tmp_path / "empty", root=tmp_path) == [("empty", [], "holds no images that may be read")]


def test_folder_named_like_an_image_is_listed_not_entered(tmp_path: Path) -> None:
    tree(tmp_path, "in/image1.png/inner.png", "in/image2.png")
    assert [path for path, _, _ in collected(tmp_path / "in", root=tmp_path)] == ["in/image1.png", "in/image2.png"]


def test_study_folder_is_known_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "study1/image1.png", "study1/image2.png")
    monkeypatch.chdir(tmp_path / "study1")
    assert [len(views) for _, views in mad.collect_inputs([Path()])] == [2]


# ----- records


def finding(probability: float | None = None, error: str = "", name: str = "a.png") -> mad.Finding:
    """Make a finding of one model."""
    looks = () if probability is None else ((probability, torch.zeros(2, 2), 64, "stretch"),)
    return mad.Finding(Path(name), np.zeros((2, 2), np.uint8), {}, error, looks)


def result(*findings: mad.Finding, threshold: float = 0.5) -> mad.Result:
    """Make a result."""
    return mad.Result(Path("study1"), findings, threshold)


def test_study_is_the_mean_of_its_views() -> None:
    """0.2, 0.9 and 0.7 give 0.6: abnormal above 0.5, normal above 0.6, with the confidence of the class."""
    views = (finding(0.2), finding(0.9), finding(0.7))
    assert result(*views).probability == pytest.approx(0.6)
    assert (result(*views).label, result(*views).confidence) == (1, pytest.approx(0.6))
    assert (result(*views, threshold=0.65).label, result(*views, threshold=0.65).confidence) == (0, pytest.approx(0.4))
    assert result(finding(0.5)).label == 0, "abnormal is above the threshold, not at it"


def test_unreadable_views_are_left_out_of_the_mean_and_named() -> None:
    mixed = result(finding(0.2), finding(error="damaged", name="b.png"), finding(0.4))
    assert mixed.probability == pytest.approx(0.3)
    assert mixed.error == "b.png: damaged"
    assert mixed.row() == {
        "path": "study1",
        "prediction": "normal",
        "confidence": pytest.approx(0.7),
        "probability": pytest.approx(0.3),
        "error": "b.png: damaged",
    }


def test_nothing_readable_is_no_prediction() -> None:
    for failed, error in ((result(finding(error="damaged")), "damaged"), (result(), "holds no images that may be read")):
        row = failed.row()
        assert (row["prediction"], row["confidence"], row["probability"]) == (None, None, None)
        assert row["error"] == error


@pytest.mark.parametrize(
    ("views", "batch", "sizes"),
    [([1] * 9, 1, [4, 4, 1]), ([3, 3, 1], 1, [4, 3]), ([0, 0, 9, 0], 2, [8, 1]), ([0], 2, []), ([], 2, [])],
)
def test_batches_are_full_and_studies_stay_whole(
    views: list[int],
    batch: int,
    sizes: list[int],
    image: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four times --batch-size at once, whatever studies the views are of, and every input has its own views, in order."""
    seen: list[int] = []
    grad_cam = mad.grad_cam
    monkeypatch.setattr(mad, "grad_cam", lambda network, x: seen.append(len(x)) or grad_cam(network, x))
    config = mad.Config(checkpoint=(trained,), device="cpu", batch_size=batch, tta=False)
    inputs = [(Path(str(i)), (image,) * count) for i, count in enumerate(views)]
    results = list(mad.Predictor(config, mad.StopSignals()).results(inputs))
    assert seen == sizes
    assert [(found.path, tuple(view.path for view in found.findings)) for found in results] == inputs


# ----- one input


def test_one_image_gives_a_line_and_a_figure(
    ask: Ask, image: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(image) == mad.EXIT_DONE
    printed = capsys.readouterr()
    expected = probability_of(trained, image)
    label = mad.CLASSES[expected > 0.5]
    assert (
        f"{image}: {label}, confidence {max(expected, 1 - expected):.1%} (probability of abnormal {expected:.4f})"
        in printed.out
    )
    assert "figure: image1_heatmap.png" in printed.out
    assert Image.open("image1_heatmap.png").size == (1155, 451)
    assert printed.err.count(mad.RESEARCH_ONLY) == 1


def test_study_shows_its_views(ask: Ask, studies: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    count = len(list(studies[0].glob("*.png")))
    assert count > 1
    assert ask(studies[0]) == mad.EXIT_DONE
    out = capsys.readouterr().out
    assert f", {count} views)" in out
    assert out.count("\n    image") == count
    assert Image.open(f"{studies[0].name}_heatmap.png").height == pytest.approx(110 * (0.7 + 3.4 * count), abs=2)


def test_figure_goes_where_it_is_wanted(ask: Ask, image: Path) -> None:
    """A file, a new folder above it, and an existing folder."""
    Path("there").mkdir()
    for asked, written in (("a.png", "a.png"), ("new/b.jpg", "new/b.jpg"), ("there", "there/image1_heatmap.png")):
        assert ask(image, "--figure", asked) == mad.EXIT_DONE
        assert Image.open(written).width == 1155


def test_figure_of_an_unknown_kind_is_refused_before_work(
    ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        ask(image, "--figure", "a.txt")
    assert caught.value.code == mad.EXIT_USAGE
    assert "--figure a.txt: use .png" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["abnormal", "normal", "predicted"])
def test_class_that_is_explained(
    choice: str, ask: Ask, image: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panel's heat is relu(evidence) for abnormal, relu(-evidence) for normal, and the label says which."""
    seen: list[Any] = []
    monkeypatch.setattr(mad, "save_explanation", lambda *arguments, **options: seen.append(arguments))
    ask(image, "--cam-class", choice, "--save-cam", "maps.npz", "--figure", "x.png")
    evidence = np.load("maps.npz")[str(image)]
    explained = choice if choice != "predicted" else mad.CLASSES[probability_of(trained, image) > 0.5]
    _, (panel,), heading, label = seen[0]
    np.testing.assert_array_equal(panel.heat, np.maximum(evidence if explained == "abnormal" else -evidence, 0))
    assert label == f"evidence for {explained}, logits"
    assert "XR_" in heading
    assert mad.RESEARCH_ONLY in heading


def test_threshold_decides_the_class(ask: Ask, image: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probability = probability_of(trained, image)
    for threshold, label in ((probability * 0.99, "abnormal"), (min(probability * 1.01, 0.999), "normal")):
        ask(image, "--threshold", threshold, "--output", "r.csv", "--figure", "x.png")
        row = rows_of(Path("r.csv"))[0]
        assert row["prediction"] == label
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-5)
    capsys.readouterr()


def test_threshold_stored_in_the_model_is_used(ask: Ask, image: Path, other: Path, trained: Path) -> None:
    """0.4 of one model, and of two the mean of 0.4 and 0.5."""
    config = mad.Config(checkpoint=(other,))
    assert mad.choose_threshold(config, mad.load_members(config, CPU)) == (
        0.4,
        mad.load_member(other, CPU).threshold_source,
    )
    config = mad.Config(checkpoint=(other, trained))
    assert mad.choose_threshold(config, mad.load_members(config, CPU))[0] == pytest.approx(0.45)
    ours = mad.load_member(other, CPU)
    both = [replace(ours, threshold=value, threshold_source="val") for value in (0.3, 0.6)]
    assert mad.choose_threshold(config, both) == (pytest.approx(0.45), "mixed")  # the best on val for neither
    assert mad.choose_threshold(config, [both[0], both[0]]) == (pytest.approx(0.3), "val")
    assert mad.choose_threshold(mad.Config(threshold=0.3), [])[0] == 0.3


# ----- the same figures as --evaluate


def test_prediction_equals_evaluation(ask: Ask, trained: Path, phantoms: Path, tmp_path: Path) -> None:
    """Study by study the mean of what --evaluate writes for the images of valid/; image by image the same."""
    copy = shutil.copy(trained, tmp_path / "copy.pth")
    assert (
        run_inside(
            "--data-dir",
            phantoms,
            "--evaluate",
            "--checkpoint",
            copy,
            "--bootstrap",
            100,
            "--device",
            "cpu",
            "--precision",
            "fp32",
        )
        == 0
    )
    expected = defaultdict(list)
    for row in rows_of(tmp_path / "copy.valid.csv"):
        expected[row["study"]].append(float(row["probability"]))
    assert ask(phantoms / "valid", "--output", "r.csv", "--batch-size", 1) == mad.EXIT_DONE
    rows = rows_of(Path("r.csv"))
    assert len(rows) == len(expected)
    for row in rows:
        study = Path(row["path"]).relative_to(phantoms / "valid").as_posix()
        assert float(row["probability"]) == pytest.approx(np.mean(expected[study]), abs=1e-5)


def test_batch_size_and_company_do_not_matter(ask: Ask, studies: list[Path]) -> None:
    images = [path for study in studies[:4] for path in sorted(study.glob("*.png"))]
    outcomes = []
    for batch, order in ((1, images), (3, images[::-1]), (64, images)):
        ask(*order, "--output", "r.json", "--batch-size", batch)
        outcomes.append({row["path"]: row["probability"] for row in json.loads(Path("r.json").read_text())})
    for outcome in outcomes[1:]:
        assert outcome == {path: pytest.approx(value, abs=1e-5) for path, value in outcomes[0].items()}


def test_ensemble_is_the_mean_of_calibrated_probabilities(ask: Ask, image: Path, trained: Path, other: Path) -> None:
    """Each member with its own size, fit, normalisation and temperature."""
    ask(image, "--checkpoint", trained, other, "--output", "r.json", "--save-cam", "both.npz")
    singles = [probability_of(path, image) for path in (trained, other)]
    assert abs(singles[0] - singles[1]) > 1e-3
    assert json.loads(Path("r.json").read_text())[0]["probability"] == pytest.approx(np.mean(singles), abs=1e-5)
    maps = []
    for path in (trained, other):
        ask(image, "--checkpoint", path, "--save-cam", "one.npz")
        maps.append(np.load("one.npz")[str(image)])
    np.testing.assert_allclose(np.load("both.npz")[str(image)], np.mean(maps, axis=0), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "averaged"), [([], (True, False)), (["--tta"], (True, True)), (["--no-tta"], (False, False))]
)
def test_mirror_images_are_averaged_where_the_flag_or_else_the_model_says_so(
    ask: Ask, image: Path, trained: Path, other: Path, flags: list[str], averaged: tuple[bool, bool]
) -> None:
    for checkpoint, both in zip((trained, other), averaged, strict=True):
        plain, mirrored = (logit_of(checkpoint, image, [side]) for side in (False, True))
        assert abs(plain - mirrored) > 1e-3
        ask(image, "--checkpoint", checkpoint, *flags, "--output", "r.json", "--figure", "x.png")
        scaled = (plain + both * mirrored) / (1 + both) / mad.load_member(checkpoint, CPU).temperature
        assert json.loads(Path("r.json").read_text())[0]["probability"] == pytest.approx(1 / (1 + np.exp(-scaled)), abs=1e-5)


def test_a_model_of_before_mirror_images_were_kept_has_none(trained: Path, tmp_path: Path) -> None:
    content = mad.read_tensors(trained, "model")
    assert content["tta"] is True
    mad.write_tensors(tmp_path / "old.pth", {k: v for k, v in content.items() if k not in ("format", "version", "tta")})
    assert mad.load_member(tmp_path / "old.pth", CPU).tta is False


def test_tta_turns_the_mirror_image_s_map_back(ask: Ask, image: Path) -> None:
    """An image and its mirror image, at the network's size so that nothing is resampled, get mirrored maps."""
    square = Image.open(image).resize((64, 64))
    square.save("a.png")
    square.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("b.png")
    ask("a.png", "b.png", "--tta", "--save-cam", "both.npz")
    ask("a.png", "--no-tta", "--save-cam", "plain.npz", "--figure", "x.png")
    with np.load("both.npz") as maps, np.load("plain.npz") as plain:
        np.testing.assert_allclose(maps["a.png"], maps["b.png"][:, ::-1], atol=1e-4)
        assert np.abs(maps["a.png"] - plain["a.png"]).max() > 1e-3


def test_raw_maps_have_the_size_of_the_originals(ask: Ask, image: Path, trained: Path, tmp_path: Path) -> None:
    """Keys are the paths; the mean over the network's square input is the logit less the bias."""
    wide = tmp_path / "wide image.png"
    Image.open(image).resize((150, 70)).save(wide)
    ask(image, "wide image.png", "--save-cam", "out/maps.npz")
    with np.load("out/maps.npz") as maps:
        assert set(maps.files) == {str(image), "wide image.png"}
        assert maps["wide image.png"].shape == (70, 150)
        assert maps[str(image)].shape == Image.open(image).size[::-1]
        network = mad.load_member(trained, CPU).network
        heat = float(maps[str(image)].mean())
    assert heat == pytest.approx(logit_of(trained, image) - network.head.bias.item(), abs=0.02 + 0.05 * abs(heat))


# ----- several inputs, some bad


def test_raw_maps_wait_for_their_file_in_little_memory(ask: Ask, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each image only the network's small map is kept: all on their images' pixels are 30 GB for MURA's train/."""
    kept: list[mad.Finding] = []
    write = mad.write_results
    monkeypatch.setattr(
        mad, "write_results", lambda config, rows, found: kept.extend(found.values()) or write(config, rows, found))
    ask(image, "--save-cam", "maps.npz", "--figure", "x.png")
    (finding,) = kept
    assert finding.squares == {}
    assert finding.pixels.strides == (0, 0)  # one byte that stands for all
    assert finding.evidence.shape == np.asarray(Image.open(image)).shape
    assert sum(evidence.numel() for _, evidence, *_ in finding.looks) < 100


def test_every_input_has_one_row(
    ask: Ask, image: Path, studies: list[Path], bad: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, a study and all that can be wrong, in the order given; CSV and JSON say the same."""
    inputs = [
        bad["cut.png"],
        image,
        bad["text.png"],
        bad["missing.png"],
        studies[1],
        bad["empty"],
        bad["zero.png"],
        bad["image1.png"],
    ]
    assert ask(*inputs, "--output", "r.csv") == mad.EXIT_SOME_FAILED
    printed = capsys.readouterr()
    rows = rows_of(Path("r.csv"))
    assert list(rows[0]) == ["path", "prediction", "confidence", "probability", "error"]
    assert [row["path"] for row in rows] == [str(path) for path in inputs]
    assert [bool(row["prediction"]) for row in rows] == [path in (image, studies[1]) for path in inputs]
    assert [bool(row["error"]) for row in rows] == [path not in (image, studies[1]) for path in inputs]
    for path in bad.values():
        assert printed.err.count(f"{path}: ") == 1
        assert f"{path}: " not in printed.out
    assert "Traceback" not in printed.err
    assert printed.err.count(mad.RESEARCH_ONLY) == 1
    assert not list(Path().glob("*heatmap*")), "several inputs make no figures unless --figure asks for them"
    ask(*inputs, "--output", "r.json")
    for row, twin in zip(rows, json.loads(Path("r.json").read_text()), strict=True):
        assert {key: "" if value is None else str(value) for key, value in twin.items()} == row


@pytest.mark.parametrize("name", ["cut.png", "text.png", "zero.png", "empty", "image1.png", "missing.png"])
def test_single_failure_is_exit_1_with_one_line(
    name: str, ask: Ask, bad: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(bad[name], "--output", "r.csv") == mad.EXIT_FAILED
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if str(bad[name]) in line]
    assert len(lines) == 1
    assert len(rows_of(Path("r.csv"))) == 1


def test_study_with_one_bad_view_is_predicted_and_reported(
    ask: Ask, studies: list[Path], bad: dict[str, Path], tmp_path: Path
) -> None:
    """It has a prediction, so it did not fail as a whole: exit 3, also where it is the only input."""
    study = Path(shutil.copytree(studies[0], tmp_path / "study9_positive"))
    shutil.copy(bad["cut.png"], study / "image9.png")
    assert ask(study, "--output", "r.json") == mad.EXIT_SOME_FAILED
    (row,) = json.loads(Path("r.json").read_text())
    assert row["prediction"] in mad.CLASSES
    assert row["error"].startswith("image9.png: ")
    ask(studies[0], "--output", "whole.json")
    assert row["probability"] == pytest.approx(json.loads(Path("whole.json").read_text())[0]["probability"], abs=1e-5)


def test_directory_named_like_an_image_inside_a_folder(ask: Ask, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "image2.png").mkdir(parents=True)
    shutil.copy(image, folder / "image1.png")
    assert ask(folder, "--output", "r.csv") == mad.EXIT_SOME_FAILED
    assert [row["error"] for row in rows_of(Path("r.csv"))] == ["", "a folder, not an image"]


def test_figures_of_several_inputs_fill_a_folder(
    ask: Ask, image: Path, studies: list[Path], bad: dict[str, Path]
) -> None:
    """Numbered like the inputs, so that equal names do not overwrite each other; none for what failed."""
    assert ask(image, bad["cut.png"], image, studies[1], "--figure", "figures") == mad.EXIT_SOME_FAILED
    names = sorted(path.name for path in Path("figures").iterdir())
    assert names == ["0001_image1_heatmap.png", "0003_image1_heatmap.png", f"0004_{studies[1].name}_heatmap.png"]
    assert collected(Path("figures"), root=Path()) == [("figures", [], "holds no images that may be read")]


def test_file_as_folder_of_figures_is_refused(ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file")
    for name in ("one.png", "taken"):
        assert ask(image, image, "--figure", name) == mad.EXIT_USAGE
        assert capsys.readouterr().err.strip().endswith(f"--figure {name}: is to be a folder for several inputs")


def test_very_many_views_are_not_all_drawn(
    ask: Ask, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder called study1_all may hold hundreds of images: all count, a figure shows the first."""
    monkeypatch.setattr(mad, "FIGURE_ROWS", 2)
    folder = tmp_path / "study1_all"
    folder.mkdir()
    for i in range(1, 6):
        shutil.copy(image, folder / f"image{i}.png")
    assert ask(folder) == mad.EXIT_DONE
    assert "(the first 2 of 5 views)" in capsys.readouterr().out
    assert Image.open("study1_all_heatmap.png").height == pytest.approx(110 * (0.7 + 3.4 * 2), abs=2)


def test_coloured_picture_is_predicted_and_warned_about(
    ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    Image.fromarray((random.integers(0, 255, (80, 80, 3)) * (1, 0.2, 0.1)).astype(np.uint8)).save("holiday.png")
    assert ask("holiday.png", image, "--output", "r.csv") == mad.EXIT_DONE
    err = capsys.readouterr().err
    assert err.count("does not look like a radiograph") == 1
    assert "holiday.png: does not look like a radiograph (strongly coloured)" in err
    assert all(row["prediction"] and not row["error"] for row in rows_of(Path("r.csv")))


@pytest.mark.parametrize(
    "name", ["has space & $dollar$.png", "Röntgen 骨.png", 'quote"s, comma.png', "line\nbreak.png", "-dash.png"]
)
def test_odd_names(name: str, ask: Ask, image: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    shutil.copy(image, path)
    assert ask(path, "--output", "r.csv") == mad.EXIT_DONE
    assert rows_of(Path("r.csv"))[0]["path"] == str(path)
    assert (tmp_path / f"{path.stem}_heatmap.png").exists()


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_name_that_is_no_text_keeps_its_bytes(ask: Ask, image: Path) -> None:
    name = os.fsdecode(b"R\xf6ntgen.png")  # Latin-1, as on old archives
    shutil.copy(image, name)
    assert ask(name, image, "--output", "r.csv", "--figure", "figures") == mad.EXIT_DONE
    assert b"\nR\xf6ntgen.png," in Path("r.csv").read_bytes()
    assert ask(name, image, "--output", "r.json", "--save-cam", "r.npz") == mad.EXIT_DONE
    assert json.loads(Path("r.json").read_text())[0]["path"] == name
    assert r"R\udcf6ntgen.png" in np.load("r.npz")


def test_name_without_room_for_an_ending_is_cut(ask: Ask, image: Path) -> None:
    name = "x" * 250 + ".png"
    shutil.copy(image, name)
    assert ask(name, "--figure", "f.png", "--save-cam", "f.npz") == mad.EXIT_DONE
    assert ask(name) == mad.EXIT_DONE
    assert ask(name, image, "--figure", "figures") == mad.EXIT_DONE
    assert len(list(Path().glob("x*~x*_heatmap.png"))) == 1
    assert len(list(Path("figures").iterdir())) == 2


def test_unwritable_output_is_one_line(ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the work, not after it."""
    Path("file").write_text("in the way")
    Path("folder.npz").mkdir()
    for flag, name in (("--output", "file/r.csv"), ("--save-cam", "folder.npz")):
        assert ask(image, flag, name) == mad.EXIT_FAILED
        said = capsys.readouterr()
        assert f"{name}: cannot be written" in said.err.splitlines()[-1]
        assert not said.out


def test_an_input_is_never_written_over(ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(image, "scan.png")
    shutil.copy(image, "scan.csv")
    before = image.read_bytes()
    for arguments in (["scan.png", "--figure", "./scan.png"], ["scan.csv", "--output", "scan.csv"]):
        assert ask(*arguments) == mad.EXIT_USAGE
        assert f"{arguments[1]} {arguments[2].removeprefix('./')}: is an input" in capsys.readouterr().err.splitlines()[-1]
    assert Path("scan.png").read_bytes() == Path("scan.csv").read_bytes() == before


def test_links_in_a_circle_are_unreadable_inputs(ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").symlink_to("b.png")
    Path("b.png").symlink_to("a.png")
    assert ask("a.png") == mad.EXIT_FAILED
    assert ask("a.png", image, "--output", "r.csv", "--figure", "figures") == mad.EXIT_SOME_FAILED
    assert capsys.readouterr().err.count("a.png: too many levels of symbolic links") == 2
    assert [bool(row["error"]) for row in rows_of(Path("r.csv"))] == [True, False]


def test_maps_of_an_image_of_any_name(ask: Ask, image: Path) -> None:
    for name in ("file", "allow_pickle"):
        shutil.copy(image, name)
    assert ask("file", "allow_pickle", "--save-cam", "maps.npz") == mad.EXIT_DONE
    with np.load("maps.npz") as maps:
        assert set(maps) == {"file", "allow_pickle"}
        assert maps["file"].shape == Image.open(image).size[::-1]


def test_rows_are_kept_where_stdout_fails(ask: Ask, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a full disk behind `>` does."""
    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mad, "say", full)
    assert ask(image, "--output", "r.csv") == mad.EXIT_FAILED
    assert len(rows_of(Path("r.csv"))) == 1


def test_linked_folders_are_searched_once_and_closed_ones_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("top/ward", "elsewhere/study1_negative", "top/closed"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("top/x.png", "elsewhere/study1_negative/image1.png", "top/closed/y.png"):
        (tmp_path / name).touch()
    (tmp_path / "top" / "ward" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "top", target_is_directory=True)
    scan = os.scandir

    def scandir(folder: Any) -> Any:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    found = {str(path.relative_to(tmp_path)): len(views) for path, views in mad.collect_inputs([tmp_path / "top"])}
    assert found == {"top/x.png": 1, "top/ward/link/study1_negative": 1, "top/closed": 0}


def test_checkpoint_that_is_missing_or_something_else(
    ask: Ask, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.pth").write_bytes(b"something else")
    for name, reason in (("gone.pth", "cannot be read"), ("other.pth", "is not a checkpoint of this program")):
        assert ask(image, "--checkpoint", name) == mad.EXIT_USAGE
        assert f"{name}: {reason}" in capsys.readouterr().err.splitlines()[-1]


# ----- export


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the tiny model in both formats; returns the folder."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("tiny.pt2", "tiny.onnx"):
        assert run_inside("--export", folder / name, "--checkpoint", trained) == 0
    return folder


def grey(count: int) -> torch.Tensor:
    """Draw images in the range that an exported network expects."""
    return torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["tiny.pt2", "tiny.onnx"])
def test_exported_network_agrees_with_torch(name: str, count: int, exported: Path, trained: Path) -> None:
    """Run as a stranger would, with nothing of this program."""
    images = grey(count)
    if name.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(exported / name))
        (output,) = session.run(["probability"], {"images": images.numpy()})
    else:
        output = torch.export.load(exported / name).module()(images).numpy()
    member = mad.load_member(trained, CPU)
    with torch.inference_mode():
        sides = [member.network(member.normalization(side)).numpy() for side in (images, images.flip(3))]
    expected = mad.sigmoid(np.mean(sides, axis=0), member.temperature)
    assert output.shape == (count,)
    np.testing.assert_allclose(output, expected, atol=1e-4)


def test_exported_file_says_how_to_use_it(exported: Path, trained: Path) -> None:
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(exported / "tiny.onnx").metadata_props}
    files = {"about.json": ""}
    torch.export.load(exported / "tiny.pt2", extra_files=files)
    about = json.loads(files["about.json"])
    member = mad.load_member(trained, CPU)
    for text in (metadata, about):
        assert text["input"] == "grey, float32 (batch, 1, 64, 64), 0 black to 1 white, fit: stretch"
        assert float(text["temperature"]) == member.temperature
        assert float(text["threshold"]) == member.threshold
        assert (text["architecture"], text["tta"]) == ("resnet50", "True")
        assert text["use"] == mad.RESEARCH_ONLY
        assert "image" in text["normalization"]


def test_deployed_contains_normalisation_and_temperature(other: Path, image: Path) -> None:
    member = mad.load_member(other, CPU)
    square = torch.from_numpy(mad.fit_square(mad.read_radiograph(image), 96, "letterbox"))[None, None].float() / 255
    with torch.inference_mode():
        assert float(mad.Deployed(member)(square)) == pytest.approx(probability_of(other, image), abs=1e-6)


def test_export_heeds_the_other_flags(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inside("--export", tmp_path / "x.pt2", "--checkpoint", trained, "--threshold", "0.3", "--no-tta") == 0
    files, images, member = {"about.json": ""}, grey(2), mad.load_member(trained, CPU)
    network = torch.export.load(tmp_path / "x.pt2", extra_files=files).module()
    about = json.loads(files["about.json"])
    assert (about["threshold"], about["tta"]) == ("0.3", "False")
    with torch.inference_mode():
        expected = mad.sigmoid(member.network(member.normalization(images)).numpy(), member.temperature)
    np.testing.assert_allclose(network(images).numpy(), expected, atol=1e-4)
    assert run_inside("--export", tmp_path / "y.pt2", "--checkpoint", trained, "--model", "densenet169") == mad.EXIT_USAGE
    assert "--model says densenet169" in capsys.readouterr().err
    assert not (tmp_path / "y.pt2").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_package_is_named(
    package: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run_inside("--export", tmp_path / "x.onnx", "--checkpoint", trained) == mad.EXIT_USAGE
    assert capsys.readouterr().err.count("pip install onnx onnxscript onnxruntime") == 1
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("gap", [2e-4, float("nan")])
def test_export_that_differs_is_removed(
    gap: float, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mad.run_pt2
    monkeypatch.setattr(mad, "run_pt2", lambda content, images: run(content, images) + gap)
    assert run_inside("--export", tmp_path / "x.pt2", "--checkpoint", trained) == mad.EXIT_FAILED
    assert "differs by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
