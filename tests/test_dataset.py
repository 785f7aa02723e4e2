"""Block 4, data set: scan, labels CSV, split by patient, cache, MuraDataset, duplicates."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_inside, thin_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import mura_anomaly_detection as mura

SIZE = 64
STUDY = "XR_ELBOW/patient00001/study1_positive"
Names = Sequence[str]


# ---- what the tests are made of ---------------------------------------------------------------
def plant(root: Path, paths: Iterable[str]) -> Path:
    """Make empty files: names with an image's suffix are believed, so scanning opens none."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8)).save(path, format="png")
    return path


def write_dicom(path: Path) -> Path:
    """Write an X-ray of 150 x 90 pixels, a gradient."""
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.Dataset()
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    header.Rows, header.Columns, header.SamplesPerPixel = 150, 90, 1
    header.BitsAllocated = header.BitsStored = 8
    header.HighBit, header.PixelRepresentation, header.PhotometricInterpretation = (
        7,
        0,
        "MONOCHROME2",
    )
    header.PixelData = np.arange(150, dtype=np.uint8).repeat(90).tobytes()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, header, enforce_file_format=True)
    return path


def small_set(root: Path, patients: int = 4, parts: Names = ("XR_HAND", "XR_KNEE")) -> Path:
    """Make a training folder of two images a patient, all different."""
    for number, (part, patient) in enumerate((part, i) for part in parts for i in range(patients)):
        study = f"{part}/patient{part[-1]}{patient}/study1_{('negative', 'positive')[patient % 2]}"
        for view in (1, 2):
            picture(root / "train" / study / f"image{view}.png", 10 * number + view)
    return root


def names(scan: mura.Scan) -> list[str]:
    return [record.name for record in scan.records]


def notes(scan: mura.Scan) -> list[str]:
    """Return the notes of a scan without the folder that each begins with."""
    assert all(note.startswith(f"{scan.folder}: ") for note in scan.notes)
    return [note.removeprefix(f"{scan.folder}: ") for note in scan.notes]


def plain(path: Path | str, size: int = SIZE) -> np.ndarray:
    """What the pixels must be: Pillow's own decoding and resizing of a grey image."""
    with Image.open(path) as image:
        scaled = image.convert("L").resize(
            (size, size), Image.Resampling.BILINEAR, reducing_gap=3.0
        )
        return np.asarray(scaled)


def decoded(root: Path, tasks: Names = (), resize: str = "stretch", size: int = SIZE,
            split: str = "train") -> list[mura.CachedImage]:
    """Return the decoded images of a split, cached in the folder `cache` beside the data."""
    scan = mura.scan_split(root, split, tasks)
    return mura.decode_scan(scan, size, resize, root.parent / "cache", 2)


def files_of(images: Iterable[mura.CachedImage]) -> list[Path]:
    return sorted({image.path for image in images})


def errors_of(images: Iterable[mura.CachedImage]) -> dict[str, str]:
    return {image.record.name: image.error for image in images if image.error}


def everything(dataset: mura.MuraDataset) -> np.ndarray:
    return dataset.batch(np.arange(len(dataset)))[:, 0].numpy()


def require_right(dataset: mura.MuraDataset) -> None:
    """Check every pixel against Pillow, so that no image has a neighbour's."""
    for record, pixels in zip(dataset.records, everything(dataset), strict=True):
        np.testing.assert_array_equal(pixels, plain(record.path), err_msg=record.name)


