"""Section 9: files appear whole or not at all, damage is noticed, and nothing in a file is ever run."""

from __future__ import annotations

import builtins
import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_inside
from tiny_run import TinyNetwork

import mura_anomaly_detection as mad

CPU = mad.Arithmetic(torch.device("cpu"), bf16=False, channels_last=False)


def model_content(**changes: Any) -> dict[str, Any]:
    """What STEM.pth of a tiny network holds."""
    torch.manual_seed(0)
    content = {
        "kind": "model", "model": "resnet50", "image_size": 64, "fit": "stretch",
        "normalization": {"kind": "given", "mean": [0.4] * 3, "std": [0.2] * 3}, "classes": ["normal", "abnormal"],
        "temperature": 1.25, "threshold": 0.5, "threshold_source": "default", "tta": True, "bad_images": 0,
        "history": [{"epoch": 1, "lr": None}],
        "parts": ["XR_HAND"], "patients": {"train": ["patient00001"], "val": []},
        "state_dict": TinyNetwork("resnet50").state_dict(),
    }
    return {**content, **changes}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mad, "Network", TinyNetwork)


@pytest.fixture
def model(tmp_path: Path, tiny: None) -> Path:
    """A whole model file."""
    mad.write_tensors(tmp_path / "m.pth", model_content())
    return tmp_path / "m.pth"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ----- writing -------------------------------------------------------------------------------------------------------


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """Until then the old one stays; folders are made as needed."""
    path = tmp_path / "new" / "folder" / "f.bin"
    for content, before in ((b"one", None), (b"two", b"one")):
        with mad.atomic_write(path) as file:
            file.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert names(path.parent) == {"f.bin"}


@pytest.mark.parametrize("failure", [ValueError("in the caller"), KeyboardInterrupt(), mad.Stopped(15)])
def test_what_breaks_inside_leaves_the_old_file_and_no_other(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)), mad.atomic_write(path) as file:
        file.write(b"half of the n")
        raise failure
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"f.bin"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        mad.write_json(tmp_path / "f.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "f.json").stat().st_mode & 0o777 == mode


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is what a power failure tests: content, then name, then the folder that holds the name."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def noted_fsync(number: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{number}") else "fsync file")  # noqa: PTH112
        fsync(number)

    def noted_rename(path: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    with mad.atomic_write(tmp_path / "f.bin") as file:
        file.write(b"content")
    assert calls == ["fsync file", "rename", "fsync folder"]


def no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (Path, "replace")])
def test_no_space_is_one_line_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, function: str
) -> None:
    path = tmp_path / "f.json"
    mad.write_json(path, "old")
    monkeypatch.setattr(owner, function, no_space)
    with pytest.raises(mad.UserError, match=r"f\.json: cannot be written \(No space left on device\); free") as caught:
        mad.write_json(path, "new")
    assert caught.value.exit_code == mad.EXIT_FAILED
    assert "\n" not in str(caught.value)
    assert json.loads(path.read_text()) == "old"
    assert names(tmp_path) == {"f.json"}


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of that many bytes; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        path = disk / "f.pth"
        mad.write_tensors(path, {"kind": "model", "x": torch.arange(1000)})
        with pytest.raises(mad.UserError, match=r"f\.pth: cannot be written \(No space left on device\)"):
            mad.write_tensors(path, {"kind": "model", "x": torch.arange(10_000)})
        assert mad.read_tensors(path, "model")["x"].shape == (1000,)
        assert names(disk) == {"f.pth"}


