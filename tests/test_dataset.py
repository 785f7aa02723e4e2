"""Section 4, cache and MuraDataset: each image is decoded once, kept as the file shows it, and damage never passes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mura_anomaly_detection as mad

SIZE = 64


def cached(root: Path, *tasks: str, **options: Any) -> mad.Decoded:
    """Open the cache of train/, building what is not there."""
    options = {"cache_dir": root.parent / "cache", "workers": 2, **options}
    views = mad.index_split(root, "train", tasks).views
    return mad.open_cache(views, SIZE, mad.Config(**options), root, mad.StopSignals())


def plain_decode(path: Path) -> np.ndarray:
    """What the pixels must be: Pillow's own decoding and resizing of a grey image."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR, reducing_gap=3.0))


@pytest.fixture
def decoded_paths(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that have been decoded since the test began."""
    paths: list[Path] = []
    decode = mad.read_radiograph

    def counting(path: Path) -> np.ndarray:
        paths.append(path)
        return decode(path)

    monkeypatch.setattr(mad, "read_radiograph", counting)
    return paths


@pytest.fixture(scope="module")
def dataset(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> mad.MuraDataset:
    return mad.MuraDataset(cached(phantoms, cache_dir=tmp_path_factory.mktemp("cache")))


def flip_bit(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


# ---- the cache ----


def test_the_cache_holds_every_image_as_pillow_decodes_it(dataset: mad.MuraDataset, phantoms: Path):
    assert dataset.views == mad.index_split(phantoms, "train").views
    for i, view in enumerate(dataset.views):
        image, label = dataset[i]
        assert (image.shape, image.dtype) == ((1, SIZE, SIZE), torch.uint8)
        np.testing.assert_array_equal(image[0].numpy(), plain_decode(view.path))
        assert label == int(view.path.parent.name.endswith("positive"))


def test_a_shard_is_a_plain_npy_file_for_each_part(phantom_copy: Path):
    decoded = cached(phantom_copy)
    assert [shard.file.name.split("-")[0] for shard in decoded.shards] == ["XR_FOREARM", "XR_HUMERUS"]
    for shard in decoded.shards:
        array = np.load(shard.file)
        assert (array.dtype, array.shape) == (np.uint8, (len(shard.names), SIZE, SIZE))
        assert {file.name for file in shard.file.parent.iterdir()} == {
            shard.file.with_suffix(suffix).name for shard in decoded.shards for suffix in (".npy", ".json")}


def test_a_second_opening_decodes_nothing(phantom_copy: Path, monkeypatch: pytest.MonkeyPatch):
    first = cached(phantom_copy)

    def refuse(*_: object) -> np.ndarray:
        raise AssertionError("decoded again")

    monkeypatch.setattr(mad, "read_radiograph", refuse)
    second = cached(phantom_copy)
    assert second.views == first.views
    everything = np.arange(len(first.views))
    assert torch.equal(mad.MuraDataset(second).batch(everything), mad.MuraDataset(first).batch(everything))


def test_tasks_share_what_is_there(phantom_copy: Path, decoded_paths: list[Path]):
    whole = cached(phantom_copy)
    decoded_paths.clear()
    one = cached(phantom_copy, "HUMERUS")
    assert decoded_paths == []
    assert [shard.file for shard in one.shards] == [whole.shards[1].file]
    dataset = mad.MuraDataset(one)
    np.testing.assert_array_equal(dataset[0][0][0], plain_decode(dataset.views[0].path))


@pytest.mark.parametrize("option", [{"fit": "letterbox"}, {"cache_dir": None}])
def test_other_preprocessing_or_another_place_is_another_cache(
    option: dict[str, Any], phantom_copy: Path, decoded_paths: list[Path]
):
    first = cached(phantom_copy)
    decoded_paths.clear()
    second = cached(phantom_copy, **option)
    assert len(decoded_paths) == len(first.views)
    assert {shard.file for shard in first.shards}.isdisjoint(shard.file for shard in second.shards)


def test_a_changed_file_is_decoded_anew(phantom_copy: Path):
    view = cached(phantom_copy).views[3]
    Image.fromarray(np.arange(96 * 96, dtype=np.uint8).reshape(96, 96)).save(view.path)
    dataset = mad.MuraDataset(cached(phantom_copy))
    np.testing.assert_array_equal(dataset[3][0][0], plain_decode(view.path))


def test_a_touched_file_is_decoded_anew_and_other_parts_are_not(phantom_copy: Path, decoded_paths: list[Path]):
    view = cached(phantom_copy).views[0]
    decoded_paths.clear()
    os.utime(view.path, ns=(0, 1))
    cached(phantom_copy)
    assert view.path in decoded_paths
    assert {path.relative_to(phantom_copy).parts[1] for path in decoded_paths} == {view.part}


def test_the_batch_is_read_from_the_file_and_not_kept_in_memory(dataset: mad.MuraDataset):
    dataset.batch(np.arange(len(dataset)))
    assert len(dataset._maps) == 2
    assert all(isinstance(array, np.memmap) and array.mode == "r" for array in dataset._maps.values())


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 8, 60])
def test_threads_keep_the_order(count: int, workers: int):
    def slow_at_first(number: int) -> int:
        time.sleep(0.01 / (1 + number))
        return number

    assert list(mad.map_ahead(slow_at_first, range(count), workers, ahead=8)) == list(range(count))


def test_threads_run_only_a_little_ahead():
    started: list[int] = []
    results = mad.map_ahead(started.append, range(1000), workers=2, ahead=16)
    for _ in range(3):
        next(results)
    results.close()  # as when the disk is full
    assert len(started) <= 16 + 3


# ---- damage ----


def test_a_flipped_byte_in_the_pixels_is_detected_and_named(phantom_copy: Path):
    decoded = cached(phantom_copy)
    shard = decoded.shards[1]
    flip_bit(shard.file, -SIZE * SIZE // 2)  # within the last image
    dataset = mad.MuraDataset(cached(phantom_copy))
    good = np.flatnonzero([view.name != shard.names[-1] for view in dataset.views])
    assert dataset.batch(good).shape == (len(good), 1, SIZE, SIZE)
    with pytest.raises(mad.UserError) as error:
        dataset.batch(np.arange(len(dataset)))
    assert str(error.value).startswith(f"{shard.file}: damaged at image {shard.names[-1]}; delete the file")
    assert error.value.exit_code == mad.EXIT_FAILED
    shard.file.unlink()  # the remedy
    dataset = mad.MuraDataset(cached(phantom_copy))
    np.testing.assert_array_equal(dataset[len(dataset) - 1][0][0], plain_decode(dataset.views[-1].path))


def test_every_flipped_bit_of_a_header_is_found(phantom_copy: Path):
    file = cached(phantom_copy).shards[0].file
    whole = file.read_bytes()
    assert mad.open_shard(file, SIZE)
    for bit in range(8 * (len(whole) % (SIZE * SIZE))):
        file.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        assert mad.open_shard(file, SIZE) is None, bit


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_file_cut_short_is_made_anew(suffix: str, kept: float, phantom_copy: Path, decoded_paths: list[Path]):
    first = cached(phantom_copy)
    file = first.shards[0].file.with_suffix(suffix)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    decoded_paths.clear()
    assert cached(phantom_copy).views == first.views
    assert len(decoded_paths) == len(first.shards[0].names)
    assert file.read_bytes() == content


def test_a_flipped_byte_in_the_description_is_found_or_harmless(phantom_copy: Path):
    shard = cached(phantom_copy).shards[0]
    file = shard.file.with_suffix(".json")
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for byte in {*range(100), *rng.integers(0, len(whole), 300).tolist(), len(whole) - 1}:
        file.write_bytes(whole)
        flip_bit(file, byte, int(rng.integers(8)))
        opened = mad.open_shard(shard.file, SIZE)
        assert opened is None or (opened.names, opened.bad) == (shard.names, shard.bad), byte
        assert opened is None or (opened.checksums == shard.checksums).all()


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"body": {}, "sha256": ""}', "{" * 50, '{"body": 1}'])
def test_a_description_of_another_kind_is_made_anew(content: str, phantom_copy: Path):
    first = cached(phantom_copy)
    file = first.shards[0].file.with_suffix(".json")
    whole = file.read_text()
    file.write_text(content)
    cached(phantom_copy)
    assert json.loads(file.read_text()) == json.loads(whole)


# ---- images that cannot be read ----


def spoil(root: Path, count: int) -> list[mad.View]:
    views = list(mad.index_split(root, "train").views[:count])
    for view in views:
        view.path.write_bytes(b"no image")
    return views


def test_bad_images_have_a_reason_and_no_row(phantom_copy: Path):
    total = len(mad.index_split(phantom_copy, "train").views)
    spoilt = spoil(phantom_copy, 2)
    decoded = cached(phantom_copy)
    reason = "not an image of a known kind, or its header is damaged"
    assert decoded.bad == {view.name: reason for view in spoilt}
    assert len(decoded.views) == total - 2
    dataset = mad.MuraDataset(decoded)
    assert dataset.batch(np.arange(len(dataset))).shape == (total - 2, 1, SIZE, SIZE)
    np.testing.assert_array_equal(dataset[0][0][0], plain_decode(dataset.views[0].path))  # not a neighbour's pixels


def test_only_bad_images_are_tried_again(phantom_copy: Path, decoded_paths: list[Path]):
    spoilt = spoil(phantom_copy, 2)
    cached(phantom_copy)
    decoded_paths.clear()
    assert set(cached(phantom_copy).bad) == {view.name for view in spoilt}
    assert set(decoded_paths) == {view.path for view in spoilt}


def test_a_repaired_image_is_picked_up(phantom_copy: Path):
    good = mad.index_split(phantom_copy, "train").views[5].path.read_bytes()
    (spoilt,) = spoil(phantom_copy, 1)
    assert set(cached(phantom_copy).bad) == {spoilt.name}
    spoilt.path.write_bytes(good)
    repaired = cached(phantom_copy)
    assert (repaired.bad, repaired.views[0]) == ({}, spoilt)
    np.testing.assert_array_equal(mad.MuraDataset(repaired)[0][0][0], plain_decode(spoilt.path))


def test_an_image_that_becomes_readable_without_a_change_is_picked_up(
    phantom_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    view = mad.index_split(phantom_copy, "train").views[0]
    decode = mad.read_radiograph

    def not_yet(path: Path) -> np.ndarray:
        if path == view.path:
            raise mad.BadImage("permission denied")
        return decode(path)

    with monkeypatch.context() as patch:
        patch.setattr(mad, "read_radiograph", not_yet)
        assert cached(phantom_copy).bad == {view.name: "permission denied"}
    assert cached(phantom_copy).bad == {}


def test_a_part_without_any_readable_image(phantom_copy: Path):
    for view in mad.index_split(phantom_copy, "train", ["FOREARM"]).views:
        view.path.write_bytes(b"")
    for _ in range(2):  # built, then opened
        decoded = cached(phantom_copy)
        dataset = mad.MuraDataset(decoded)
        assert {view.part for view in dataset.views} == {"XR_HUMERUS"}
        np.testing.assert_array_equal(dataset[0][0][0], plain_decode(dataset.views[0].path))


def decoded_with(good: int, bad: int) -> mad.Decoded:
    views = tuple(mad.View(f"{i}.png", "XR_A", "p", "XR_A/p/s", 0) for i in range(good))
    return mad.Decoded(views, (), np.zeros((good, 2), np.int64), {f"bad{i}.png": "empty" for i in range(bad)})


@pytest.mark.parametrize(("good", "bad", "action", "stops"), [
    (99, 1, None, False), (98, 2, None, True), (98, 2, "skip", False), (9999, 1, "stop", True),
    (5, 0, "stop", False), (0, 3, "skip", True), (199, 2, None, False), (197, 2, None, True),
])
def test_bad_images_are_skipped_or_stop_the_run(
    good: int, bad: int, action: str | None, stops: bool, capsys: pytest.CaptureFixture[str]
):
    decoded, config = decoded_with(good, bad), mad.Config(on_bad_image=action)
    if stops:
        complaint = f"^{bad} of {good + bad} images below set/train cannot be read"
        with pytest.raises(mad.UserError, match=complaint) as error:
            mad.check_bad_images(decoded, Path("set/train"), config)
        assert error.value.exit_code == mad.EXIT_FAILED
        assert ("--on-bad-image skip" in str(error.value)) == (action is None)
    else:
        mad.check_bad_images(decoded, Path("set/train"), config)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.endswith(": empty")] == [
        f"mura_anomaly_detection: set/train/bad{i}.png: empty" for i in range(bad)]
    assert any(line.endswith("they are skipped") for line in lines) == (bad > 0 and not stops)


def test_the_first_ten_bad_images_are_named(capsys: pytest.CaptureFixture[str]):
    mad.check_bad_images(decoded_with(100, 25), Path("t"), mad.Config(on_bad_image="skip"))
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.endswith(": empty") for line in lines) == 10
    assert len(lines) == 11


# ---- where the cache lives ----


def test_the_cache_lies_beside_the_data(tmp_path: Path):
    assert mad.cache_folder(mad.Config(), tmp_path) == tmp_path / ".mura_cache"
    assert mad.cache_folder(mad.Config(cache_dir=Path("elsewhere")), tmp_path) == Path("elsewhere")


@pytest.mark.parametrize("xdg", [True, False])
def test_data_that_cannot_be_written_to_are_cached_in_the_users_folder(
    xdg: bool, phantom_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded_paths: list[Path]
):
    access = os.access  # root may write anywhere, so the answer is made up
    monkeypatch.setattr(os, "access", lambda path, mode: phantom_copy not in (path, path.parent) and access(path, mode))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    decoded = cached(phantom_copy, cache_dir=None)
    base = tmp_path / "xdg" if xdg else tmp_path / "home" / ".cache"
    folder = decoded.shards[0].file.parent
    assert folder.parent == base / "mura_anomaly_detection"
    assert not (phantom_copy / ".mura_cache").exists()
    other = mad.cache_folder(mad.Config(), phantom_copy / "train")
    assert other.parent == folder.parent
    assert other != folder  # two sets never share a folder
    decoded_paths.clear()
    assert cached(phantom_copy, cache_dir=None).views == decoded.views
    assert decoded_paths == []


@pytest.mark.parametrize("after", [0, 20_000])
def test_a_full_disk_gives_one_line_and_leaves_nothing_behind(
    after: int, phantom_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    open_file = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = open_file(path, mode, *arguments, **options)
        if path.suffix == ".tmp":
            write = file.write

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_: object):
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def write(self, content: bytes) -> int:
                    if file.tell() + len(content) > after:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return write(content)

            return Full()
        return file

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(mad.UserError) as error:
        cached(phantom_copy)
    assert error.value.exit_code == mad.EXIT_FAILED
    assert "XR_FOREARM" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_is_a_file_is_named(phantom_copy: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(mad.UserError, match=r"cache.*: cannot be written"):
        cached(phantom_copy)


def test_a_signal_stops_the_decoding_and_leaves_nothing_half_done(phantom_copy: Path, tmp_path: Path):
    stop = mad.StopSignals()
    stop.signum = signal.SIGTERM
    views = mad.index_split(phantom_copy, "train").views
    with pytest.raises(mad.Stopped):
        mad.open_cache(views, SIZE, mad.Config(cache_dir=tmp_path / "cache"), phantom_copy, stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_the_first_process_builds(phantom_copy: Path, tmp_path: Path):
    views, config = mad.index_split(phantom_copy, "train").views, mad.Config(cache_dir=tmp_path / "cache")
    with pytest.raises(mad.UserError, match="was not written by the first process"):
        mad.open_cache(views, SIZE, config, phantom_copy, mad.StopSignals(), build=False)
    built = mad.open_cache(views, SIZE, config, phantom_copy, mad.StopSignals())
    assert mad.open_cache(views, SIZE, config, phantom_copy, mad.StopSignals(), build=False).views == built.views


# ---- MuraDataset ----


def test_a_choice_keeps_its_own_order_and_drops_what_could_not_be_read(phantom_copy: Path):
    (spoilt,) = spoil(phantom_copy, 1)
    decoded = cached(phantom_copy)
    choice = [*decoded.views[10:4:-1], spoilt, decoded.views[-1]]
    dataset = mad.MuraDataset(decoded, choice)
    assert list(dataset.views) == [view for view in choice if view != spoilt]
    assert dataset.labels.tolist() == [view.label for view in dataset.views]
    for i, view in enumerate(dataset.views):
        np.testing.assert_array_equal(dataset[i][0][0], plain_decode(view.path))


def test_items_batches_and_gathered_items_agree(dataset: mad.MuraDataset):
    indices = [5, 0, len(dataset) - 1, 5]
    images = dataset.batch(np.array(indices))
    for row, (image, label) in enumerate(dataset.__getitems__(indices)):
        assert torch.equal(image, images[row])
        assert torch.equal(image, dataset[indices[row]][0])
        assert label == dataset[indices[row]][1] == dataset.labels[indices[row]]
    assert len(list(dataset)) == len(dataset)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_data_loader_works_with_it(dataset: mad.MuraDataset, workers: int):
    context = "spawn" if workers else None
    loader = DataLoader(dataset, batch_size=16, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    images, labels = (torch.cat(kind) for kind in zip(*batches, strict=True))
    assert [len(batch[1]) for batch in batches[:-1]] == [16] * (len(batches) - 1)
    assert torch.equal(images, dataset.batch(np.arange(len(dataset))))
    assert labels.tolist() == [view.label for view in dataset.views]


def test_it_travels_without_its_maps(dataset: mad.MuraDataset):
    dataset.batch(np.arange(len(dataset)))
    assert dataset._maps
    sent = pickle.dumps(dataset)
    assert len(sent) < len(dataset) * SIZE * SIZE / 4  # not the pixels
    arrived = pickle.loads(sent)
    assert arrived._maps == {}
    assert torch.equal(arrived.batch(np.arange(len(arrived))), dataset.batch(np.arange(len(dataset))))


def test_it_outlives_the_originals(phantom_copy: Path):
    dataset = mad.MuraDataset(cached(phantom_copy))
    shutil.rmtree(phantom_copy)
    assert dataset.batch(np.arange(len(dataset))).any(dim=3).any(dim=2).all()


# ---- the input's size ----


def images_of(folder: Path, *sizes: tuple[int, int]) -> list[mad.View]:
    views = []
    for i, size in enumerate(sizes):
        Image.new("L", size).save(folder / f"image{i}.png")
        views.append(mad.View(str(folder / f"image{i}.png"), "XR_A", "p", "XR_A/p/s", 0))
    return views


@pytest.mark.parametrize(("sizes", "expected"), [
    ([(512, 400)], 320), ([(96, 80), (90, 96)], 96), ([(100, 97), (97, 60)], 128), ([(320, 10)], 320), ([(30, 20)], 64),
    ([(200, 300), (40, 40)], 320), ([(40, 40), (200, 220)], 224),
])
def test_the_input_is_no_larger_than_the_images(sizes: list[tuple[int, int]], expected: int, tmp_path: Path):
    views = images_of(tmp_path, *sizes)
    assert mad.choose_image_size(views, None) == expected
    assert mad.choose_image_size(views, 77) == 77


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_cannot_be_opened_does_not_decide_the_size(tmp_path: Path):
    views = images_of(tmp_path, (96, 96), (90, 90), (90, 90), (90, 90))
    for view in views[1:]:
        view.path.unlink()
    views[1].path.mkdir()
    os.mkfifo(views[2].path)
    assert mad.choose_image_size(views, None) == 96
    assert mad.choose_image_size(views[1:], None) == mad.PAPER_SIZE == 320
    assert mad.choose_image_size([], None) == 320
