"""Block 11, phantoms: what is drawn, where the lesion lies, and MURA's layout on disk."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mura_anomaly_detection as mad

PARTS = tuple(mad.PHANTOM_BONES)
LOCAL = ("lytic", "hardware")  # a fracture also displaces the bone below it


def draw(seed: int, size: int = 96, part: str = "XR_FOREARM", kind: str = ""):
    return mad.draw_phantom(np.random.default_rng(seed), size, part, kind)


def twins(seed: int, part: str, kind: str, size: int = 128):
    """Return a normal image as integers, the same with a lesion, and the lesion's box."""
    normal, no_box = draw(seed, size, part)
    abnormal, box = draw(seed, size, part, kind)
    assert no_box is None
    assert box is not None
    return normal.astype(int), abnormal.astype(int), box


def mask_of(shape: tuple[int, ...], box: tuple[int, int, int, int], margin: int = 0) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros(shape, bool)
    mask[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
    return mask


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mad.write_phantoms(tmp_path_factory.mktemp("phantoms"), 14, 8, PARTS, seed=3, size=64)


# ---- one image -----------------------------------------------------------------------------
def test_equal_seeds_give_equal_images_and_others_do_not() -> None:
    first, again, other = (draw(seed, kind="lytic") for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(("seed", "kind", "shape", "total"), [
    (0, "fracture", (64, 56), 283435),
    (1, "lytic", (64, 54), 233586),
    (2, "hardware", (64, 56), 231451),
])
def test_a_seed_shows_the_same_on_every_machine(seed, kind, shape, total) -> None:
    """Totals of other phantoms were the same with NumPy 1.26 and 2.4 and with Pillow 11 and 13."""
    image, _ = draw(seed, 64, "XR_FOREARM", kind)
    assert image.shape == shape
    assert abs(int(image.sum()) - total) <= 50  # a lead letter alone is more than 5000


@pytest.mark.parametrize("size", [64, 256])
def test_image_is_upright_grey_bytes_and_uses_the_range(size: int) -> None:
    image, _ = draw(0, size)
    height, width = image.shape
    assert image.dtype == np.uint8
    assert height == size
    assert 0.7 * size <= width <= 0.9 * size
    assert np.percentile(image, 95) - np.percentile(image, 5) > 60  # bone against air


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", mad.LESIONS)
def test_box_lies_inside_the_image_and_is_small(part: str, kind: str) -> None:
    for seed in range(5):
        image, (left, top, right, bottom) = draw(seed, 96, part, kind)
        assert 0 <= left < right <= image.shape[1]
        assert 0 <= top < bottom <= image.shape[0]
        assert 0.003 < (right - left) * (bottom - top) / image.size < 0.35


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", LOCAL)
def test_twins_differ_at_the_lesion_alone(part: str, kind: str) -> None:
    for seed in range(4):
        normal, abnormal, box = twins(seed, part, kind)
        changed = np.abs(normal - abnormal) > 2
        assert not changed[~mask_of(changed.shape, box, margin=4)].any()  # blur and rotation
        assert changed[mask_of(changed.shape, box)].mean() > 0.2


@pytest.mark.parametrize("part", PARTS)
def test_fracture_changes_its_box_most_and_below_but_nothing_above(part: str) -> None:
    for seed in range(4):
        normal, abnormal, box = twins(seed, part, "fracture")
        change = np.abs(normal - abnormal)
        site = mask_of(change.shape, box)
        assert change[site].mean() > 4 * change[~site].mean()
        assert change[: box[1] - 4].max() <= 2
        assert change[box[3] + 2 :].max() > 20  # the fragment below is displaced


def test_fragments_are_displaced_to_either_side() -> None:
    sides = set()
    for seed in range(8):
        normal, abnormal, box = twins(seed, "XR_HUMERUS", "fracture", size=64)
        change = (abnormal - normal)[box[3] :]
        columns = np.arange(change.shape[1])
        gained, lost = change.clip(0), (-change).clip(0)
        gained_at = (gained @ columns).sum() / gained.sum()
        lost_at = (lost @ columns).sum() / lost.sum()
        sides.add("right" if gained_at > lost_at else "left")
    assert sides == {"left", "right"}


def test_lytic_lesions_are_darker_and_hardware_is_brighter_than_the_bone() -> None:
    for kind, sign in (("lytic", -1), ("hardware", 1)):
        for seed in range(4):
            normal, abnormal, box = twins(seed, "XR_HUMERUS", kind)
            change = sign * (abnormal - normal)[mask_of(normal.shape, box)]
            assert change.mean() > 5
            assert change.min() >= -2


def test_lesions_occur_in_either_shaft_and_on_either_side_of_it() -> None:
    boxes = [draw(seed, 64, "XR_FOREARM", "hardware")[1] for seed in range(20)]
    middles = np.array([(left + right) / 2 for left, _, right, _ in boxes])
    assert middles.max() - middles.min() > 15  # the shafts are 0.4 half heights apart: 13 pixels


def test_another_kind_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def sclerosis(rng, along, across):
        return mad.Change(metal=1.0 * (np.hypot(along, across) < 0.5))

    monkeypatch.setitem(mad.LESIONS, "sclerosis", sclerosis)
    normal, abnormal, (left, top, right, bottom) = twins(0, "XR_HUMERUS", "sclerosis", size=200)
    assert (abnormal - normal)[(top + bottom) // 2, (left + right) // 2] > 20
    assert abs((right - left) - (bottom - top)) <= 2  # a disc of half the bone's width ...
    assert 0.85 * 16.5 - 2 <= right - left <= 1.15 * 16.5 + 2  # ... that is 0.165 half heights


# ---- a data set ----------------------------------------------------------------------------
def test_counts_of_studies_classes_and_views(root: Path) -> None:
    views_of: dict[str, set[int]] = {"negative": set(), "positive": set()}
    for split, count in (("train", 14), ("valid", 8)):
        for part in PARTS:
            studies = list((root / split / part).glob("patient*/study*"))
            labels = [study.name.partition("_")[2] for study in studies]
            assert sorted(labels) == sorted([*views_of] * (count // 2))
            for study, label in zip(studies, labels, strict=True):
                views = sorted(path.name for path in study.iterdir())
                assert views == [f"image{view}.png" for view in range(1, len(views) + 1)]
                views_of[label].add(len(views))
    assert set(map(frozenset, views_of.values())) == {frozenset({1, 2, 3})}  # it tells nothing


def test_a_second_study_is_of_a_patient_who_has_a_first(tmp_path: Path) -> None:
    """Also where it is the last one that is asked for."""
    root = mad.write_phantoms(tmp_path, 5, 10, ("XR_FOREARM",), size=64)
    for split, studies in (("train", [1, 1, 1, 2]), ("valid", [1, 1, 1, 2] * 2)):
        patients = sorted((root / split / "XR_FOREARM").iterdir())
        found = [sorted(path.name[:6] for path in patient.iterdir()) for patient in patients]
        assert found == [["study1", "study2"][:count] for count in studies]


def test_patients_are_disjoint_recur_across_body_parts_and_may_return(root: Path) -> None:
    parts_of: dict[str, dict[str, set[str]]] = {"train": {}, "valid": {}}
    for split, parts in parts_of.items():
        for patient in (root / split).glob("XR_*/patient*"):
            parts.setdefault(patient.name, set()).add(patient.parent.name)
            assert len(patient.name) == len("patient00001")
    assert not parts_of["train"].keys() & parts_of["valid"].keys()
    sizes = {len(parts) for parts in parts_of["train"].values()}
    assert min(sizes) == 1 < max(sizes)
    studies = [sorted(path.name[:6] for path in patient.iterdir())
               for patient in root.glob("train/XR_*/patient*")]
    assert ["study1"] in studies
    assert ["study1", "study2"] in studies
    assert all(names in (["study1"], ["study1", "study2"]) for names in studies)


def test_phantom_list_covers_the_abnormal_images_with_one_kind_a_study(root: Path) -> None:
    header, *lesions = rows(root / "phantoms.csv")
    assert header == ["path", "kind", "left", "top", "right", "bottom"]
    abnormal = root.glob("*/XR_*/patient*/*_positive/*.png")
    assert sorted(row[0] for row in lesions) == sorted(
        path.relative_to(root.parent).as_posix() for path in abnormal)
    kinds = defaultdict(set)
    for path, kind, *box in lesions:
        kinds[path.rpartition("/")[0]].add(kind)
        with Image.open(root.parent / path) as image:
            left, top, right, bottom = map(int, box)
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height
            assert image.mode == "L"
    assert all(len(kind) == 1 for kind in kinds.values())
    assert set.union(*kinds.values()) == set(mad.LESIONS)


def test_lesion_boxes_are_those_of_the_abnormal_images_of_valid(root: Path) -> None:
    boxes = mad.read_lesion_boxes(root)
    assert boxes.keys() == set((root / "valid").glob("XR_*/patient*/*_positive/*.png"))
    for path, kind, *box in rows(root / "phantoms.csv")[1:]:
        if "/valid/" in path:
            assert boxes[root.parent / path] == tuple(map(int, box)), kind


def test_boxes_on_disk_are_where_the_metal_is(root: Path) -> None:
    lesions = [row for row in rows(root / "phantoms.csv") if row[1] == "hardware"]
    assert len(lesions) > 5
    for path, _, *box in lesions:
        with Image.open(root.parent / path) as file:
            image = np.asarray(file).astype(int)
        inside = mask_of(image.shape, tuple(map(int, box)))
        assert np.percentile(image[inside], 90) > np.percentile(image[~inside], 90) + 30


def test_writing_is_deterministic_and_the_seed_decides_the_pixels(tmp_path: Path) -> None:
    first, again, other = (
        contents(mad.write_phantoms(tmp_path / name, 4, 2, PARTS[:2], seed=seed, size=32))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.endswith(".png"))


def test_an_image_depends_on_its_path_and_the_seed_alone(tmp_path: Path) -> None:
    """The same study in a larger data set, drawn in another turn, shows the same picture."""
    small = contents(mad.write_phantoms(tmp_path / "small", 6, 2, PARTS[:1], seed=1, size=32))
    large = contents(mad.write_phantoms(tmp_path / "large", 12, 2, PARTS[:2], seed=1, size=32))
    images = [name for name in small if name.endswith(".png")]
    assert images
    assert all(small[name] == large[name] for name in images)
    assert len({small[name] for name in images}) == len(images)


def test_the_pointing_game_by_hand() -> None:
    """Peak and three quarters of the heat of one image lie in its box, nothing of another's."""
    box, heat = (6, 1, 8, 3), np.zeros((4, 10), np.float32)
    heat[1, 6], heat[2, 7], heat[3, 0] = 2, 1, 1
    results, boxes = [], {}
    for name, cam in (("a.png", heat), ("b.png", heat[:, ::-1])):
        path = Path(name)
        view = mad.ViewResult(path, np.zeros((4, 10), np.uint8), 0.9, cam)
        results.append(mad.Study(path, [path], views=[view]))
        boxes[path] = box
    text = mad.pointing_game(results, boxes)
    assert "in 50% of 2 abnormal images" in text
    assert "38% of the heat in it (by chance 10%)" in text


def test_an_unfinished_folder_is_known_as_one_of_phantoms(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        mad.write_phantoms(tmp_path, 1, 1, ("XR_TAIL",), size=32)
    assert (tmp_path / "MURA-v1.1" / mad.PHANTOM_LIST).exists()
