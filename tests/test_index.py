"""Section 2, index: MURA's folders and lists become views, whatever else lies between them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mura_anomaly_detection as mad

STUDY = "XR_ELBOW/patient00001/study1_positive"


def plant(root: Path, paths: Iterable[str]) -> Path:
    """Make empty files: indexing never opens an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def names(index: mad.Index) -> list[str]:
    return [view.name for view in index.views]


# ---- folders ----


def test_a_view_knows_its_place(tmp_path: Path):
    index = mad.index_split(plant(tmp_path, [f"train/{STUDY}/image1.png"]), "train")
    view = mad.View(str(tmp_path / "train" / STUDY / "image1.png"), "XR_ELBOW", "patient00001", STUDY, 1)
    assert index == mad.Index("train", (view,), ())
    assert view.name == f"{STUDY}/image1.png"


@pytest.mark.parametrize("nesting", ["", "MURA-v1.1", "archive/MURA-v1.1"])
def test_the_data_folder_may_be_a_parent_up_to_two_levels_above(nesting: str, tmp_path: Path):
    root = plant(tmp_path / nesting, [f"train/{STUDY}/image1.png"])
    assert mad.find_data_root(tmp_path) == root


def test_valid_alone_is_a_data_folder_too(tmp_path: Path):
    plant(tmp_path, [f"valid/{STUDY}/image1.png"])
    assert mad.find_data_root(tmp_path) == tmp_path
    assert names(mad.index_split(tmp_path, "valid")) == [f"{STUDY}/image1.png"]


def test_what_macos_adds_to_an_archive_is_not_taken_for_the_data(tmp_path: Path):
    plant(tmp_path, [f"__MACOSX/MURA-v1.1/train/{STUDY}/._image1.png", f"mura/MURA-v1.1/train/{STUDY}/image1.png",
                     f".Trash/MURA-v1.1/train/{STUDY}/image1.png"])
    assert mad.find_data_root(tmp_path) == tmp_path / "mura" / "MURA-v1.1"


@pytest.mark.parametrize("inside", [[], ["images/image1.png"], ["a/b/c/train/x.png"], ["train"]])
def test_a_folder_without_the_layout_is_refused_by_name(inside: list[str], tmp_path: Path):
    plant(tmp_path, inside)
    with pytest.raises(mad.UserError, match=f"^{re.escape(str(tmp_path))}: neither it nor a folder in it") as error:
        mad.find_data_root(tmp_path)
    assert error.value.exit_code == mad.EXIT_USAGE


def test_a_missing_folder_is_refused_by_name(tmp_path: Path):
    with pytest.raises(mad.UserError, match=r"nowhere: no such folder"):
        mad.find_data_root(tmp_path / "nowhere")


def test_any_body_part_of_the_layout_is_taken_and_nothing_else(tmp_path: Path):
    folders = ("XR_KNEE", "XR_WRIST", "CT_HEAD", "notes")
    plant(tmp_path, [f"train/{folder}/patient1/study1_negative/image1.png" for folder in folders])
    assert {view.part for view in mad.index_split(tmp_path, "train").views} == {"XR_KNEE", "XR_WRIST"}


def test_stray_files_are_ignored_at_every_level(tmp_path: Path):
    plant(tmp_path, [
        *(f"train/{STUDY}/{name}" for name in ("image1.png", "._image1.png", ".DS_Store", "Thumbs.db", "notes.txt")),
        f"train/{STUDY}/image1.png.part", "train/XR_ELBOW/patient00001/image9.png", "train/XR_ELBOW/image9.png",
        "train/XR_NOTES.png", "train/image9.png", "train/._XR_ELBOW",
        "train/XR_ELBOW/._patient00001/study1_negative/image1.png",
        "train/XR_ELBOW/patient00001/.study2_negative/image1.png",
    ])
    assert names(mad.index_split(tmp_path, "train")) == [f"{STUDY}/image1.png"]