def test_a_disk_that_fills_up_ends_a_run_with_one_line(
    phantoms: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the run before is still there and loads."""
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        command = ["--data-dir", phantoms, "--checkpoint", disk / "run.pth", *TINY]
        assert run_inside(*command) == 0
        model = (disk / "run.pth").read_bytes()
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"0" * 4096):
                pass
        capsys.readouterr()
        assert run_inside(*command, "--seed", "1") == mad.EXIT_FAILED
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert "cannot be written (No space left on device)" in errors[0]
        assert (disk / "run.pth").read_bytes() == model
        assert mad.read_tensors(disk / "run.pth", "model")["epoch"] == 1
        assert not [name for name in names(disk) if name.endswith(".tmp")]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "f.csv", tmp_path / "folder"):
        with pytest.raises(mad.UserError, match=f"{path}: cannot be written"):
            mad.write_csv(path, [], ("a",))
    assert names(tmp_path) == {"file", "folder"}


def test_what_a_killed_process_left_is_cleared_after_an_hour(tmp_path: Path) -> None:
    """Not at once: it may be another run's, still being written."""
    old, young, other = (tmp_path / name for name in (".f.csv.1.tmp", ".f.csv.2.tmp", ".g.csv.1.tmp"))
    for path in (old, young, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    mad.write_csv(tmp_path / "f.csv", [], ("a",))
    assert names(tmp_path) == {"f.csv", young.name, other.name}


def test_csv_cells(tmp_path: Path) -> None:
    """Undefined is an empty cell, floats come back as they were, and awkward names are quoted."""
    rows = [{"name": 'a,"b"\nc', "x": 1 / 3, "y": None}, {"name": "é", "x": math.nan, "y": 0.0}]
    mad.write_csv(tmp_path / "f.csv", rows, ("name", "x", "y"))
    with (tmp_path / "f.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"name": 'a,"b"\nc', "x": repr(1 / 3), "y": ""}, {"name": "é", "x": "", "y": "0.0"}]
    assert b"\r" not in (tmp_path / "f.csv").read_bytes()


def test_json_has_no_nan(tmp_path: Path) -> None:
    mad.write_json(tmp_path / "f.json", {"a": None, "b": [0.1]})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": None, "b": [0.1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        mad.write_json(tmp_path / "f.json", {"a": math.nan})
    assert names(tmp_path) == {"f.json"}


# ----- reading back --------------------------------------------------------------------------------------------------


def test_a_model_comes_back_as_it_was(model: Path) -> None:
    """By this program, and by torch.load alone, which needs no knowledge of the checksum."""
    wanted = model_content()
    for content in (mad.read_tensors(model, "model"), torch.load(model, weights_only=True)):
        assert content["format"] == "mura_anomaly_detection"
        assert content["version"] == mad.__version__
        assert {key: content[key] for key in wanted if key != "state_dict"} == {
            key: value for key, value in wanted.items() if key != "state_dict"}
        assert all(torch.equal(content["state_dict"][key], value) for key, value in wanted["state_dict"].items())
    member = mad.load_member(model, CPU)
    assert (member.temperature, member.normalization.mean, member.network.training) == (1.25, (0.4,) * 3, False)
    with zipfile.ZipFile(model) as archive:
        assert archive.testzip() is None


def test_the_model_of_a_training_run_loads_without_this_program(trained: Path) -> None:
    content = torch.load(trained, weights_only=True)
    assert {"model", "image_size", "normalization", "temperature", "threshold", "classes", "version"} <= content.keys()
    assert torch.load(trained.with_suffix(".last.pth"), weights_only=True)["kind"] == "state"


DAMAGED = r"m\.pth: (damaged|is not a checkpoint of this program, or is truncated)"


def test_every_flipped_byte_is_noticed(model: Path) -> None:
    """Of 200 places over the file, the first and the last among them, with one bit or all of them changed."""
    whole = model.read_bytes()
    for number, at in enumerate(np.linspace(0, len(whole) - 1, 200).astype(int)):
        flip = 0xFF if number % 2 else 1 << number % 8
        model.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        with pytest.raises(mad.UserError, match=DAMAGED):
            mad.read_tensors(model, "model")
    model.write_bytes(whole)
    assert mad.read_tensors(model, "model")


def test_every_truncation_is_noticed(model: Path) -> None:
    whole = model.read_bytes()
    lengths = np.linspace(0, len(whole) - 1, 60).astype(int)
    for length in {0, 1, 70, 71, 72, len(whole) - 71, len(whole) - 1, *lengths}:
        model.write_bytes(whole[:length])
        with pytest.raises(mad.UserError, match=DAMAGED):
            mad.read_tensors(model, "model")
    model.write_bytes(whole + b"\0")
    with pytest.raises(mad.UserError, match="truncated"):
        mad.read_tensors(model, "model")


def sealed(data: bytes) -> bytes:
    """Give data the checksum that read_tensors wants, as somebody who means harm would."""
    return data + mad.CHECKSUM_MARK + hashlib.sha256(data).hexdigest().encode()


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Change, cut out, double or overwrite a few stretches of bytes."""
    result = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at, length = int(random.integers(0, len(result))), int(random.integers(1, 40))
        piece = bytes(random.integers(0, 256, length, dtype=np.uint8))
        stretch = result[at : at + length]
        flipped = bytes([stretch[0] ^ 1 << int(piece[0] % 8)]) + stretch[1:]
        result[at : at + length] = (piece, b"", stretch * 2, bytes(length), flipped)[random.integers(0, 5)]
    return bytes(result) if result != data else mutate(data, random)


@pytest.mark.parametrize("seal", [False, True])
def test_mutated_models_give_an_error_for_the_user_or_load(model: Path, seal: bool) -> None:
    """1,000 files; where the checksum was made to fit, what loads must still be weights for this network."""
    random = np.random.default_rng(int(seal))
    whole = model.read_bytes()
    body = whole[: -64 - len(mad.CHECKSUM_MARK)]
    loaded = 0
    for _ in range(500):
        model.write_bytes(sealed(mutate(body, random)) if seal else mutate(whole, random))
        try:
            loaded += isinstance(mad.load_member(model, CPU), mad.Member)
        except mad.UserError as error:
            assert str(model) in str(error)
            assert "\n" not in str(error)
    assert loaded > 0 if seal else loaded == 0


def test_mutated_weights_give_an_error_for_the_user_or_load(tmp_path: Path, tiny: None) -> None:
    """500 files for --weights, which carry no checksum."""
    path, random = tmp_path / "w.pth", np.random.default_rng(3)
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 4)).state_dict(), path)
    whole = path.read_bytes()
    for _ in range(500):
        path.write_bytes(mutate(whole, random))
        with pytest.raises(mad.UserError, match=r"w\.pth"):
            mad.build_network("resnet50", str(path), 0)


# ----- the wrong file ------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(mad.UserError) as caught:
        mad.load_member(path, CPU)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_model_of_ours(tmp_path: Path, tiny: None) -> None:
    path = tmp_path / "f.pth"
    assert "cannot be read (No such file" in refusal(path)
    assert "cannot be read (Is a directory" in refusal(tmp_path)
    for content in (b"", b"GIF89a", b"\0" * 500):
        path.write_bytes(content)
        assert "not a checkpoint of this program" in refusal(path)
    torch.save(model_content(), path)
    assert "not a checkpoint of this program" in refusal(path)
    for content in ({"kind": "state"}, {"kind": "model", "format": "another program"}, {}):
        mad.write_tensors(path, content)
        assert "is not a model (STEM.pth) of this program" in refusal(path)


def test_a_state_is_not_a_model_and_a_model_is_no_state(tmp_path: Path, model: Path) -> None:
    with pytest.raises(mad.UserError, match=r"is not a saved state \(STEM.last.pth\)"):
        mad.read_tensors(model, "state")
    mad.write_tensors(tmp_path / "s.last.pth", {"kind": "state", "settings": {}, "trainer": {}})
    with pytest.raises(mad.UserError, match=r"s\.last\.pth: is not a model \(STEM.pth\)"):
        mad.build_network("resnet50", str(tmp_path / "s.last.pth"), 0)


@pytest.mark.parametrize("changes", [
    {"state_dict": {}}, {"state_dict": {1: 2}}, {"state_dict": None},
    {"state_dict": {"head.weight": torch.zeros(1, 7)}}, {"normalization": None}, {"normalization": {"kind": "given"}},
    {"normalization": {"kind": "given", "mean": 3, "std": 1}}, {"normalization": {"kind": "given", "mean": [0], "std": [1]}},
    {"fit": "crop"}, {"image_size": 0}, {"image_size": "big"}, {"temperature": None}, {"threshold": math.nan},
    {"patients": None},
])
def test_a_model_of_another_version_is_refused(tmp_path: Path, tiny: None, changes: dict[str, Any]) -> None:
    mad.write_tensors(tmp_path / "f.pth", model_content(**changes, version="9.9"))
    assert "another version of this program (9.9)" in refusal(tmp_path / "f.pth")


def test_a_model_that_lacks_something_is_refused(tmp_path: Path, tiny: None) -> None:
    for key in ("model", "image_size", "fit", "normalization", "temperature", "threshold", "patients", "state_dict"):
        content = model_content()
        del content[key]
        mad.write_tensors(tmp_path / "f.pth", content)
        assert "another version" in refusal(tmp_path / "f.pth")


def weights_refusal(path: Path, model: str = "resnet50") -> str:
    with pytest.raises(mad.UserError) as caught:
        mad.build_network(model, str(path), 0)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_another_architecture_is_refused_as_weights(model: Path) -> None:
    assert "is a resnet50, not a densenet169; add --model resnet50" in weights_refusal(model, "densenet169")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1)}, tmp_path / "w.pth")
    assert "does not fit densenet169" in weights_refusal(tmp_path / "w.pth", "densenet169")


def test_files_that_are_no_weights(tmp_path: Path, tiny: None) -> None:
    path = tmp_path / "w.pth"
    assert "no such file" in weights_refusal(path)
    assert "no such file" in weights_refusal(tmp_path)
    path.write_bytes(b"")
    assert "cannot be loaded as weights" in weights_refusal(path)
    for content in (torch.zeros(3), [1, 2], {1: torch.zeros(1)}):
        torch.save(content, path)
        assert "not a dict of weights by name" in weights_refusal(path)
    for content in ({}, {"state_dict": {}}):
        torch.save(content, path)
        assert "does not fit resnet50" in weights_refusal(path)


def test_a_damaged_model_is_no_source_of_weights(model: Path) -> None:
    """The checksum counts for --weights, too: torch by itself does not notice a changed number."""
    whole = bytearray(model.read_bytes())
    number = model_content()["state_dict"]["head.weight"].numpy().tobytes()
    whole[whole.index(number)] ^= 1
    model.write_bytes(whole)
    assert torch.load(model, weights_only=True)["kind"] == "model"
    assert "damaged" in weights_refusal(model)


# ----- the hostile file ----------------------------------------------------------------------------------------------


class Payload:
    """Unpickled without care, it runs a command or code that leaves a mark."""

    def __init__(self, mark: Path, how: str) -> None:
        self.mark, self.how = mark, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "os.system":
            return os.system, (f"touch '{self.mark}'",)
        return builtins.exec, (f"open({str(self.mark)!r}, 'w').close()",)


def hostile(path: Path, layout: str, payload: Payload) -> None:
    content = {"format": mad.PROGRAM, "kind": "model", "version": "1.0.0", "model": payload, "settings": payload}
    if layout == "sealed":
        mad.write_tensors(path, {"kind": "state" if path.name.endswith(".last.pth") else "model", **content})
    elif layout == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")


@pytest.mark.parametrize("how", ["os.system", "exec"])
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle", "sealed"])
@pytest.mark.parametrize("flag", ["--checkpoint", "--weights", "--resume"])
def test_a_hostile_file_is_refused_and_runs_nothing(
    phantoms: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str], flag: str, layout: str, how: str
) -> None:
    path, mark = tmp_path / ("evil.last.pth" if flag == "--resume" else "evil.pth"), tmp_path / "mark"
    hostile(path, layout, Payload(mark, how))
    if layout != "pickle":
        torch.load(path, weights_only=False)
        assert mark.exists(), "the file is armed: read without care, it does run"
        mark.unlink()
    arguments: dict[str, list[object]] = {
        "--checkpoint": ["--evaluate", "--data-dir", phantoms, "--checkpoint", path, "--device", "cpu"],
        "--weights": ["--data-dir", phantoms, *TINY, "--checkpoint", tmp_path / "new.pth", "--weights", path],
        "--resume": ["--data-dir", phantoms, *TINY, "--checkpoint", tmp_path / "evil.pth", "--resume"],
    }
    assert run_inside(*arguments[flag]) == mad.EXIT_USAGE
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert path.name in errors[0]
    assert not mark.exists()
    assert "new.pth" not in names(tmp_path)
