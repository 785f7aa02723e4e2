"""Section 12, phantoms: what is drawn, where the lesion lies, and the MURA layout on disk."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mura_anomaly_detection as mad

PARTS = tuple(mad.PHANTOM_BONES)
LOCAL = ("lytic", "hardware")  # a fracture also tilts the fragment as far as its joint


def twins(seed: int, part: str, kind: str, size: int = 160) -> tuple[np.ndarray, np.ndarray, mad.Lesion]:
    """Return a normal image, the same one with a lesion, and the lesion."""
    normal, none = mad.draw_phantom(np.random.default_rng(seed), False, size, part)
    abnormal, lesion = mad.draw_phantom(np.random.default_rng(seed), True, size, part, kind)
    assert none is None
    assert lesion is not None
    return normal, abnormal, lesion


def inside(shape: tuple[int, ...], box: tuple[int, int, int, int], margin: int = 0) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros(shape, bool)
    mask[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
    return mask


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mad.write_phantoms(tmp_path_factory.mktemp("phantoms"), 14, 8, PARTS, seed=3, size=64)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- one image ------------------------------------------------------------------------------------------------------
def test_same_seed_same_image_and_other_seed_another() -> None:
    first, second, other = (mad.draw_phantom(np.random.default_rng(seed), True, 96) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[0].shape != other[0].shape or not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("size", [64, 256])
def test_image_is_grey_bytes_upright_and_uses_the_range(size: int) -> None:
    image, _ = mad.draw_phantom(np.random.default_rng(0), False, size)
    assert image.dtype == np.uint8
    assert image.ndim == 2
    assert image.shape[0] == size
    assert 0.7 * size <= image.shape[1] <= 0.9 * size
    assert np.percentile(image, 95) - np.percentile(image, 5) > 60  # bone against air


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", mad.LESIONS)
def test_box_lies_inside_the_image_and_is_visible_but_small(part: str, kind: str) -> None:
    for seed in range(12):
        _, abnormal, lesion = twins(seed, part, kind)
        left, top, right, bottom = lesion.box
        assert lesion.kind == kind
        assert 0 <= left < right <= abnormal.shape[1]
        assert 0 <= top < bottom <= abnormal.shape[0]
        assert 0.003 < (right - left) * (bottom - top) / abnormal.size < 0.35


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", LOCAL)
def test_twins_differ_only_at_the_lesion(part: str, kind: str) -> None:
    for seed in range(12):
        normal, abnormal, lesion = twins(seed, part, kind)
        changed = np.abs(normal.astype(int) - abnormal) > 2
        assert not changed[~inside(changed.shape, lesion.box, margin=3)].any()  # the blur reaches 3 pixels
        assert changed[inside(changed.shape, lesion.box)].mean() > 0.2


@pytest.mark.parametrize("part", PARTS)
def test_fracture_changes_its_site_most_and_nothing_on_the_far_side_of_it(part: str) -> None:
    for seed in range(12):
        normal, abnormal, lesion = twins(seed, part, "fracture")
        change = np.abs(normal.astype(int) - abnormal)
        site = inside(change.shape, lesion.box)
        assert change[site].mean() > 4 * change[~site].mean()
        assert change[: max(lesion.box[1] - 3, 0)].max(initial=0) <= 2  # the limb hangs down: the joint is below


def test_lytic_lesion_is_darker_and_hardware_brighter_than_the_bone() -> None:
    for kind, sign in (("lytic", -1), ("hardware", 1)):
        for seed in range(8):
            normal, abnormal, lesion = twins(seed, "XR_HUMERUS", kind)
            change = (abnormal.astype(int) - normal)[inside(normal.shape, lesion.box)]
            assert (change * sign).mean() > 5
            assert (change * sign).min() >= -2


def test_side_marker_is_no_cue() -> None:
    """Marker, exposure and grain belong to the part of the draw that normal and abnormal share."""
    for seed in range(12):
        normal, abnormal, lesion = twins(seed, "XR_WRIST", "lytic", size=96)
        beside = ~inside(normal.shape, lesion.box, margin=3)
        assert np.array_equal(normal[beside] > 200, abnormal[beside] > 200)


def test_every_kind_occurs_when_none_is_asked_for() -> None:
    drawn = {mad.draw_phantom(np.random.default_rng(seed), True, 48)[1].kind for seed in range(30)}  # type: ignore[union-attr]
    assert drawn == set(mad.LESIONS)


# ---- a data set -----------------------------------------------------------------------------------------------------
def test_lists_name_exactly_the_files_on_disk(root: Path) -> None:
    for split in ("train", "valid"):
        on_disk = {str(path.relative_to(root.parent)) for path in (root / split).rglob("*.png")}
        listed = [path for (path,) in rows(root / f"{split}_image_paths.csv")]
        assert sorted(listed) == sorted(on_disk)
        labels = dict(rows(root / f"{split}_labeled_studies.csv"))
        assert set(labels) == {f"{Path(path).parent}/" for path in listed}
        for study, label in labels.items():
            assert study.endswith({"0": "_negative/", "1": "_positive/"}[label])


def test_counts_views_and_classes(root: Path) -> None:
    for split, count in (("train", 14), ("valid", 8)):
        studies = rows(root / f"{split}_labeled_studies.csv")
        assert len(studies) == count * len(PARTS)
        assert sum(label == "1" for _, label in studies) == count * len(PARTS) // 2
        for study, _ in studies:
            views = sorted(path.name for path in (root.parent / study).iterdir())
            assert views == [f"image{view}.png" for view in range(1, len(views) + 1)]
            assert 1 <= len(views) <= 3


def test_patients_are_disjoint_recur_across_parts_and_may_return(root: Path) -> None:
    parts_of: dict[str, dict[str, set[str]]] = {split: defaultdict(set) for split in ("train", "valid")}
    for split, parts in parts_of.items():
        for patient in (root / split).glob("XR_*/patient*"):
            parts[patient.name].add(patient.parent.name)
            assert len(patient.name) == len("patient00001")
    assert not parts_of["train"].keys() & parts_of["valid"].keys()
    assert any(len(parts) > 1 for parts in parts_of["train"].values())
    assert any(len(list(patient.iterdir())) == 2 for patient in root.glob("train/XR_*/patient*"))


def test_lesion_list_covers_the_abnormal_images_with_one_kind_a_study(root: Path) -> None:
    header, *lesions = rows(root / "phantoms.csv")
    assert header == ["path", "kind", "left", "top", "right", "bottom"]
    abnormal = root.glob("*/XR_*/patient*/*_positive/*.png")
    assert {row[0] for row in lesions} == {str(path.relative_to(root.parent)) for path in abnormal}
    kinds = defaultdict(set)
    for path, kind, *box in lesions:
        kinds[Path(path).parent].add(kind)
        with Image.open(root.parent / path) as image:
            left, top, right, bottom = map(int, box)
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height
            assert image.mode == "L"
    assert all(len(kind) == 1 for kind in kinds.values())


def test_writing_is_deterministic_and_the_order_of_parts_does_not_matter(tmp_path: Path) -> None:
    first, again, other = (
        contents(mad.write_phantoms(tmp_path / name, 4, 2, PARTS[:2], seed=seed, size=32))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == again
    assert first != other
    backwards = mad.write_phantoms(tmp_path / "d", 4, 2, PARTS[1::-1], seed=5, size=32)
    common = {name: data for name, data in contents(backwards).items() if name in first and name.endswith(".png")}
    assert common
    assert all(first[name] == data for name, data in common.items())


def test_an_image_depends_on_its_path_and_seed_alone(tmp_path: Path) -> None:
    """The same study in a larger data set, drawn in another turn, shows the same picture."""
    small = contents(mad.write_phantoms(tmp_path / "small", 6, 2, PARTS[:1], seed=1, size=32))
    large = contents(mad.write_phantoms(tmp_path / "large", 12, 2, PARTS[:1], seed=1, size=32))
    common = [name for name in small if name.endswith(".png") and name in large]
    assert common
    assert all(small[name] == large[name] for name in common)