def test_images_of_every_kind_in_natural_order(tmp_path: Path):
    kinds = ["image1.png", "image2.JPG", "image3.jpeg", "image9.TIF", "image10.dcm", "image11.bmp"]
    plant(tmp_path, [f"train/{STUDY}/{name}" for name in reversed(kinds)])
    assert names(mad.index_split(tmp_path, "train")) == [f"{STUDY}/{name}" for name in kinds]


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant(tmp_path, [f"train/XR_{part}/patient{n}/study1_negative/image{i}.png"
                     for part in "BA" for n in ("2", "10", "02", "1") for i in ("1", "01", "001", "a")])
    expected = mad.index_split(tmp_path, "train")
    listdir, scandir = os.listdir, os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_: object):
            return None

    def name(entry: os.DirEntry) -> str:
        return entry.name

    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    monkeypatch.setattr(os, "scandir", lambda folder: Backwards(sorted(scandir(folder), key=name, reverse=True)))
    assert mad.index_split(tmp_path, "train") == expected
    assert [view.part for view in expected.views] == ["XR_A"] * 16 + ["XR_B"] * 16


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_named_like_an_image_is_an_image_until_decoding_says_otherwise(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train" / STUDY / "image2.png").mkdir()
    os.mkfifo(tmp_path / "train" / STUDY / "image3.png")
    (tmp_path / "train" / STUDY / "image4.png").symlink_to("nowhere.png")
    views = mad.index_split(tmp_path, "train").views
    assert [view.path.name for view in views] == [f"image{i}.png" for i in (1, 2, 3, 4)]
    reasons = [mad.decode_square(view.path, 64, "stretch") for view in views]
    assert reasons == ["empty (0 bytes)", "a folder, not an image", "not a regular file", "no such file or directory"]


def test_linked_folders_are_followed(tmp_path: Path):
    plant(tmp_path / "elsewhere", ["patient1/study1_positive/image1.png"])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "XR_HAND").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert names(mad.index_split(tmp_path, "train")) == ["XR_HAND/patient1/study1_positive/image1.png"]


@pytest.mark.parametrize("folder", ["train", "train/XR_ELBOW", "train/XR_ELBOW/patient00001", f"train/{STUDY}"])
def test_a_set_without_images_is_refused_by_folder(folder: str, tmp_path: Path):
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(mad.UserError, match=f"^{re.escape(str(tmp_path / 'train'))}: no images found"):
        mad.index_split(tmp_path, "train")