def one_line(error: pytest.ExceptionInfo[mura.UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_set(tmp_path / "MURA-v1.1")


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that have been decoded since the test began."""
    paths: list[Path] = []
    read = mura.read_radiograph

    def counting(path: Path) -> mura.Radiograph:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(mura, "read_radiograph", counting)
    return paths


# ---- the folder -------------------------------------------------------------------------------
@pytest.mark.parametrize("nesting", ["", "MURA-v1.1", "archive/MURA-v1.1"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_folder_may_be_a_parent_up_to_two_levels_above(
    nesting: str, split: str, tmp_path: Path
) -> None:
    root = plant(tmp_path / nesting, [f"{split}/{STUDY}/image1.png"])
    assert mura.find_data_root(tmp_path) == root


def test_what_macos_adds_to_an_archive_is_not_taken_for_the_data(tmp_path: Path) -> None:
    plant(
        tmp_path,
        [
            f"__MACOSX/MURA-v1.1/train/{STUDY}/._image1.png",
            f".Trash/MURA-v1.1/train/{STUDY}/image1.png",
            f"mura/MURA-v1.1/train/{STUDY}/image1.png",
        ],
    )
    assert mura.find_data_root(tmp_path) == tmp_path / "mura" / "MURA-v1.1"


@pytest.mark.parametrize("inside", [[], ["images/image1.png"], ["a/b/c/train/x.png"], ["train"]])
def test_folder_without_the_layout_is_refused_by_name(inside: list[str], tmp_path: Path) -> None:
    plant(tmp_path, inside)
    begin = f"^{re.escape(str(tmp_path))}: no such folder, or neither it nor a folder in it"
    with pytest.raises(mura.UserError, match=begin) as error:
        mura.find_data_root(tmp_path)
    assert error.value.exit_code == mura.EXIT_USAGE


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_missing_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    plant(tmp_path, ["file"])
    with pytest.raises(mura.UserError, match=rf"{name}: no such folder, .*; --data-dir wants"):
        mura.find_data_root(tmp_path / name)


# ---- the scan ---------------------------------------------------------------------------------
def test_a_record_knows_its_place(tmp_path: Path) -> None:
    scan = mura.scan_split(plant(tmp_path, [f"train/{STUDY}/image1.png"]), "train")
    path = str(tmp_path / "train" / STUDY / "image1.png")
    assert scan.records == (
        mura.ImageRecord(path, f"{STUDY}/image1.png", "XR_ELBOW", "patient00001", STUDY, 1),)
    assert (scan.split, scan.folder, scan.notes) == ("train", tmp_path / "train", ())
    assert not scan.is_mura


def test_phantoms_are_found_and_are_not_mura(phantoms: Path) -> None:
    for split in ("train", "valid"):
        scan = mura.scan_split(phantoms, split)
        files = (phantoms / split).rglob("*.png")
        assert sorted(names(scan)) == sorted(
            path.relative_to(phantoms / split).as_posix() for path in files)
        assert all(record.study.endswith(("negative", "positive")[record.label])
                   for record in scan.records)
        assert scan.notes == ()
        assert not scan.is_mura  # so the paper's results do not stand beside theirs


@pytest.mark.parametrize(("split", "count"), [("train", 36_808), ("valid", 3_197)])
def test_muras_own_lists_are_known_as_mura(split: str, count: int, tmp_path: Path) -> None:
    """By the number of images in them, wherever a copy of MURA lies, and with any of them missing."""
    plant(tmp_path, [f"{split}/{STUDY}/image1.png"])
    lines = [f"MURA-v1.1/{split}/{STUDY}/image{number}.png\n" for number in range(1, count + 1)]
    for listed, is_mura in ((lines, True), (lines[:-1], False), (lines[:1], False)):
        (tmp_path / f"{split}_image_paths.csv").write_text("".join(listed))
        assert mura.scan_split(tmp_path, split).is_mura is is_mura


def test_any_body_part_of_the_layout_is_taken_and_nothing_else(tmp_path: Path) -> None:
    folders = ("XR_KNEE", "XR_WRIST", "CT_HEAD", "notes")
    plant(tmp_path, [f"train/{folder}/patient1/study1_negative/image1.png" for folder in folders])
    records = mura.scan_split(tmp_path, "train").records
    assert [record.body_part for record in records] == ["XR_KNEE", "XR_WRIST"]


def test_hidden_and_stray_files_are_left_out_at_every_level(tmp_path: Path) -> None:
    hidden = ("._image1.png", ".DS_Store", ".image2.png")
    stray = ("Thumbs.db", "notes.txt", "image1.png.part")
    plant(tmp_path, [
        *(f"train/{STUDY}/{name}" for name in ("image1.png", *hidden, *stray)),
        "train/XR_ELBOW/patient00001/image9.png", "train/XR_ELBOW/image9.png", "train/image9.png",
        "train/XR_NOTES.png", "train/._XR_HAND", f"train/._{STUDY}/image1.png",
        "train/XR_ELBOW/._patient00001/study1_negative/image1.png",
        "train/XR_ELBOW/patient00001/._study2_negative/image1.png",
    ])
    scan = mura.scan_split(tmp_path, "train")
    assert names(scan) == [f"{STUDY}/image1.png"]
    (note,) = notes(scan)  # what macOS hides is no news
    assert re.fullmatch("3 files are no images.* left out", note)


def test_content_decides_where_the_name_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "train" / STUDY
    picture(folder / "IM0001")
    picture(folder / "scan.2019")
    header = b"DICM\x08\0\x05\0CS\x0a\0ISO_IR 100"
    (folder / "IM0002").write_bytes(b"\0" * 128 + header)  # without Rows: as a DICOMDIR
    (folder / "README").write_text("images of an elbow")
    scan = mura.scan_split(tmp_path, "train")
    assert names(scan) == [f"{STUDY}/IM0001", f"{STUDY}/scan.2019"]
    (note,) = notes(scan)
    assert re.fullmatch("2 files are no images.* left out", note)


def test_an_image_named_as_a_heatmap_is_not_dropped_in_silence(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png", f"train/{STUDY}/hand_heatmap.png"])
    scan = mura.scan_split(tmp_path, "train")
    assert len(scan.records) == 2 or any("1 " in note for note in notes(scan))


def test_images_of_every_suffix_come_in_natural_order(tmp_path: Path) -> None:
    files = ["image1.png", "image2.JPG", "image3.jpeg", "image9.TIF", "image10.dcm", "image11.bmp"]
    plant(tmp_path, [f"train/{STUDY}/{name}" for name in reversed(files)])
    assert names(mura.scan_split(tmp_path, "train")) == [f"{STUDY}/{name}" for name in files]


def test_natural_order_is_by_number_then_by_text() -> None:
    wanted = ["", "1", "01", "2", "10", "a", "a1", "a2b", "a10", "b"]
    shuffled = random.Random(0).sample(wanted, len(wanted))
    found = sorted(shuffled, key=mura.natural_key)
    assert [name for name in found if name not in ("1", "01")] == [
        name for name in wanted if name not in ("1", "01")]
    assert {found.index("1"), found.index("01")} == {1, 2}


def test_natural_order_of_numbers_of_any_length() -> None:
    numbers = ["9", "10", "99", "100", "1000", "20240131235959", "20240201000000", "9" * 18]
    wanted = [f"image{number}.png" for number in numbers]
    shuffled = random.Random(0).sample(wanted, len(wanted))
    assert sorted(shuffled, key=mura.natural_key) == wanted


def test_order_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, [
        f"train/XR_{part}/patient{n}/study1_negative/image{i}.png"
        for part in "BA" for n in ("2", "10", "02", "1") for i in ("1", "01", "001", "a")])
    expected = mura.scan_split(tmp_path, "train")
    listdir, scandir = os.listdir, os.scandir

    class Backwards(list[Any]):
        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    monkeypatch.setattr(os, "scandir", lambda folder: Backwards(
        sorted(scandir(folder), key=lambda entry: entry.name, reverse=True)))
    assert mura.scan_split(tmp_path, "train") == expected
    assert [record.body_part for record in expected.records] == ["XR_A"] * 16 + ["XR_B"] * 16


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    plant(tmp_path / "elsewhere", ["patient1/study1_positive/image1.png"])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "XR_HAND").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = names(mura.scan_split(tmp_path, "train"))
    assert found == ["XR_HAND/patient1/study1_positive/image1.png"]


@pytest.mark.parametrize(
    "level",
    [
        "XR_HAND",
        "XR_ELBOW/patient7",
        "XR_ELBOW/patient00001/study7_negative",
        f"{STUDY}/image7.png",
    ],
)
def test_a_loop_of_links_costs_nothing_but_itself(
    level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png", f"train/{STUDY}/image8.png",
                     "train/XR_WRIST/patient1/study1_negative/image1.png"])
    loop = tmp_path / "train" / level
    loop.symlink_to(loop)
    scan = mura.scan_split(tmp_path, "train")
    kept = [name for name in names(scan) if not name.endswith("image7.png")]
    assert kept == [f"{STUDY}/image1.png", f"{STUDY}/image8.png",
                    "XR_WRIST/patient1/study1_negative/image1.png"]
    if "image7" not in level:  # an image that is a loop may also fail as unreadable, when decoded
        said = capsys.readouterr().err + "".join(scan.notes)
        assert str(loop) in said or str(loop.parent) in said


@pytest.mark.parametrize("level", ["XR_ELBOW", "XR_ELBOW/patient00001", STUDY])
def test_a_folder_that_may_not_be_read_is_named_and_skipped(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(
        tmp_path,
        [f"train/{STUDY}/image1.png", "train/XR_WRIST/patient1/study1_negative/image1.png"],
    )
    scandir, locked = os.scandir, tmp_path / "train" / level

    def guarded(folder: str | Path) -> Any:  # root may read anything, so the refusal is made up
        if Path(folder) == locked:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    scan = mura.scan_split(tmp_path, "train")
    assert names(scan) == ["XR_WRIST/patient1/study1_negative/image1.png"]
    said = capsys.readouterr().err + "".join(scan.notes)
    assert f"{locked}: skipped" in said
    assert "Permission denied" in said


def test_what_is_named_like_an_image_fails_by_itself_when_decoded(root: Path) -> None:
    study = root / "train" / "XR_HAND" / "patientD0" / "study1_negative"
    (study / "image3.png").mkdir()
    os.mkfifo(study / "image4.png")
    (study / "image5.png").symlink_to("nowhere.png")
    (study / "image6.png").touch()
    errors = {Path(name).name: why for name, why in errors_of(decoded(root)).items()}
    assert errors == {"image4.png": "a folder or device, not a regular file", "image5.png": "no such file or directory",
                      "image6.png": "empty (0 bytes)"}


@pytest.mark.parametrize(
    "folder", ["train", "train/XR_ELBOW", "train/XR_ELBOW/patient00001", f"train/{STUDY}"]
)
def test_set_without_images_is_refused_by_folder(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(mura.UserError) as error:
        mura.scan_split(tmp_path, "train")
    assert one_line(error).startswith(
        f"{tmp_path / 'train'}: no images found; expected XR_*/patient*/"
    )


def test_a_split_that_is_not_there_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    with pytest.raises(mura.UserError, match=r"valid: no images found; expected XR_") as error:
        mura.scan_split(tmp_path, "valid")
    assert error.value.exit_code == mura.EXIT_USAGE
    assert "valid: skipped, it cannot be read (No such file" in capsys.readouterr().err


PIECES = (
    st.sampled_from(["XR_HAND", "XR_", "xr_hand", "XR", "._XR_HAND", "train", "XR_ÉPAULE"]),
    st.sampled_from(["patient1", "patient2", ".patient3", "10", "a b", "train"]),
    st.sampled_from(
        [
            "study1_positive",
            "s2_negative",
            "study3",
            "_positive",
            "positive",
            "S_Negative",
            ".x_negative",
        ]
    ),
    st.sampled_from(
        ["image1.png", "image10.PNG", "._i.png", "a.txt", "b.dcm", ".png", "ü.jpeg", "c.gz"]
    ),
)


@settings(deadline=None, max_examples=40)
@given(st.sets(st.tuples(*PIECES), max_size=12), st.sets(st.tuples(*PIECES[:3]), max_size=4))
def test_random_trees_are_scanned_by_the_stated_rule(
    files: set[tuple[str, ...]], folders: set[tuple[str, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = plant(Path(folder), ["train/" + "/".join(file) for file in files])
        for pieces in folders:
            root.joinpath("train", *pieces).mkdir(parents=True, exist_ok=True)
        (root / "train").mkdir(exist_ok=True)
        expected = {
            "/".join(file): file[2].lower().endswith("positive")
            for file in files
            if file[0].upper().startswith("XR_")
            and not any(piece.startswith(".") for piece in file)
            and re.search(r"(^|_)(positive|negative)$", file[2].lower())
            and re.search(r"\.(png|dcm|jpeg)$", file[3].lower())
        }
        if not expected:
            with pytest.raises(mura.UserError, match="no images found"):
                mura.scan_split(root, "train")
            return
        scan = mura.scan_split(root, "train")
        assert {record.name: record.label for record in scan.records} == expected
        assert len(scan.records) == len(expected)
        for record in scan.records:
            assert record.path == str(root / "train" / record.name)
            assert (
                record.study == f"{record.body_part}/{record.patient}/{record.study.split('/')[2]}"
            )
            assert Path(record.name).parent.as_posix() == record.study


# ---- MURA's lists -----------------------------------------------------------------------------
def test_labels_come_from_the_names_of_the_studies(tmp_path: Path) -> None:
    studies = ("study1_positive", "study1_negative", "study2_POSITIVE", "study1")
    plant(
        tmp_path,
        [f"train/XR_HAND/patient{n}/{study}/image1.png" for n, study in enumerate(studies)],
    )
    scan = mura.scan_split(tmp_path, "train")
    assert [(record.study.rpartition("/")[2], record.label) for record in scan.records] == [
        ("study1_positive", 1), ("study1_negative", 0), ("study2_POSITIVE", 1)]
    (note,) = notes(scan)
    assert re.fullmatch("1 images have no label .*left out", note)


def test_images_of_an_unlabelled_study_are_not_called_missing(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png", "train/XR_HAND/patient2/study1/image1.png"])
    (tmp_path / "train_image_paths.csv").write_text(
        f"MURA-v1.1/train/{STUDY}/image1.png\nMURA-v1.1/train/XR_HAND/patient2/study1/image1.png\n"
        "MURA-v1.1/train/XR_HAND/patient2/study10/image1.png\n")
    unlabelled, missing = notes(mura.scan_split(tmp_path, "train"))
    assert unlabelled.startswith("1 images have no label")
    assert missing.startswith(
        "1 images of train_image_paths.csv are missing, such as XR_HAND/patient2/study10/"
    )


def test_list_of_studies_overrules_names_and_says_so(tmp_path: Path) -> None:
    studies = ("study1_positive", "study1_negative", "study1", "study1_negative")
    plant(
        tmp_path,
        [f"train/XR_HAND/patient{n}/{study}/image1.png" for n, study in enumerate(studies)],
    )
    (tmp_path / "train_labeled_studies.csv").write_text(
        "MURA-v1.1/train/XR_HAND/patient0/study1_positive/,0\n"
        "MURA-v1.1/train/XR_HAND/patient1/study1_negative/,0\n"
        "MURA-v1.1/train/XR_HAND/patient2/study1/,1\n")
    scan = mura.scan_split(tmp_path, "train")
    assert [record.label for record in scan.records] == [
        0,
        0,
        1,
        0,
    ]  # the last is unlisted: its name counts
    assert notes(scan) == [
        "1 studies are named unlike train_labeled_studies.csv, which counts"
    ]


def test_folders_of_other_names_are_counted(tmp_path: Path) -> None:
    """Half of the data would be missing without a word."""
    names = [f"train/{part}/patient1/study1_positive/a.png" for part in ("XR_HAND", "KNEE", "hip")]
    scan = mura.scan_split(plant(tmp_path, names), "train")
    assert {record.body_part for record in scan.records} == {"XR_HAND"}
    assert notes(scan) == ["2 folders are not called XR_..., left out"]


def test_only_listed_images_count_and_missing_ones_are_named(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image{i}.png" for i in (1, 2, 3)])
    (tmp_path / "train_image_paths.csv").write_text(
        "".join(f"MURA-v1.1/train/{STUDY}/image{i}.png\n" for i in (1, 3, 4, 5)))
    scan = mura.scan_split(tmp_path, "train")
    assert names(scan) == [f"{STUDY}/image1.png", f"{STUDY}/image3.png"]
    unlisted, missing = notes(scan)
    assert re.fullmatch(r"1 images are not in train_image_paths\.csv.* left out", unlisted)
    assert missing == f"2 images of train_image_paths.csv are missing, such as {STUDY}/image4"


def test_lists_name_images_whatever_their_suffix_is_now(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.jpg", f"train/{STUDY}/image2.png"])
    (tmp_path / "train_image_paths.csv").write_text(
        "".join(f"MURA-v1.1/train/{STUDY}/image{i}.png\n" for i in (1, 2)))
    scan = mura.scan_split(tmp_path, "train")
    assert (names(scan), scan.notes) == ([f"{STUDY}/image1.jpg", f"{STUDY}/image2.png"], ())


def test_a_list_that_leaves_no_image_is_named(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_image_paths.csv").write_text(f"train/{STUDY}/view1.png\n")
    with pytest.raises(
        mura.UserError, match=r"no images found; .*1 images are not in train_image_paths\.csv"
    ):
        mura.scan_split(tmp_path, "train")


def test_lists_of_other_body_parts_and_splits_are_no_concern(tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_image_paths.csv").write_text(
        f"MURA-v1.1/train/{STUDY}/image1.png\n"
        "MURA-v1.1/train/XR_HAND/patient7/study1_negative/image1.png\n"
    )
    (tmp_path / "valid_image_paths.csv").write_text("damaged\n")
    assert mura.scan_split(tmp_path, "train", ["ELBOW"]).notes == ()


@pytest.mark.parametrize(
    ("images", "studies"),
    [
        (
            f"path\nMURA-v1.1/train/{STUDY}/image1.png\n",
            f"study,label\nMURA-v1.1/train/{STUDY}/,0\n",
        ),
        (f",0\n0,MURA-v1.1/train/{STUDY}/image1.png\n", f",0,1\n0,MURA-v1.1/train/{STUDY}/,0\n"),
        (
            f",path\n17,MURA-v1.1/train/{STUDY}/image1.png\n",
            f",path,label\n17,MURA-v1.1/train/{STUDY}/,0\n",
        ),
        (f"0,MURA-v1.1/train/{STUDY}/image1.png\n", f"0,MURA-v1.1/train/{STUDY}/,0\n"),
        (
            f"\ufefftrain\\{STUDY}\\image1.png \r\n \r\n".replace("/", "\\"),
            f'"C:\\data\\MURA-v1.1\\train\\{STUDY}\\", 0 \r\n'.replace("/", "\\"),
        ),
    ],
    ids=["header", "pandas", "pandas with names", "index", "windows"],
)
def test_lists_as_other_programs_write_them(images: str, studies: str, tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png", f"train/{STUDY}/image2.png"])
    (tmp_path / "train_image_paths.csv").write_bytes(images.encode())
    (tmp_path / "train_labeled_studies.csv").write_bytes(studies.encode())
    scan = mura.scan_split(tmp_path, "train")
    assert [(record.name, record.label) for record in scan.records] == [(f"{STUDY}/image1.png", 0)]


@pytest.mark.parametrize(("file", "damaged"), [
    ("train_image_paths.csv", "MURA-v1.1/train/XR_EL"),
    ("train_image_paths.csv", f"MURA-v1.1/valid/{STUDY}/image1.png"),
    ("train_image_paths.csv", f"MURA-v1.1/train/{STUDY}/image1.png,1"),
    ("train_image_paths.csv", "path"),
    ("train_image_paths.csv", '"MURA-v1.1/train'),
    ("train_labeled_studies.csv", f"MURA-v1.1/train/{STUDY}/"),
    ("train_labeled_studies.csv", f"MURA-v1.1/train/{STUDY}/,2"),
    ("train_labeled_studies.csv", f"MURA-v1.1/train/{STUDY}/,"),
    ("train_labeled_studies.csv", f"MURA-v1.1/train/{STUDY}/,1,1"),
    ("train_labeled_studies.csv", "\0\0\0,1"),
    ("train_labeled_studies.csv", "train/,1"),
])
def test_a_damaged_line_is_named_by_file_and_number(
    file: str, damaged: str, tmp_path: Path
) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    good = f"MURA-v1.1/train/{STUDY}/" + ("image1.png" if "image" in file else ",1")
    (tmp_path / file).write_text(f"{good}\n\n{damaged}\n{good}\n")
    with pytest.raises(
        mura.UserError, match=f"^{re.escape(str(tmp_path / file))}: line 3 "
    ) as error:
        mura.scan_split(tmp_path, "train")
    assert "restore the file from the archive or delete it" in one_line(error)


def test_a_damaged_first_line_is_no_header(tmp_path: Path) -> None:
    """Passed over, it would leave its study with the label of the name."""
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_labeled_studies.csv").write_text(f"MURA-v1.1/train/{STUDY}/,2\n")
    with pytest.raises(mura.UserError, match=r"train_labeled_studies\.csv: line 1 "):
        mura.scan_split(tmp_path, "train")


@pytest.mark.parametrize("content", [b"\xff\xfe\0\1", b"MURA-v1.1/train/\x80\x81,1\n"])
def test_a_list_that_is_no_text_is_named(content: bytes, tmp_path: Path) -> None:
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_labeled_studies.csv").write_bytes(content)
    with pytest.raises(
        mura.UserError, match=r"train_labeled_studies\.csv: cannot be read as CSV"
    ) as error:
        mura.scan_split(tmp_path, "train")
    one_line(error)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60) | st.text("tr,ain/\"\n\r\\XR_01;", max_size=60).map(str.encode))
def test_any_bytes_as_a_list_give_a_scan_or_one_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = plant(Path(folder), [f"train/{STUDY}/image1.png"])
        for file in ("train_image_paths.csv", "train_labeled_studies.csv"):
            (root / file).write_bytes(content)
            try:
                scan = mura.scan_split(root, "train")
            except mura.UserError as error:
                assert file in str(error)
                assert "\n" not in str(error)
            else:
                assert names(scan) == [f"{STUDY}/image1.png"]
            (root / file).unlink()


# ---- body parts -------------------------------------------------------------------------------
def test_tasks_are_matched_with_or_without_the_prefix_in_any_case(phantoms: Path) -> None:
    whole = mura.scan_split(phantoms, "train").records
    assert mura.scan_split(phantoms, "train", ["HUMERUS", "forearm"]).records == whole
    for task in ("HUMERUS", "XR_HUMERUS", "humerus", "xr_Humerus"):
        chosen = mura.scan_split(phantoms, "train", [task, task]).records
        assert chosen == tuple(record for record in whole if record.body_part == "XR_HUMERUS")


def test_an_unknown_task_lists_those_present(
    phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data-dir",
        phantoms,
        "--checkpoint",
        phantoms.parent / "never.pth",
        "--device",
        "cpu",
    )
    assert run_inside(*arguments, "--tasks", "HUMERUS", "FORARM") == 2
    line = "--tasks FORARM: no such body part; present are FOREARM, HUMERUS\n"
    assert capsys.readouterr().err.endswith(line)


def test_count_table_counts_images_studies_and_patients() -> None:
    def record(part: str, patient: str, study: str, image: int) -> mura.ImageRecord:
        study = f"{part}/{patient}/{study}"
        name = f"{study}/image{image}.png"
        return mura.ImageRecord(name, name, part, patient, study, int("positive" in study))

    records = [
        record("XR_A", "p1", "study1_positive", 1), record("XR_A", "p1", "study1_positive", 2),
        record("XR_A", "p1", "study2_negative", 1), record("XR_A", "p2", "study1_negative", 1),
        record("XR_B", "p2", "study1_positive", 1), record("XR_B", "p2", "study1_positive", 2),
        record("XR_B", "p2", "study1_positive", 3),
    ]
    header, *rows = mura.count_table(mura.Scan("train", Path(), tuple(records), ()))
    assert re.findall("train|images|studies|patients|abnormal", header)[:3] == [
        "train",
        "images",
        "studies",
    ]
    numbers = {
        row.split()[0]: [int(number) for number in re.findall(r"\b\d+\b", row)] for row in rows
    }
    assert numbers == {
        "XR_A": [4, 2, 3, 1, 2, 1],
        "XR_B": [3, 3, 1, 1, 1, 1],
        "all": [7, 5, 4, 2, 2, 2],
    }
    assert len(mura.count_table(mura.Scan("train", Path(), tuple(records[:4]), ()))) == 2  # one body part is all


# ---- labels CSV -------------------------------------------------------------------------------
def labels_file(
    folder: Path, text: str | bytes, images: Names = ("a.png", "b.png", "sub/c.png")
) -> Path:
    plant(folder, images)
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def scan_table(path: Path, *tasks: str) -> mura.Scan:
    """Scan as the command does without --data-dir: relative paths start from the table's folder."""
    return mura.scan_labels(path, path.parent, tasks)


def test_a_full_table_by_hand(tmp_path: Path) -> None:
    path = labels_file(tmp_path, (
        "path,label,patient,study,body_part,view\n"
        "a.png,1,Ann,s1,HAND,AP\n"
        "b.png,1,Ann,s1,HAND,lateral\n"
        "sub/c.png,0,Bob,s1,KNEE,AP\n"))
    scan = scan_table(path)
    assert [(r.name, r.label, r.patient, r.body_part) for r in scan.records] == [
        ("a.png", 1, "Ann", "HAND"), ("b.png", 1, "Ann", "HAND"), ("sub/c.png", 0, "Bob", "KNEE")]
    assert [Path(r.path) for r in scan.records] == [
        tmp_path / n for n in ("a.png", "b.png", "sub/c.png")
    ]
    first, second, third = (record.study for record in scan.records)
    assert first == second != third  # s1 of Ann is not s1 of Bob
    assert (scan.split, scan.notes, scan.is_mura) == ("labels.csv", (), False)


def test_columns_in_any_order_case_and_company(tmp_path: Path) -> None:
    path = labels_file(tmp_path, 'Age, LABEL ,Path,Patient,Study\n61, 0 ,"sub/c.png",P,S\n')
    (record,) = scan_table(path).records
    assert (record.name, record.label, record.patient) == ("sub/c.png", 0, "P")


@pytest.mark.parametrize(("word", "label"), [
    ("0", 0), ("1", 1), ("normal", 0), ("abnormal", 1), ("Normal", 0), ("ABNORMAL", 1),
    ("negative", 0), ("positive", 1)])
def test_words_for_the_label(word: str, label: int, tmp_path: Path) -> None:
    (record,) = scan_table(labels_file(tmp_path, f"path,label\na.png,{word}\n")).records
    assert record.label == label


def test_relative_paths_start_from_the_file_or_from_the_data_folder(tmp_path: Path) -> None:
    path = labels_file(tmp_path, "path,label\nc.png,0\n")
    assert mura.scan_labels(path, tmp_path / "sub").records[0].path == str(
        tmp_path / "sub" / "c.png"
    )
    with pytest.raises(mura.UserError, match=r"line 2: .*c\.png: no such file"):
        scan_table(path)
    absolute = labels_file(tmp_path, f"path,label\n{tmp_path}/sub/c.png,0\n")
    assert mura.scan_labels(absolute, tmp_path / "elsewhere").records[0].path == str(
        tmp_path / "sub" / "c.png"
    )


def test_a_table_from_windows(tmp_path: Path) -> None:
    path = labels_file(tmp_path, b"\xef\xbb\xbfpath,label\r\nsub\\c.png,1\r\n\r\n")
    (record,) = scan_table(path).records
    assert (record.name, record.path) == ("sub/c.png", str(tmp_path / "sub" / "c.png"))


def test_names_with_commas_and_quotes(tmp_path: Path) -> None:
    path = labels_file(tmp_path, 'path,label\n"a,""b"".png",1\nb.png,0\n', ['a,"b".png', "b.png"])
    assert names(scan_table(path)) == ['a,"b".png', "b.png"]


@pytest.mark.parametrize(("header", "cells", "patients", "studies", "said"), [
    ("path,label", ("", ""), 3, 3, ["no patient column", "no study column"]),
    ("path,label,study", ("s1", "s2"), 2, 2, ["no patient column"]),
    ("path,label,patient", ("p1", "p2"), 2, 3, ["no study column"]),
    ("path,label,patient,study", ("p1,s1", "p2,s1"), 2, 2, []),
    ("path,label,patient,study", ("p1,s1", "p1,s2"), 1, 2, []),
])
def test_what_a_table_lacks_is_said_and_replaced(
    header: str,
    cells: tuple[str, str],
    patients: int,
    studies: int,
    said: list[str],
    tmp_path: Path,
) -> None:
    rows = [f"{path},{label},{cell}".rstrip(",") for path, label, cell in (
        ("a.png", 0, cells[0]), ("b.png", 0, cells[0]), ("sub/c.png", 1, cells[1]))]
    path = labels_file(tmp_path, "\n".join([header, *rows]))
    scan = scan_table(path)
    assert len({record.patient for record in scan.records}) == patients
    assert len({record.study for record in scan.records}) == studies
    assert len(scan.notes) == len(said)
    for note, text in zip(scan.notes, said, strict=True):
        assert note.startswith(f"{path}: {text}")
    if "no patient column" in said:
        assert "intervals are too narrow" in scan.notes[0]


def test_tasks_choose_body_parts_of_a_table(tmp_path: Path) -> None:
    path = labels_file(tmp_path, "path,label,body_part\na.png,0,XR_HAND\nb.png,1,KNEE\n")
    assert names(scan_table(path, "hand")) == ["a.png"]
    assert names(scan_table(path)) == ["a.png", "b.png"]
    with pytest.raises(mura.UserError, match=r"--tasks HIP: .*present are .*KNEE"):
        scan_table(path, "HIP")


def test_a_body_part_may_be_spelled_in_several_ways(tmp_path: Path) -> None:
    path = labels_file(
        tmp_path, "path,label,body_part\na.png,0,XR_HAND\nb.png,1,Hand\nsub/c.png,1,hand\n"
    )
    assert names(scan_table(path)) == ["a.png", "b.png", "sub/c.png"]
    assert names(scan_table(path, "HAND")) == ["a.png", "b.png", "sub/c.png"]


WRONG_TABLES = {
    "path,label\na.png,0\nmissing.png,1\n": "line 3: .*missing.png: no such file",
    "path,label\na.png,0\nsub,1\n": "line 3: .*sub: no such file",
    "path,label\na.png,0\n,1\n": "line 3: .*no such file",
    "path,label\n\na.png,2\n": "line 3: label '2' is none of 0, 1, normal, abnormal",
    "path,label\na.png,\n": "line 2: label '' is none of",
    "path,label\na.png,1,x\n": "line 2.* cells",
    "path,label\na.png\n": "line 2",
    "path,label,patient,study\na.png,0,p,s\nb.png,1,p,s\n": "line 3: study .*s has two labels",
    "path,label,study\na.png,0,s\nb.png,1,s\n": "line 3: study .*/s has two labels",
    "path,label\na.png,0\nb.png,0\na.png,1\n": "line 4: a.png is listed twice",
    "path,label\na.png,0\nb.png,0\na.png,0\n": "line 4: a.png is listed twice; delete",
    "a.png,0\nb.png,1\n": "line 1 must be a header .*path,label",
    "path,diagnosis\na.png,0\n": "line 1 must be a header .*path,label",
    "path;label\na.png;0\n": "line 1 must be a header .*path,label",
    "": "line 1 must be a header .*path,label",
    "path,label\n": "lists no image",
    '"path,label\na.png,0\n': "line 1 must be a header|cannot be read as CSV",
    'path,label\na.png,0\n"b.png,1\n' + "sub/c.png,0\n" * 12_000:  # longer than csv takes a cell
        "line 2: .*(no such file|is no CSV here: save it again)",
}


@pytest.mark.parametrize("table", WRONG_TABLES, ids=range(len(WRONG_TABLES)))
def test_errors_of_a_table_name_the_line(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real command; the checkpoint is read later, or named in the same way."""
    path = labels_file(tmp_path, table)
    code = run_inside("--labels", path, "--checkpoint", tmp_path / "new.pth", "--device", "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == mura.EXIT_USAGE
    assert re.search(
        f"^mura_anomaly_detection: {re.escape(str(path))}: ({WRONG_TABLES[table]})", line
    )


@pytest.mark.parametrize("kind", ["absent", "folder", "latin-1"])
def test_a_table_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "latin-1":
        path.write_bytes("path,label\né.png,1\n".encode("latin-1"))
    with pytest.raises(
        mura.UserError, match=r"labels\.csv: cannot be read as CSV in UTF-8"
    ) as error:
        scan_table(path)
    one_line(error)


@settings(deadline=None)
@given(st.text('path,label\n\r"01ab.ng;\\ ', max_size=60) | st.binary(max_size=40))
def test_any_text_as_a_table_gives_a_scan_or_one_line(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = labels_file(Path(folder), b"path,label\n" + (
            content if isinstance(content, bytes) else content.encode()))
        try:
            scan = scan_table(path)
        except mura.UserError as error:
            assert str(error).startswith(str(path))
        else:
            assert set(names(scan)) <= {"a.png", "b.png", "./a.png", "./b.png"}


# ---- split by patient -------------------------------------------------------------------------
def view(part: str, patient: str, label: int, image: int = 1) -> mura.ImageRecord:
    study = f"{part}/{patient}/study{label}_{('negative', 'positive')[label]}"
    name = f"{study}/image{image}.png"
    return mura.ImageRecord(f"train/{name}", name, part, patient, study, label)


def patients_of(records: Iterable[mura.ImageRecord]) -> set[str]:
    return {record.patient for record in records}


def one_view_each(normal: int, abnormal: int) -> list[mura.ImageRecord]:
    return ([view("XR_HAND", f"n{i}", 0) for i in range(normal)]
            + [view("XR_HAND", f"a{i}", 1) for i in range(abnormal)])


RECORDS = st.lists(
    st.builds(
        view,
        st.sampled_from(["XR_HAND", "XR_KNEE"]),
        st.integers(1, 30).map("patient{:05}".format),
        st.integers(0, 1),
        st.integers(1, 3),
    ),
    min_size=4,
    max_size=60,
    unique_by=lambda record: record.name,
).filter(lambda records: len(patients_of(records)) >= 4)
FRACTIONS = st.floats(0.01, 0.9)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None)
@given(RECORDS, FRACTIONS, SEEDS)
def test_every_image_is_on_one_side_and_every_patient_too(
    records: list[mura.ImageRecord], fraction: float, seed: int
) -> None:
    train, val = mura.split_by_patient(records, fraction, seed)
    assert sorted(train + val, key=records.index) == records
    assert train == [record for record in records if record in train]  # the order stays
    assert val == [record for record in records if record in val]
    assert patients_of(train).isdisjoint(patients_of(val))
    assert train
    assert val


def test_a_patient_with_several_body_parts_stays_whole() -> None:
    parts = ("XR_HAND", "XR_KNEE", "XR_ELBOW")
    records = [view(part, f"patient{i}", 0) for i in range(40) for part in parts]
    for seed in range(20):
        train, val = mura.split_by_patient(records, 0.3, seed)
        assert (len(patients_of(val)), len(val), len(train)) == (12, 36, 84)


@settings(deadline=None)
@given(RECORDS, FRACTIONS, SEEDS, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_files(
    records: list[mura.ImageRecord], fraction: float, seed: int, shuffler: random.Random
) -> None:
    _, val = mura.split_by_patient(records, fraction, seed)
    mixed = shuffler.sample(records, len(records))
    assert patients_of(mura.split_by_patient(mixed, fraction, seed)[1]) == patients_of(val)


@pytest.mark.parametrize(("count", "fraction", "expected"), [
    (10, 0.2, 2), (8, 0.2, 2), (7, 0.2, 1), (13, 0.2, 3), (9, 0.5, 4), (50, 0.2, 10), (4, 0.9, 3)])
def test_the_fraction_of_each_kind_is_rounded_to_whole_patients(
    count: int, fraction: float, expected: int
) -> None:
    train, val = mura.split_by_patient(one_view_each(count, 2 * count), fraction, 0)
    assert sum(record.label == 0 for record in val) == expected
    assert sum(record.label == 0 for record in train) == count - expected


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 200), FRACTIONS, SEEDS)
def test_the_fraction_is_kept_within_each_kind_of_patient(
    normal: int, abnormal: int, fraction: float, seed: int
) -> None:
    train, val = mura.split_by_patient(one_view_each(normal, abnormal), fraction, seed)
    for label, count in enumerate((normal, abnormal)):
        in_val = sum(record.label == label for record in val)
        assert 1 <= in_val <= count - 1  # both sides have both
        assert abs(in_val - fraction * count) < 1
        assert in_val + sum(record.label == label for record in train) == count


def test_a_patient_with_one_abnormal_study_is_of_the_abnormal_kind() -> None:
    records = [view(part, f"both{i}", label) for i in range(10)
               for part, label in (("XR_HAND", 0), ("XR_KNEE", 1))] + one_view_each(10, 0)
    for seed in range(10):
        _, val = mura.split_by_patient(records, 0.2, seed)
        kinds = Counter(name[0] for name in patients_of(val))
        assert kinds == {"b": 2, "n": 2}


def test_another_seed_is_another_split() -> None:
    records = one_view_each(30, 30)
    drawn = {
        frozenset(patients_of(mura.split_by_patient(records, 0.2, seed)[1])) for seed in range(10)
    }
    assert len(drawn) == 10
    assert mura.split_by_patient(records, 0.2, 3) == mura.split_by_patient(records, 0.2, 3)


def test_every_patient_has_the_same_chance_of_val() -> None:
    records = one_view_each(10, 10)
    chosen = Counter(name for seed in range(400)
                     for name in patients_of(mura.split_by_patient(records, 0.2, seed)[1]))
    expected, deviation = 400 * 0.2, math.sqrt(400 * 0.2 * 0.8)
    assert max(abs(chosen[record.patient] - expected) for record in records) < 4.5 * deviation


@settings(deadline=None)
@given(RECORDS, FRACTIONS, SEEDS, st.integers(0, 1), st.sampled_from(["newcomer", "aa", "zz", "0"]))
def test_a_new_patient_moves_at_most_one_other(
    records: list[mura.ImageRecord], fraction: float, seed: int, label: int, name: str
) -> None:
    before = patients_of(mura.split_by_patient(records, fraction, seed)[1])
    more = [*records, view("XR_HAND", name, label)]
    after = patients_of(mura.split_by_patient(more, fraction, seed)[1])
    assert len((before ^ after) - {name}) <= 1


def test_a_single_patient_of_a_kind_stays_in_train() -> None:
    for seed in range(10):
        train, _ = mura.split_by_patient(one_view_each(5, 1), 0.5, seed)
        assert "a0" in patients_of(train)


@pytest.mark.parametrize(
    "records", [[], one_view_each(1, 0), one_view_each(0, 1), one_view_each(1, 1)]
)
def test_a_split_with_an_empty_side_is_refused(records: list[mura.ImageRecord]) -> None:
    count = len(patients_of(records))
    with pytest.raises(
        mura.UserError, match=rf"^--val-split 0\.2: {count} patients cannot be split"
    ):
        mura.split_by_patient(records, 0.2, 0)


# ---- the square -------------------------------------------------------------------------------
SIDES = st.integers(1, 300)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(64, 200))
def test_letterbox_keeps_the_aspect_ratio_and_is_centred(
    height: int, width: int, size: int
) -> None:
    left, top, right, bottom = mura.letterbox_box(height, width, size, "letterbox")
    wide, high = right - left, bottom - top
    assert max(wide, high) == size
    scale = size / max(height, width)
    assert abs(wide - max(1, width * scale)) <= 0.5 + 1e-9
    assert abs(high - max(1, height * scale)) <= 0.5 + 1e-9
    assert 0 <= (size - right) - left <= 1
    assert 0 <= (size - bottom) - top <= 1


@settings(deadline=None, max_examples=50)
@given(SIDES, SIDES, st.sampled_from(["stretch", "letterbox"]))
def test_a_square_is_pillows_resizing_with_black_around_it(
    height: int, width: int, resize: str
) -> None:
    pixels = np.random.default_rng(height * width).integers(1, 256, (height, width), np.uint8)
    square = mura.resize_square(pixels, SIZE, resize)
    left, top, right, bottom = mura.letterbox_box(height, width, SIZE, resize)
    scaled = Image.fromarray(pixels).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=3.0)
    expected = np.zeros((SIZE, SIZE), np.uint8)
    expected[top:bottom, left:right] = np.asarray(scaled)
    np.testing.assert_array_equal(square, expected)
    assert (resize == "letterbox") or (left, top, right, bottom) == (0, 0, SIZE, SIZE)


# ---- the cache --------------------------------------------------------------------------------
@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_each_image_is_decoded_once_in_its_place(
    resize: str, root: Path, decodings: list[Path]
) -> None:
    images = decoded(root, resize=resize)
    records = mura.scan_split(root, "train").records
    assert sorted(decodings) == sorted(Path(record.path) for record in records)
    dataset = mura.MuraDataset(images)
    assert dataset.records == records
    for record, pixels in zip(records, everything(dataset), strict=True):
        with Image.open(record.path) as image:
            np.testing.assert_array_equal(
                pixels, mura.resize_square(np.asarray(image), SIZE, resize)
            )
    if resize == "stretch":
        require_right(dataset)
    decodings.clear()
    again = mura.MuraDataset(decoded(root, resize=resize))
    assert decodings == []
    np.testing.assert_array_equal(everything(again), everything(dataset))


def test_a_cache_file_is_a_plain_npy_file_for_each_body_part(root: Path) -> None:
    paths = files_of(decoded(root))
    assert [path.name.split("-")[0] for path in paths] == ["XR_HAND", "XR_KNEE"]
    for path in paths:
        array = np.load(path)
        assert (array.dtype, array.shape) == (np.uint8, (8, SIZE, SIZE))
    files = {path.with_suffix(suffix) for path in paths for suffix in (".npy", ".json")}
    assert set((root.parent / "cache").iterdir()) == files


def test_tasks_share_what_is_there(root: Path, decodings: list[Path]) -> None:
    whole = decoded(root)
    decodings.clear()
    knees = decoded(root, ["KNEE"])
    assert decodings == []
    assert files_of(knees) == files_of(whole)[1:]
    require_right(mura.MuraDataset(knees))


@pytest.mark.parametrize("option", [{"resize": "letterbox"}, {"size": 96}])
def test_other_preprocessing_is_another_cache(
    option: dict[str, Any], root: Path, decodings: list[Path]
) -> None:
    first = decoded(root)
    decodings.clear()
    second = decoded(root, **option)
    assert len(decodings) == 16
    assert set(files_of(first)).isdisjoint(files_of(second))
    decodings.clear()
    assert files_of(decoded(root)) == files_of(first)
    assert decodings == []


def test_a_cache_of_other_decoding_is_not_used(
    root: Path, decodings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CACHE_VERSION is raised where decoding or resizing changes."""
    first = decoded(root)
    decodings.clear()
    monkeypatch.setattr(mura, "CACHE_VERSION", mura.CACHE_VERSION + 1)
    assert set(files_of(first)).isdisjoint(files_of(decoded(root)))
    assert len(decodings) == 16


def test_other_images_of_a_body_part_are_another_cache(root: Path) -> None:
    """Names are in the key: train/ and valid/ of one body part must not share rows."""
    for number, path in enumerate(sorted((root / "train").rglob("*.png"))):
        place = Path(str(path).replace("/train/", "/valid/").replace("patient", "patient9"))
        picture(place, 1000 + number)
    first, second = decoded(root), decoded(root, split="valid")
    assert set(files_of(first)).isdisjoint(files_of(second))
    require_right(mura.MuraDataset(first))
    require_right(mura.MuraDataset(second))


@pytest.mark.parametrize("touch", [False, True])
def test_a_changed_file_is_decoded_again_alone(
    touch: bool, root: Path, decodings: list[Path]
) -> None:
    path = Path(mura.scan_split(root, "train").records[3].path)
    decoded(root)
    decodings.clear()
    if touch:
        os.utime(path, ns=(0, 1))
    else:
        picture(path, 999)
    for _ in range(2):  # decoded again, then kept
        require_right(mura.MuraDataset(decoded(root)))
        assert decodings == [path]


def test_the_bar_of_decoding_ends_at_its_total(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that the cache has count once, and so do those that are decoded again."""
    bars: list[mura.Progress] = []

    class Kept(mura.Progress):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            bars.append(self)

    monkeypatch.setattr(mura, "Progress", Kept)
    decoded(root)
    picture(Path(mura.scan_split(root, "train").records[3].path), 999)
    decoded(root)
    assert [(bar.n, bar.total) for bar in bars] == [(16, 16)] * 2


def test_a_change_of_the_same_length_is_seen(root: Path) -> None:
    path = root / "train" / "XR_HAND" / "patientD0" / "study1_negative" / "image1.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(path.with_suffix(".bmp"))
    path.unlink()
    decoded(root)
    Image.fromarray(np.full((9, 9), 200, np.uint8)).save(path.with_suffix(".bmp"))
    os.utime(path.with_suffix(".bmp"), ns=(1, 1))
    require_right(mura.MuraDataset(decoded(root)))


def test_a_change_of_the_same_length_within_a_second_is_seen(root: Path) -> None:
    """As by a script that writes faster than once a second."""
    path = Path(mura.scan_split(root, "train").records[0].path)
    for shade, part in ((0, 1), (200, 2)):
        Image.fromarray(np.full((9, 9), shade, np.uint8)).save(path, format="bmp")
        os.utime(path, ns=(0, 10**18 + part * 10**8))
        require_right(mura.MuraDataset(decoded(root)))


def test_a_file_that_changes_while_it_is_decoded_is_decoded_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a copy of the data is still under way."""
    path, read = Path(mura.scan_split(root, "train").records[0].path), mura.read_radiograph

    def late(file: Path) -> mura.Radiograph:
        found = read(file)
        if file == path:
            picture(path, 999)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(mura, "read_radiograph", late)
        decoded(root)
    require_right(mura.MuraDataset(decoded(root)))


def test_images_that_come_and_go_leave_the_others_right(root: Path) -> None:
    decoded(root)
    first = next(iter(sorted((root / "train" / "XR_HAND").rglob("*.png"))))
    first.rename(first.with_name("image3.png"))
    picture(first.with_name("image0.png"), 77)
    dataset = mura.MuraDataset(decoded(root))
    assert len(dataset) == 17
    require_right(dataset)


def damage(path: Path, offset: int, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for i in range(offset, offset + count):
        content[i] ^= 1
    path.write_bytes(content)


def test_a_damaged_row_heals_with_a_note(
    root: Path, decodings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    last = decoded(root)[-1]
    whole = last.path.read_bytes()
    damage(last.path, len(whole) - SIZE * SIZE // 2)  # within the last image, one bit
    decodings.clear()
    require_right(mura.MuraDataset(decoded(root)))
    assert decodings == [Path(last.record.path)]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{last.path}: damaged at {last.record.name}, which is decoded again" in line
    assert last.path.read_bytes() == whole
    require_right(mura.MuraDataset(decoded(root)))
    assert len(decodings) == 1
    assert capsys.readouterr().err == ""


def test_a_damaged_header_is_found_or_harmless(tmp_path: Path) -> None:
    root = small_set(tmp_path / "MURA-v1.1", 1, ["XR_HAND"])
    path = decoded(root)[0].path
    whole = path.read_bytes()
    header, shape = len(whole) % (SIZE * SIZE), whole.index(b"(2, 64, 64)")
    rng = np.random.default_rng(0)
    flips = [(byte, int(rng.integers(8))) for byte in range(0, header, 3)]
    flips += [(shape + digit, bit) for digit in (1, 4, 5, 8, 9) for bit in range(8)]
    for byte, bit in flips:
        changed = bytearray(whole)
        changed[byte] ^= 1 << bit
        path.write_bytes(changed)
        require_right(mura.MuraDataset(decoded(root)))


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("kept", [None, 0, 5, 100, 0.5, -2])
def test_a_cache_that_is_absent_or_cut_short_is_made_anew(
    suffix: str, kept: float | None, root: Path, decodings: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Damage is told; a file that is missing is what a killed run leaves."""
    file = decoded(root, ["HAND"])[0].path.with_suffix(suffix)
    content = file.read_bytes()
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    decodings.clear()
    capsys.readouterr()
    require_right(mura.MuraDataset(decoded(root, ["HAND"])))
    told = f"{file.with_suffix('.npy')}: it or its .json is damaged" in capsys.readouterr().err
    assert told == (kept is not None)
    assert len(decodings) == 8
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        "{" * 50,
        '{"names": 1}',
        "\udcff",
        "[1, 2]",
        "[[]]",
        '["abcd"]',
        "[[[]]]",
    ],
)
def test_a_description_of_another_kind_is_made_anew(
    content: str, root: Path, decodings: list[Path]
) -> None:
    file = decoded(root, ["HAND"])[0].path.with_suffix(".json")
    whole = json.loads(file.read_text())
    file.write_bytes(content.encode(errors="surrogateescape"))
    decodings.clear()
    require_right(mura.MuraDataset(decoded(root, ["HAND"])))
    assert len(decodings) == 8
    assert json.loads(file.read_text()) == whole


@pytest.mark.parametrize("change", ["shorter", "longer", "backwards", "turned", "renamed"])
def test_a_description_of_other_rows_does_not_shift_them(change: str, root: Path) -> None:
    file = decoded(root, ["HAND"])[0].path.with_suffix(".json")
    rows = json.loads(file.read_text())
    changed = {"shorter": rows[1:], "longer": [*rows, rows[0]], "backwards": rows[::-1],
               "turned": [*rows[1:], rows[0]],
               "renamed": json.loads(json.dumps(rows).replace("image1", "image9"))}[change]
    file.write_text(json.dumps(changed))
    dataset = mura.MuraDataset(decoded(root, ["HAND"]))
    assert len(dataset) == 8
    require_right(dataset)


def test_a_run_killed_while_it_decoded_a_change_leaves_nothing_wrong(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are written, the description is not: those of changed files are decoded again."""
    images = decoded(root, ["HAND"])
    description = images[0].path.with_suffix(".json").read_bytes()
    for image in images[:3]:
        picture(Path(image.record.path), 500)
    decoded(root, ["HAND"])
    images[0].path.with_suffix(".json").write_bytes(description)
    require_right(mura.MuraDataset(decoded(root, ["HAND"])))


@pytest.mark.parametrize("complete", [False, True])
def test_temporary_files_of_killed_runs_are_swept(complete: bool, root: Path) -> None:
    """Also where the run after the killed one came within the hour, and completed the cache."""
    path = decoded(root, ["HAND"])[0].path
    if not complete:
        path.with_suffix(".json").unlink()
    old, young = (path.with_name(mura.TEMPORARY.format(name * 6)) for name in ("0a", "2c"))
    for file, hours in ((old, 3), (young, 0)):
        file.write_bytes(b"part")
        os.utime(file, (time.time() - 3600 * hours,) * 2)
    decoded(root, ["HAND"])
    assert not old.exists()
    assert young.exists()  # it may be of a run that decodes at this moment


def test_a_killed_run_leaves_no_cache_that_counts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    read, count = mura.read_radiograph, 0

    def dying(path: Path) -> mura.Radiograph:
        nonlocal count
        count += 1
        if count == 5:
            raise Killed
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(mura, "read_radiograph", dying)
        with pytest.raises(Killed):
            decoded(root, ["HAND"])
    assert list((root.parent / "cache").iterdir()) == []
    require_right(mura.MuraDataset(decoded(root, ["HAND"])))


@pytest.mark.parametrize("above", [0, 1])
def test_cache_lies_beside_the_data(above: int, root: Path) -> None:
    """Also where a parent of the data is named: as on the command line, it is decoded but once."""
    mura.MuraDataset.from_folder((root, root.parent)[above], size=SIZE)
    assert len(list((root / ".mura_cache").glob("*.npy"))) == 2
    assert not (root.parent / ".mura_cache").exists()


@pytest.mark.parametrize("xdg", [True, False])
def test_data_that_cannot_be_written_to_are_cached_in_the_users_folder(
    xdg: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decodings: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    access = os.access  # root may write anywhere, so the answer is made up
    monkeypatch.setattr(os, "access", lambda path, mode, **other: (
        root not in (Path(path), Path(path).parent) and access(path, mode, **other)))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = mura.MuraDataset.from_folder(root, size=SIZE)
    base = (tmp_path / "xdg" if xdg else tmp_path / "home" / ".cache") / "mura_anomaly_detection"
    (folder,) = base.iterdir()
    assert len(list(folder.glob("*.npy"))) == 2
    assert not (root / ".mura_cache").exists()
    assert f"{root}: is read-only; the cache is in {folder}" in capsys.readouterr().err
    decodings.clear()
    again = mura.MuraDataset.from_folder(root, size=SIZE)
    assert decodings == []
    np.testing.assert_array_equal(everything(again), everything(first))


@pytest.mark.parametrize("writable", ["data", "cache"])
def test_a_cache_beside_the_data_counts_by_its_own_permissions(
    writable: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made for all users of a read-only folder is used; one of another user is not."""
    beside = root / ".mura_cache"
    beside.mkdir()
    free = root if writable == "data" else beside
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == free)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = mura.cache_folder(root)
    assert (found == beside) == (writable == "cache")
    assert (tmp_path / "xdg" in found.parents) == (writable == "data")


def test_a_users_cache_belongs_to_the_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two data sets of one relative name neither replaces the other's cache."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = []
    for place in ("first", "second"):
        (tmp_path / place / "MURA").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        names = (Path("MURA"), Path("../") / place / "MURA", tmp_path / place / "MURA")
        (folder,) = {mura.cache_folder(name) for name in names}
        found.append(folder)
    assert found[0] != found[1]


def test_a_cache_that_cannot_be_written_is_named(root: Path) -> None:
    (root.parent / "cache").write_text("not a folder")
    with pytest.raises(mura.UserError, match=r"cache.*XR_HAND.*: cannot be written") as error:
        decoded(root)
    assert error.value.exit_code == mura.EXIT_FAILED
    one_line(error)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("changed", [False, True])
def test_a_full_disk_gives_one_line_and_leaves_nothing_behind(changed: bool, root: Path) -> None:
    import resource

    names = set()
    if changed:  # images of a cache that is there: it stays
        path = decoded(root)[0].path
        names = set(path.parent.iterdir())
        picture(Path(mura.scan_split(root, "train").records[5].path), 999)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * SIZE * SIZE, limits[1]))
    try:
        with pytest.raises(mura.UserError, match="cannot be written") as error:
            decoded(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.exit_code == mura.EXIT_FAILED
    one_line(error)
    assert set((root.parent / "cache").iterdir()) == names
    require_right(mura.MuraDataset(decoded(root)))


@pytest.mark.parametrize("ahead", [1, 5, 40])
def test_results_come_in_the_order_of_the_images(ahead: int) -> None:
    """Also where later ones are ready first."""
    def slower_first(image: int) -> int:
        time.sleep(0.002 * (image < 3))
        return image

    found = mura.map_ahead(slower_first, range(20), workers=3, ahead=ahead)
    assert list(found) == list(range(20))


def test_a_stop_while_images_are_handed_to_threads_reads_no_further() -> None:
    read = []

    def images() -> Iterator[int]:
        yield from range(20)
        raise mura.Stopped(signal.SIGTERM)

    def read_slowly(image: int) -> None:
        read.append(image)
        time.sleep(0.05)

    with pytest.raises(mura.Stopped):
        next(mura.map_ahead(read_slowly, images(), workers=1, ahead=30))
    assert len(read) < 20


# ---- images that cannot be read ---------------------------------------------------------------
def spoil(root: Path, count: int) -> list[mura.ImageRecord]:
    records = list(mura.scan_split(root, "train").records[:count])
    for record in records:
        Path(record.path).write_bytes(b"no image")
    return records


def test_bad_images_have_a_reason_and_are_not_decoded_again_at_each_start(
    root: Path, decodings: list[Path]
) -> None:
    spoilt = spoil(root, 2)
    images = decoded(root)
    for _ in range(2):
        expected = {record.name: "not an image of a known kind" for record in spoilt}
        assert errors_of(images) == expected
        dataset = mura.MuraDataset(images)
        assert len(dataset) == 14
        require_right(dataset)
        decodings.clear()
        images = decoded(root)
        assert decodings == []


def test_a_repaired_image_is_picked_up(root: Path, decodings: list[Path]) -> None:
    (spoilt,) = spoil(root, 1)
    decoded(root)
    picture(Path(spoilt.path), 5)
    decodings.clear()
    images = decoded(root)
    assert decodings == [Path(spoilt.path)]
    dataset = mura.MuraDataset(images)
    assert (dataset.records[0], errors_of(images)) == (spoilt, {})
    require_right(dataset)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_an_image_that_becomes_readable_without_a_change_is_picked_up(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by chmod, or where a network folder failed for a moment."""
    locked = mura.scan_split(root, "train").records[0]
    opener = io.open

    def refusing(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file) == locked.path:
            raise OSError(number, os.strerror(number), locked.path)
        return opener(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", refusing)
        patch.setattr("builtins.open", refusing)
        errors = errors_of(decoded(root))
        assert errors == {locked.name: os.strerror(number).lower()}
    dataset = mura.MuraDataset(decoded(root))
    assert len(dataset) == 16
    require_right(dataset)


def test_a_package_that_was_missing_and_is_installed_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "MURA-v1.1"
    write_dicom(root / "train" / STUDY / "image1.dcm")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydicom", None)
        (why,) = errors_of(decoded(root)).values()
        assert "pip install" in why
    assert len(mura.MuraDataset(decoded(root))) == 1


def test_an_image_that_breaks_later_is_left_out(root: Path) -> None:
    decoded(root)
    (spoilt,) = spoil(root, 1)
    images = decoded(root)
    assert list(errors_of(images)) == [spoilt.name]
    require_right(mura.MuraDataset(images))


def test_a_body_part_without_any_readable_image(root: Path) -> None:
    for path in (root / "train" / "XR_HAND").rglob("*.png"):
        path.write_bytes(b"")
    for _ in range(2):  # decoded, then from the cache
        dataset = mura.MuraDataset(decoded(root))
        assert {record.body_part for record in dataset.records} == {"XR_KNEE"}
        require_right(dataset)


@pytest.fixture(scope="module")
def thin() -> Iterator[None]:
    with thin_networks():
        yield


@pytest.fixture(scope="module")
def model(thin: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of a thin network, trained on a small set without a test."""
    folder = tmp_path_factory.mktemp("model")
    root = small_set(folder / "MURA-v1.1")
    checkpoint = folder / "model.pth"
    assert run_inside("--data-dir", root, "--checkpoint", checkpoint, *TINY, "--no-tta") == 0
    return checkpoint


EVALUATE = ("--evaluate", "--device", "cpu", "--bootstrap", "100", "--workers", "1")


def table_of(folder: Path, good: int, bad: int) -> Path:
    """Write images and a table of them; the bad ones cannot be read."""
    rows = ["path,label,patient,study"]
    for number in range(good + bad):
        path = folder / f"image{number}.png"
        picture(path, number, (12, 10)) if number < good else path.write_bytes(b"")
        rows.append(f"{path.name},{number % 2},p{number},s")
    table = folder / "labels.csv"
    table.write_text("\n".join(rows))
    return table


@pytest.mark.parametrize(("good", "bad", "choice", "code"), [
    (99, 1, None, 0), (98, 2, None, 1), (86, 14, "skip", 0), (99, 1, "stop", 1), (0, 3, "skip", 1),
])
def test_bad_images_are_named_and_skipped_or_stop_the_run(
    good: int, bad: int, choice: str | None, code: int, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = table_of(tmp_path, good, bad)
    flags = ["--on-bad-image", choice] if choice else []
    arguments = ("--labels", table, "--checkpoint", model, "--output", tmp_path / "out.csv")
    assert run_inside(*arguments, *EVALUATE, *flags) == code
    lines = capsys.readouterr().err.splitlines()
    named = [line for line in lines if line.endswith(": empty (0 bytes)")]
    assert named == [f"mura_anomaly_detection: {tmp_path}/image{good + i}.png: empty (0 bytes)"
                     for i in range(min(bad, 10))]
    (count,) = [line for line in lines if f"{bad} of {good + bad} images" in line]
    assert count.endswith("they are skipped") == (code == 0)
    assert ("--on-bad-image skip" in count) == (code == 1)
    written = (tmp_path / "out.report.json").exists()
    assert written == (code == 0)
    if written:
        report = json.loads((tmp_path / "out.report.json").read_text())
        assert report["levels"]["image"]["count"] == good


def test_bad_images_stop_the_training_before_it_begins(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root, 1)
    code = run_inside("--data-dir", root, "--checkpoint", tmp_path / "model.pth", *TINY)
    assert code == mura.EXIT_FAILED
    assert "1 of 16 images below" in capsys.readouterr().err
    assert not (tmp_path / "model.pth").exists()


def test_bad_images_of_the_test_stop_the_training_before_it_begins(
    thin: None, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after the last epoch."""
    picture(root / "valid" / STUDY / "image1.png")
    (root / "valid" / STUDY / "image2.png").write_bytes(b"")
    code = run_inside("--data-dir", root, "--checkpoint", tmp_path / "model.pth", *TINY)
    assert code == mura.EXIT_FAILED and not (tmp_path / "model.pth").exists()
    assert "1 of 2 images below" in capsys.readouterr().err


def test_a_table_is_trained_on_and_no_folder_beside_it_is_its_test(
    thin: None, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(root / "valid" / STUDY / "image1.png")
    records = mura.scan_split(root, "train").records
    lines = [f"{record.name},{record.label},{record.patient}" for record in records]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,label,patient", *lines]))
    arguments = ("--labels", table, "--data-dir", root / "train")
    assert run_inside(*arguments, "--checkpoint", tmp_path / "model.pth", *TINY) == 0
    assert "no valid/ of this data, so no test; --evaluate --labels" in capsys.readouterr().err
    assert torch.load(tmp_path / "model.pth", weights_only=True)["body_parts"] == ["all"]
    assert not list(tmp_path.glob("model.test.*")) + list(tmp_path.glob("model.report.*"))


# ---- MuraDataset ------------------------------------------------------------------------------
def test_a_choice_keeps_its_order_and_drops_what_could_not_be_read(root: Path) -> None:
    (spoilt,) = spoil(root, 1)
    images = [image for image in decoded(root) if image.record == spoilt or image.row % 2][::-1]
    dataset = mura.MuraDataset(images)
    choice = [image.record for image in images]
    assert list(dataset.records) == [record for record in choice if record != spoilt]
    assert spoilt in choice and len(dataset) > 2
    assert dataset.labels.tolist() == [record.label for record in dataset.records]
    require_right(dataset)


def test_items_and_batches_agree(root: Path) -> None:
    dataset = mura.MuraDataset(decoded(root))
    indices = [5, 0, len(dataset) - 1, 5]
    images = dataset.batch(np.array(indices))
    assert (images.shape, images.dtype) == ((4, 1, SIZE, SIZE), torch.uint8)
    for row, index in enumerate(indices):
        image, label = dataset[index]
        assert (image.shape, image.dtype) == ((1, SIZE, SIZE), torch.uint8)
        assert torch.equal(image, images[row])
        assert (label, type(label)) == (dataset.records[index].label, int)
    assert len(list(dataset)) == len(dataset) == 16
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_data_loader_with_two_workers_works_with_it(root: Path) -> None:
    dataset = mura.MuraDataset.from_folder(root, size=SIZE)
    loader = DataLoader(dataset, batch_size=3, num_workers=2)
    batches = list(loader)
    images, labels = (torch.cat(kind) for kind in zip(*batches, strict=True))
    assert [len(labels) for _, labels in batches] == [3] * 5 + [1]
    np.testing.assert_array_equal(images[:, 0].numpy(), everything(dataset))
    assert labels.tolist() == [record.label for record in dataset.records]


def test_from_folder_takes_the_flags_of_the_command_line(root: Path) -> None:
    picture(root / "valid" / STUDY / "image1.png", 1)
    dataset = mura.MuraDataset.from_folder(str(root.parent), "train", ["knee"], 96, "letterbox")
    assert {record.body_part for record in dataset.records} == {"XR_KNEE"}
    pixels = everything(dataset)
    assert pixels.shape == (8, 96, 96)
    assert not pixels[:, :12].any()  # 40 x 30 images: black above and below
    assert pixels[:, 48].all(axis=1).any()
    assert len(mura.MuraDataset.from_folder(root, "valid", size=SIZE)) == 1
    one = mura.MuraDataset.from_folder(root, tasks="KNEE", size=SIZE)
    assert {record.body_part for record in one.records} == {"XR_KNEE"}
    with pytest.raises(mura.UserError, match="--tasks HIP"):
        mura.MuraDataset.from_folder(root, tasks=["HIP"])


def test_from_folder_says_what_it_leaves_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (spoilt,) = spoil(root, 1)
    plant(root / "train" / "XR_KNEE" / "patientE0", ["study2/image1.png"])
    assert len(mura.MuraDataset.from_folder(root, size=SIZE)) == 15
    said = capsys.readouterr().err
    assert spoilt.path in said
    assert "1 images have no label" in said


def test_a_transform_is_applied_to_each_image(root: Path) -> None:
    shapes = []

    def negative(image: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(image.shape))
        return 255 - image

    dataset = mura.MuraDataset.from_folder(root, size=SIZE, transform=negative)
    image, label = dataset[3]
    np.testing.assert_array_equal(255 - image[0].numpy(), plain(dataset.records[3].path))
    assert label == dataset.records[3].label
    images, _ = next(iter(DataLoader(dataset, batch_size=4)))
    np.testing.assert_array_equal(255 - images[:, 0].numpy(), everything(dataset)[:4])
    assert shapes == [(1, SIZE, SIZE)] * 5
    np.testing.assert_array_equal(
        everything(dataset)[3], plain(dataset.records[3].path)
    )  # batch: raw


def test_it_travels_without_its_pixels(root: Path) -> None:
    dataset = mura.MuraDataset(decoded(root))
    pixels = everything(dataset)
    sent = pickle.dumps(dataset)
    assert len(sent) < pixels.size / 4
    arrived = pickle.loads(sent)
    np.testing.assert_array_equal(everything(arrived), pixels)
    np.testing.assert_array_equal(everything(dataset), pixels)


def test_it_outlives_the_originals(root: Path) -> None:
    dataset = mura.MuraDataset(decoded(root))
    expected = np.stack([plain(record.path) for record in dataset.records])
    shutil.rmtree(root)
    np.testing.assert_array_equal(everything(dataset), expected)


def test_fingerprint_follows_names_labels_and_pixels(root: Path) -> None:
    first = mura.MuraDataset(decoded(root))
    again = mura.MuraDataset(decoded(root))
    assert again.fingerprint() == first.fingerprint()
    shorter = mura.MuraDataset(decoded(root)[1:])
    picture(Path(first.records[0].path), 123)
    changed = mura.MuraDataset(decoded(root))
    study = root / "train" / "XR_HAND" / "patientD0"
    (study / "study1_negative").rename(study / "study1_positive")
    renamed = mura.MuraDataset(decoded(root))
    line = "MURA-v1.1/train/XR_HAND/patientD0/study1_positive/,0"
    (root / "train_labeled_studies.csv").write_text(line)
    relabelled = mura.MuraDataset(decoded(root))
    assert [record.name for record in renamed.records] == [r.name for r in relabelled.records]
    prints = {data.fingerprint() for data in (first, shorter, changed, renamed, relabelled)}
    assert len(prints) == 5


# ---- the input's size -------------------------------------------------------------------------
def records_of(folder: Path, sizes: Iterable[tuple[int, int]]) -> list[mura.ImageRecord]:
    records = []
    for number, size in enumerate(sizes):
        path = picture(folder / f"image{number}.png", number, size)
        records.append(mura.ImageRecord(str(path), path.name, "XR_A", "p", "XR_A/p/s", 0))
    return records


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(512, 400)], 320),
        ([(96, 80), (90, 96)], 96),
        ([(100, 97), (97, 60)], 128),
        ([(320, 10)], 320),
        ([(30, 20)], 64),
        ([(200, 300), (40, 40)], 320),
        ([(40, 40), (200, 220)], 224),
        ([], 320),
    ],
)
def test_the_input_is_no_larger_than_the_images(
    sizes: list[tuple[int, int]], expected: int, tmp_path: Path
) -> None:
    records = records_of(tmp_path, sizes)
    assert mura.choose_image_size(records) == expected


def test_headers_are_read_evenly_over_a_large_set(tmp_path: Path) -> None:
    small, large = records_of(tmp_path, [(96, 96), (160, 96)])
    assert mura.choose_image_size([*[small] * 3000, *[large] * 1000]) == 160
    assert mura.choose_image_size([*[large] * 1000, *[small] * 3000]) == 160


@pytest.mark.parametrize("name", ["image0.dcm", "IM0001"])
def test_dicom_headers_count(name: str, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / name)
    record = mura.ImageRecord(str(path), name, "XR_A", "p", "XR_A/p/s", 0)
    assert mura.choose_image_size([record]) == 160


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_cannot_be_opened_does_not_decide_the_size(tmp_path: Path) -> None:
    records = records_of(tmp_path, [(96, 96)] + [(200, 200)] * 4)
    for record in records[1:]:
        Path(record.path).unlink()
    Path(records[1].path).mkdir()
    os.mkfifo(records[2].path)
    Path(records[3].path).write_text("no image")
    assert mura.choose_image_size(records) == 96
    assert mura.choose_image_size(records[1:]) == 320


# ---- duplicates -------------------------------------------------------------------------------
def labelled_set(
    root: Path, images: Mapping[str, int], *splits: str
) -> dict[str, mura.MuraDataset]:
    """Make images SPLIT/PATH from their seeds, and return the data sets by split."""
    for name, seed in images.items():
        picture(root / name, seed)
    return {split: mura.MuraDataset(decoded(root, split=split)) for split in splits}


HAND = "XR_HAND/patient{}/study1_{}/image{}.png"


def test_a_set_without_duplicates_has_none(root: Path) -> None:
    assert mura.find_duplicates({"train": mura.MuraDataset(decoded(root))}) == ([], {})


def test_views_of_one_patient_may_be_alike(tmp_path: Path) -> None:
    sets = labelled_set(
        tmp_path / "M", {f"train/{HAND.format(1, 'negative', i)}": 5 for i in (1, 2)}, "train"
    )
    assert mura.find_duplicates(sets) == ([], {})


def test_duplicates_of_each_kind_by_hand(tmp_path: Path) -> None:
    images = {
        HAND.format(1, "negative", 1): 1,
        HAND.format(2, "negative", 1): 1,  # two patients
        HAND.format(3, "negative", 1): 3,
        HAND.format(4, "positive", 1): 3,  # and two labels
        HAND.format(5, "positive", 1): 5,
        HAND.format(5, "negative", 1): 5,  # two labels, one patient
        HAND.format(6, "negative", 1): 6,
    }
    sets = labelled_set(
        tmp_path / "M", {f"train/{name}": seed for name, seed in images.items()}
        | {f"valid/{HAND.format(9, 'negative', 1)}": 1, f"valid/{HAND.format(6, 'negative', 2)}": 6,
           f"valid/{HAND.format(8, 'negative', 1)}": 8}, "train", "valid")
    clauses, concerned = mura.find_duplicates(sets)
    assert len(clauses) == 3
    for clause, kind, count in zip(clauses, ("patient", "split", "label"), (2, 2, 2), strict=True):
        assert re.match(f"{count} pixel-identical images .*{kind}.*: ", clause)
    both = HAND.format(6, "negative", 1) + " = " + HAND.format(6, "negative", 2)
    assert [both in clause for clause in clauses] == [False, True, False]
    assert concerned == {
        "train": {HAND.format(n, word, 1) for n, word in (
            (1, "negative"), (2, "negative"), (3, "negative"), (4, "positive"), (5, "positive"),
            (5, "negative"), (6, "negative"))},
        "valid": {HAND.format(9, "negative", 1), HAND.format(6, "negative", 2)}}


def test_one_image_under_two_patients_of_the_test_is_told_and_kept(tmp_path: Path) -> None:
    """Neither was trained on, and their labels agree: --drop-duplicates has no reason to drop."""
    images = {f"valid/{HAND.format(patient, 'negative', 1)}": 1 for patient in (1, 2)}
    (clause,), concerned = mura.find_duplicates(labelled_set(tmp_path / "M", images, "valid"))
    assert re.match("1 pixel-identical images .*patient", clause)
    assert concerned == {}


def test_first_ten_duplicates_are_named(tmp_path: Path) -> None:
    images = {
        f"train/{HAND.format(2 * n + k, 'negative', 1)}": n for n in range(12) for k in (0, 1)
    }
    ((clause,), _) = mura.find_duplicates(labelled_set(tmp_path / "M", images, "train"))
    assert re.match("12 pixel-identical images .*patient", clause)
    assert clause.count(" = ") == 10


@pytest.mark.parametrize("drop", [False, True])
def test_the_test_says_what_it_has_in_common_with_training_and_drops_it_only_if_asked(
    drop: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(model.parent / "MURA-v1.1", tmp_path / "MURA-v1.1")
    for patient in range(8):
        label = ("negative", "positive")[patient % 2]
        picture(root / "valid" / HAND.format(f"X{patient}", label, 1), 2000 + patient)
    for patient in (0, 1):  # two images of training appear in the test
        label = ("negative", "positive")[patient]
        copy = root / "valid" / HAND.format(f"X{patient}", label, 1)
        shutil.copy(root / "train" / HAND.format(f"D{patient}", label, 1), copy)
    flags = ["--drop-duplicates"] if drop else []
    output = tmp_path / "out.csv"
    assert (
        run_inside("--data-dir", root, "--checkpoint", model, "--output", output, *EVALUATE, *flags)
        == 0
    )
    said = capsys.readouterr()
    assert re.search(
        "2 pixel-identical images .*split.*: .*" + HAND.format("X0", "negative", 1), said.err
    )
    assert ("--drop-duplicates" in said.err) == (not drop)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["levels"]["image"]["count"] == (6 if drop else 8)
    assert report["levels"]["study"]["count"] == (6 if drop else 8)
    assert any(re.match("2 pixel-identical images .*split", note) for note in report["notes"])
    assert any(re.search("2 .*left out$", note) for note in report["notes"]) == drop
    with (tmp_path / "out.test.csv").open(newline="") as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert len(listed) == (6 if drop else 8)
    assert (f"valid/{HAND.format('X0', 'negative', 1)}" in listed) == (not drop)


def test_a_test_of_nothing_but_duplicates_ends_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(model.parent / "MURA-v1.1", tmp_path / "MURA-v1.1")
    shutil.copytree(root / "train", root / "valid")
    flags = ("--output", tmp_path / "out.csv", "--drop-duplicates")
    assert run_inside("--data-dir", root, "--checkpoint", model, *EVALUATE, *flags) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--drop-duplicates" in line
    assert "ValueError" not in line
    assert not (tmp_path / "out.report.json").exists()


def test_the_split_file_holds_every_patient_once_on_its_side(model: Path) -> None:
    with model.with_suffix(".split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = mura.scan_split(model.parent / "MURA-v1.1", "train").records
    train, val = mura.split_by_patient(records, 0.2, 0)
    expected = dict.fromkeys(patients_of(train), "train") | dict.fromkeys(patients_of(val), "val")
    assert {row["patient"]: row["split"] for row in rows} == expected
    assert len(rows) == len(expected)


def test_an_evaluation_of_the_patients_of_training_is_called_optimistic(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data-dir",
        model.parent / "MURA-v1.1",
        "--split",
        "train",
        "--checkpoint",
        model,
    )
    assert run_inside(*arguments, "--output", tmp_path / "out.csv", *EVALUATE) == 0
    line = capsys.readouterr().err
    assert "of the 8 patients of train were trained on" in line
    assert "optimistic (leakage)" in line


def test_a_loop_an_unreadable_image_and_stray_files_in_one_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was left out is said once, in a line each."""
    study = root / "train" / "XR_HAND" / "patientD0" / "study1_negative"
    plant(study, ["._image1.png", "Thumbs.db"])
    loop = root / "train" / "XR_HAND" / "patientZ"
    loop.symlink_to(loop)
    (study / "image1.png").write_bytes(b"")
    flags = ("--on-bad-image", "stop")
    assert (
        run_inside("--data-dir", root, "--checkpoint", tmp_path / "model.pth", *TINY, *flags) == 1
    )
    lines = [
        line.removeprefix("mura_anomaly_detection: ")
        for line in capsys.readouterr().err.splitlines()
    ]
    assert len(lines) == 4
    assert lines[0].startswith(f"{loop}: skipped")
    assert lines[1].startswith(f"{root / 'train'}: 1 files are no images")
    assert lines[2] == f"{study}/image1.png: empty (0 bytes)"
    assert lines[3].startswith(f"1 of 16 images below {root / 'train'} cannot be read")


def test_studies_of_two_body_parts_stay_two(tmp_path: Path) -> None:
    path = labels_file(tmp_path, "path,label,patient,study,body_part\n"
                                 "a.png,0,p1,study1,ELBOW\nb.png,1,p1,study1,HAND\n")
    first, second = scan_table(path).records  # one study would have two labels
    assert first.study != second.study and first.patient == second.patient == "p1"


@pytest.mark.parametrize("row", ["b.png,1,", "b.png,1"])
def test_a_row_without_its_patient_is_refused(tmp_path: Path, row: str) -> None:
    """Taken for a patient of its own, it could stand on both sides of the split."""
    path = labels_file(tmp_path, f"path,label,patient\na.png,0,p1\n{row}\n")
    with pytest.raises(mura.UserError, match=r"line 3: names no patient; fill it in"):
        scan_table(path)