def test_a_list_that_leaves_no_image_is_named(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_image_paths.csv").write_text(f"train/{STUDY}/view1.png\n")
    with pytest.raises(mad.UserError, match=r"no images found; 1 images are not in train_image_paths\.csv"):
        mad.index_split(tmp_path, "train")


def test_a_heatmap_saved_beside_an_image_is_no_view(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png", f"train/{STUDY}/image1_heatmap.png"])
    assert names(mad.index_split(tmp_path, "train")) == [f"{STUDY}/image1.png"]


def test_a_split_that_is_not_there_is_refused_by_name(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    with pytest.raises(mad.UserError, match=r"valid: no such folder; .* must hold valid/XR_"):
        mad.index_split(tmp_path, "valid")


# ---- labels and lists ----


def test_labels_come_from_the_names_of_the_studies(tmp_path: Path):
    plant(tmp_path, [f"train/XR_HAND/patient{n}/{study}/image1.png" for n, study in
                     enumerate(["study1_positive", "study1_negative", "study2_POSITIVE", "study1"])])
    index = mad.index_split(tmp_path, "train")
    assert [(view.study.rpartition("/")[2], view.label) for view in index.views] == [
        ("study1_positive", 1), ("study1_negative", 0), ("study2_POSITIVE", 1)]
    assert len(index.notes) == 1
    assert index.notes[0].startswith(f"{tmp_path / 'train'}: 1 studies have no label ")
    assert index.notes[0].endswith(" and are left out")


def test_the_list_of_studies_overrules_names_and_says_so(tmp_path: Path):
    plant(tmp_path, [f"train/XR_HAND/patient{n}/{study}/image1.png" for n, study in
                     enumerate(["study1_positive", "study1_negative", "study1", "study1_negative"])])
    (tmp_path / "train_labeled_studies.csv").write_text(
        "MURA-v1.1/train/XR_HAND/patient0/study1_positive/,0\nMURA-v1.1/train/XR_HAND/patient1/study1_negative/,0\n"
        "MURA-v1.1/train/XR_HAND/patient2/study1/,1\n")
    index = mad.index_split(tmp_path, "train")
    assert [view.label for view in index.views] == [0, 0, 1, 0]  # the last is not in the list: its name counts
    note = "1 studies are named otherwise than train_labeled_studies.csv says; the list counts"
    assert index.notes == (f"{tmp_path / 'train'}: {note}",)


def test_only_listed_images_count_and_missing_ones_are_named(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image{i}.png" for i in (1, 2, 3)])
    (tmp_path / "train_image_paths.csv").write_text(
        "".join(f"MURA-v1.1/train/{STUDY}/image{i}.png\n" for i in (1, 3, 4)) + f"MURA-v1.1/train/{STUDY}/image5.png\n")
    index = mad.index_split(tmp_path, "train")
    assert names(index) == [f"{STUDY}/image1.png", f"{STUDY}/image3.png"]
    assert [note.removeprefix(f"{tmp_path / 'train'}: ") for note in index.notes] == [
        "1 images are not in train_image_paths.csv and are left out",
        f"2 images of train_image_paths.csv are missing, such as {STUDY}/image4.png",
    ]


def test_lists_of_other_parts_and_splits_are_no_concern(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_image_paths.csv").write_text(
        f"MURA-v1.1/train/{STUDY}/image1.png\nMURA-v1.1/train/XR_HAND/patient7/study1_negative/image1.png\n")
    (tmp_path / "valid_image_paths.csv").write_text("damaged\n")
    assert mad.index_split(tmp_path, "train", ["ELBOW"]).notes == ()


def test_lists_as_other_systems_write_them(tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    path = STUDY.replace("/", "\\")
    (tmp_path / "train_image_paths.csv").write_bytes(f"\ufefftrain\\{path}\\image1.png \r\n \r\n".encode())
    (tmp_path / "train_labeled_studies.csv").write_bytes(f'"C:\\data\\MURA-v1.1\\train\\{path}\\", 0 \r\n'.encode())
    index = mad.index_split(tmp_path, "train")
    assert [(view.name, view.label) for view in index.views] == [(f"{STUDY}/image1.png", 0)]


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
def test_a_damaged_line_is_named_by_file_and_number(file: str, damaged: str, tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    good = f"MURA-v1.1/train/{STUDY}/" + ("image1.png" if "image" in file else ",1")
    (tmp_path / file).write_text(f"{good}\n{good}\n{damaged}\n{good}\n")
    with pytest.raises(mad.UserError, match=f"^{re.escape(str(tmp_path / file))}: line 3 ") as error:
        mad.index_split(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\0\1", b"MURA-v1.1/train/\x80\x81,1\n", b'"' + b"x" * 200_000 + b'"\n'])
def test_a_list_that_is_no_text_is_named(content: bytes, tmp_path: Path):
    plant(tmp_path, [f"train/{STUDY}/image1.png"])
    (tmp_path / "train_labeled_studies.csv").write_bytes(content)
    with pytest.raises(mad.UserError, match=r"train_labeled_studies\.csv: cannot be read as CSV"):
        mad.index_split(tmp_path, "train")


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text("tr,ain/\"\n\r\\XR_01;", max_size=60).map(str.encode))
def test_any_bytes_as_a_list_give_an_index_or_one_line(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        root = plant(Path(folder), [f"train/{STUDY}/image1.png"])
        for file in ("train_image_paths.csv", "train_labeled_studies.csv"):
            (root / file).write_bytes(content)
            try:
                index = mad.index_split(root, "train")
            except mad.UserError as error:
                assert file in str(error)
                assert "\n" not in str(error)
            else:
                assert names(index) == [f"{STUDY}/image1.png"]
            (root / file).unlink()


# ---- body parts ----


def test_tasks_are_matched_with_or_without_the_prefix_in_any_case(phantoms: Path):
    whole, both = mad.index_split(phantoms, "train"), mad.index_split(phantoms, "train", ["HUMERUS", "forearm"])
    assert both == whole
    for task in ("HUMERUS", "XR_HUMERUS", "humerus", "xr_Humerus"):
        assert mad.index_split(phantoms, "train", [task, task]).views == tuple(
            view for view in whole.views if view.part == "XR_HUMERUS")


def test_an_unknown_task_lists_those_present_and_the_nearest(phantoms: Path):
    with pytest.raises(mad.UserError) as error:
        mad.index_split(phantoms, "train", ["HUMERUS", "FORARM"])
    assert str(error.value) == "--tasks FORARM: no such body part; present are FOREARM, HUMERUS; did you mean FOREARM?"
    with pytest.raises(mad.UserError, match=r"present are FOREARM, HUMERUS$"):
        mad.index_split(phantoms, "train", ["ZZZ"])
    with pytest.raises(mad.UserError, match=r"present are none$"):
        mad.choose_parts([], ["ELBOW"])


# ---- whole sets ----


def test_phantoms_are_indexed_as_their_own_lists_say(phantoms: Path):
    for split in ("train", "valid"):
        index = mad.index_split(phantoms, split)
        listed = (phantoms / f"{split}_image_paths.csv").read_text().splitlines()
        labels = (phantoms / f"{split}_labeled_studies.csv").read_text().splitlines()
        labelled = dict(line.split("/,") for line in labels)
        assert sorted(f"MURA-v1.1/{split}/{name}" for name in names(index)) == sorted(listed)
        assert {f"MURA-v1.1/{split}/{view.study}": str(view.label) for view in index.views} == labelled
        assert index.notes == ()


def test_the_description_counts_images_studies_and_patients():
    def view(part: str, patient: str, study: str, image: int) -> mad.View:
        study = f"{part}/{patient}/{study}"
        return mad.View(f"{study}/image{image}.png", part, patient, study, int("positive" in study))

    views = [
        view("XR_A", "p1", "study1_positive", 1), view("XR_A", "p1", "study1_positive", 2),
        view("XR_A", "p1", "study2_negative", 1), view("XR_A", "p2", "study1_negative", 1),
        view("XR_B", "p2", "study1_positive", 1),
    ]
    header, *rows = [line.split() for line in mad.describe("train", views).splitlines()]
    assert header == ["train", "part", "images", "(abn.)", "studies", "(abn.)", "patients", "(abn.)"]
    assert [" ".join(row) for row in rows] == ["XR_A 4 2 3 1 2 1", "XR_B 1 1 1 1 1 1", "all 5 3 4 2 2 2"]
    assert [line.split()[0] for line in mad.describe("train", views[:4]).splitlines()[1:]] == ["XR_A"]


def test_a_set_of_the_size_of_mura_is_indexed_whole(tmp_path: Path):
    patient = tmp_path / "patient"  # all patients are links to this one, so that the set is made quickly
    files = ["study1_positive/image1.png", "study1_positive/image2.png", "study1_positive/image3.png",
             "study2_negative/image1.png", "study2_negative/image2.png"]
    plant(patient, files)
    patients = [f"{('XR_ELBOW', 'XR_HAND', 'XR_WRIST')[n % 3]}/patient{n:05}" for n in range(8001)]
    for name in patients:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).symlink_to(patient, target_is_directory=True)
    listed = [f"{name}/{file}" for name in patients for file in files]
    (tmp_path / "train_image_paths.csv").write_text("".join(f"MURA-v1.1/train/{name}\n" for name in listed))
    index = mad.index_split(tmp_path, "train")
    assert len(index.views) == 40_005
    assert (set(names(index)), index.notes) == (set(listed), ())
    assert sum(view.label for view in index.views) == 3 * 8001
    assert (len({view.study for view in index.views}), len({view.patient for view in index.views})) == (2 * 8001, 8001)


PIECES = (
    st.sampled_from(["XR_HAND", "XR_", "xr_hand", "XR", "._XR_HAND", "train", "XR_ÉPAULE"]),
    st.sampled_from(["patient1", "patient2", ".patient3", "10", "a b", "train"]),
    st.sampled_from(["study1_positive", "s2_negative", "study3", "_positive", "positive", "S_Negative", ".x_negative"]),
    st.sampled_from(["image1.png", "image10.PNG", "._i.png", "a.txt", "b.dcm", ".png", "ü.jpeg", "c.gz", "d.png "]),
)


@settings(deadline=None)
@given(st.sets(st.tuples(*PIECES), max_size=12), st.sets(st.tuples(*PIECES[:3]), max_size=4))
def test_random_trees_are_indexed_by_the_stated_rule(files: set[tuple[str, ...]], folders: set[tuple[str, ...]]):
    with tempfile.TemporaryDirectory() as folder:
        root = plant(Path(folder), ["train/" + "/".join(file) for file in files])
        for pieces in folders:
            root.joinpath("train", *pieces).mkdir(parents=True, exist_ok=True)
        (root / "train").mkdir(exist_ok=True)
        expected = {
            "/".join(file): file[2].lower().endswith("positive")
            for file in files
            if file[0].startswith("XR_") and not any(piece.startswith(".") for piece in file)
            and re.search(r"(^|_)(positive|negative)$", file[2].lower())
            and re.search(r"\.(png|dcm|jpeg)$", file[3].lower())
        }
        if not expected:
            with pytest.raises(mad.UserError, match="no images found"):
                mad.index_split(root, "train")
            return
        index = mad.index_split(root, "train")
        assert {view.name: view.label for view in index.views} == expected
        assert len(index.views) == len(expected)
        assert all(view.path == root / "train" / view.name for view in index.views)
        assert all(view.name.startswith(f"{view.part}/{view.patient}/") for view in index.views)
