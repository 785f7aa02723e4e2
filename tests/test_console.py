"""Block 2, console and files: files whole or not at all, damage noticed, signals heard."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import pickle
import resource
import signal
import stat
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_inside

import mura_anomaly_detection as mura

AWKWARD = ["骨" * 80 + ".png", "x**y.png", "*.pth", "a[1].csv", "what?.json", "{a,b}.csv",
           " b .csv", "-rf.csv", "é\u0301.png"]
Whole = tuple[dict[str, Any], bytes]
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def in_child(action: Callable[[], object]) -> tuple[int, int]:
    """Run an action in a process of its own; returns its exit code (9: it raised), its signal."""
    child = os.fork()
    if child == 0:
        code = 9
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status), os.WTERMSIG(status)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail rather than wait or fill the memory for ever."""
    def late(*_: object) -> None:
        raise TimeoutError("still reading")

    before = signal.signal(signal.SIGALRM, late)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, memory[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can become larger than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- atomic writes ----


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "f.bin"
    for content, before in ((b"one", None), (b"two", b"one")):
        with mura.temporary_file(path) as temporary:
            temporary.write_bytes(content)
            assert temporary.parent == path.parent  # or a rename would copy
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    mura.atomic_write(path, b"three")
    assert path.read_bytes() == b"three" and names(path.parent) == {"f.bin"}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")

    def killed() -> None:
        setattr(os, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        mura.atomic_write(path, b"half of the new one")

    assert in_child(killed) == (0, signal.SIGKILL)
    assert path.read_bytes() == b"old"
    (left,) = names(tmp_path) - {"f.bin"}
    assert left.startswith(".")  # nobody takes it for a result


def test_content_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure tests: content, then name, then the folder that holds the name."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "content")
        fsync(number)

    def noted_rename(*arguments: Any, **options: Any) -> None:
        calls.append("name")
        rename(*arguments, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    mura.atomic_write(tmp_path / "f.bin", b"content")
    assert calls == ["content", "name", "folder"]


@pytest.mark.parametrize("failure", [
    OSError(errno.EIO, "from the scanner"), ValueError("mine"), KeyboardInterrupt(),
    mura.Stopped(15)])
def test_a_failure_of_the_caller_stays_what_it_is(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)) as caught, mura.temporary_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert caught.value is failure
    assert path.read_bytes() == b"old" and names(tmp_path) == {"f.bin"}


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    mura.write_checkpoint(path, {"kind": "model", "x": torch.arange(1000)})
    with disk_of(64 * 1024), pytest.raises(mura.UserError) as caught:
        mura.write_checkpoint(path, {"kind": "model", "x": torch.arange(100_000)})
    assert str(caught.value).startswith(f"{path}: cannot be written (File too large); free space")
    assert caught.value.exit_code == mura.EXIT_FAILED
    assert mura.read_checkpoint(path, "model")["x"].shape == (1000,)
    assert names(tmp_path) == {"f.pth"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_no_space_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "f.json"
    path.write_text("old")
    monkeypatch.setattr(os, function, full)
    said = r"f\.json: cannot be written \(No space left on device\)"
    with pytest.raises(mura.UserError, match=said):
        mura.atomic_write(path, b"new")
    assert path.read_text() == "old" and names(tmp_path) == {"f.json"}


def test_a_full_disk_ends_a_run_with_one_line(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first file that training writes; the cache of decoded images is there already."""
    command = ["--data-dir", phantoms, "--checkpoint", tmp_path / "run.pth", *TINY]
    mura.MuraDataset.from_folder(phantoms, "train", size=64)
    with disk_of(100):
        assert run_inside(*command) == mura.EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (File too large); free space" in line
    assert names(tmp_path) == set()


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o444])
def test_the_mode_of_an_earlier_file_stays(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes(b"old")
    path.chmod(mode)
    mura.atomic_write(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_a_new_file_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        mura.atomic_write(tmp_path / "f.json", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "f.json").stat().st_mode & 0o777 == mode


def test_a_links_target_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    link, target = tmp_path / "m.pth", tmp_path / "big disk" / "m.pth"
    link.symlink_to(Path("big disk") / "m.pth")
    for content in (b"one", b"two"):  # the link hangs at first
        mura.require_writable(link)
        mura.atomic_write(link, content)
        assert link.is_symlink() and not target.is_symlink()
        assert target.read_bytes() == content
    assert names(tmp_path / "big disk") == {"m.pth"}


@pytest.mark.parametrize("name", [*AWKWARD, "n" * 250 + ".png"])
def test_names_are_names_and_no_patterns(tmp_path: Path, name: str) -> None:
    others = {"xy.png", "a.pth", "a1.csv", "whats.json", ".a.pth.0.tmp", ".xy.png.0.tmp"}
    for other in others:
        (tmp_path / other).write_bytes(b"other")
        os.utime(tmp_path / other, (0, 0))
    path = tmp_path / name
    mura.require_writable(path)
    for content in (b"one", b"two"):
        mura.atomic_write(path, content)
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == {*others, name}


def test_what_killed_processes_left_is_removed_after_a_while(tmp_path: Path) -> None:
    """Not at once: it may be another process's, which is still writing."""
    path, old, young = tmp_path / "f.csv", tmp_path / "old", tmp_path / "young"
    for kept in (old, young):
        with contextlib.suppress(RuntimeError), mura.temporary_file(path) as temporary:
            temporary.write_bytes(b"half")
            kept.write_text(str(temporary))
            raise RuntimeError
    stale, fresh = Path(old.read_text()), Path(young.read_text())
    assert stale != fresh  # two processes never write to one temporary file
    for left in (stale, fresh):
        left.write_bytes(b"half")
    foreign = {".f.csv.0.tmp", ".f.csv.0123456789ab.tmp", stale.name.replace(".tmp", "0.tmp"),
               f".{mura.PROGRAM}.0a1b.tmp", f".{mura.PROGRAM}.notes.tmp"}
    for name in foreign:
        (tmp_path / name).write_bytes(b"another program's")
    for left in (stale.name, *foreign):
        os.utime(tmp_path / left, (time.time() - 25 * 3600,) * 2)
    os.utime(fresh, (time.time() - 30 * 60,) * 2)  # a large file on a slow disk
    mura.atomic_write(path, b"")
    assert names(tmp_path) == {*foreign, fresh.name, "f.csv", "old", "young"}


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file/f.csv")  # what counts is the place it points to
    for name in ("file/f.csv", "folder", "file/g/f.csv", "link", "n" * 300):
        path = tmp_path / name
        for call in (mura.require_writable, lambda path: mura.atomic_write(path, b"")):
            with pytest.raises(mura.UserError) as caught:
                call(path)
            assert str(caught.value).startswith(f"{path}: cannot be written (")
            assert caught.value.exit_code == mura.EXIT_FAILED
    mura.require_writable(tmp_path / "new" / "f.csv")
    assert names(tmp_path) <= {"file", "folder", "link", "new"}
    assert not (tmp_path / "new" / "f.csv").exists()


def test_a_link_that_hangs_is_there(tmp_path: Path) -> None:
    """As where the disk with a model is not mounted: another file must not take its name."""
    link = tmp_path / "m.pth"
    link.symlink_to("nowhere.pth")
    mura.require_new([tmp_path / "other.pth"], "a remedy")
    with pytest.raises(mura.UserError, match=r"m\.pth: is there already; a remedy"):
        mura.require_new([tmp_path / "other.pth", link], "a remedy")


def test_the_programs_name_tells_whose_a_file_is(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    for content, ours in ((b"path,version\na.png,mura_anomaly_detection 2.0.0\n", True), (b"", False),
                          (b"path,prediction\na.png,normal\n", False),
                          (b"\x89PNG tEXt mura_anomaly_detection", True)):
        path.write_bytes(content)
        assert mura.is_ours(path) == ours, content
    assert not mura.is_ours(tmp_path) and not mura.is_ours(tmp_path / "none")


def test_writing_leaves_nothing_open(tmp_path: Path) -> None:
    """A long run writes thousands of states and rows."""
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        mura.atomic_write(tmp_path / "f.csv", mura.PROGRAM.encode())
        mura.require_writable(tmp_path / "f.csv")
        assert mura.is_ours(tmp_path / "f.csv")
        with mura.run_lock(tmp_path / "run.lock"):
            pass
        with contextlib.suppress(mura.UserError):
            mura.read_weights(tmp_path / "f.csv", "a remedy")
        with (tmp_path / "log").open("w") as closed:
            stream = mura.SafeStream(closed)
        stream.write("lost")
    assert descriptors() == before


# ---- CSV, JSON, text on a terminal ----


def test_a_csv_comes_back_as_it_was() -> None:
    rows = [{"name": 'a,"b"', "x": 1 / 3, "y": None},
            {"name": "é ", "x": math.nan, "y": 0.0, "z": 1}]
    content = mura.csv_text(rows, ("name", "x", "y"))
    assert list(csv.DictReader(io.StringIO(content.decode(), newline=""))) == [
        {"name": 'a,"b"', "x": repr(1 / 3), "y": ""}, {"name": "é ", "x": "", "y": "0.0"}]
    assert mura.csv_text([], ("a", "b")) == b"a,b\n"


@pytest.mark.parametrize("char", ["\r", "\n", "\r\n", "\x1b[2J", "\0", "\x7f", "\x9b2J", "\x85"])
def test_control_characters_in_a_csv_cannot_break_a_row_or_a_terminal(char: str) -> None:
    content = mura.csv_text([{"path": f"a{char}b.png", "x": 1}], ("path", "x"))
    text = content.decode()
    assert len(text.splitlines()) == 2 and all(c == "\n" or c.isprintable() for c in text)
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row == {"path": "a" + char.encode("unicode_escape").decode() + "b.png", "x": "1"}


def test_bytes_that_are_no_text_stay_in_a_csv() -> None:
    assert mura.csv_text([{"p": os.fsdecode(b"p\xe9.png")}], ("p",)) == b"p\np\xe9.png\n"


def test_json_has_no_nan() -> None:
    assert json.loads(mura.json_text({"a": None, "b": [0.1]})) == {"a": None, "b": [0.1]}
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            mura.json_text({"a": value})


@pytest.mark.parametrize(("text", "shown"), [
    ("study1/image é 骨.png", "study1/image é 骨.png"), ("a\x1b]0;x\x07b", r"a\x1b]0;x\x07b"),
    ("two\nlines\r\t", r"two\nlines\r\t"), ("\x9b2J\x7f", r"\x9b2J\x7f"),
    ("gnp.\u202egpj", r"gnp.\u202egpj"), (os.fsdecode(b"p\xe9"), r"p\udce9"), ("", ""),
    ("\u2028", r"\u2028"), ("a\\nb", "a\\nb"),
])
def test_what_is_printed_holds_no_control_character(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mura.printable(text) == shown
    mura.log(text)
    mura.warn(text)
    assert capsys.readouterr() == (f"{shown}\n", f"mura_anomaly_detection: {shown}\n")


# ---- checkpoints ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What a checkpoint holds, and the bytes of its file."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(40, 40, generator=generator) for i in range(30)}
    content = {"kind": "model", "state_dict": weights, "threshold": 0.3, "tasks": ["XR_HAND"]}
    path = tmp_path_factory.mktemp("whole") / "m.pth"
    digest = mura.write_checkpoint(path, content)
    assert digest == mura.digest(path.read_bytes())
    return content, path.read_bytes()


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a checkpoint holds what was written, to the last bit."""
    mine, theirs = wanted["state_dict"], found.get("state_dict", {})
    plain = all(found.get(key) == value for key, value in wanted.items() if value is not mine)
    names_agree = set(found) == {*wanted, "format", "version"} and set(mine) == set(theirs)
    return plain and names_agree and all(torch.equal(theirs[key], mine[key]) for key in mine)


def refusal(path: Path, kind: str = "model") -> str:
    """The line with which a checkpoint is refused."""
    with pytest.raises(mura.UserError) as caught:
        mura.read_checkpoint(path, kind)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert caught.value.exit_code == mura.EXIT_USAGE
    return line


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, whole: Whole) -> None:
    """By this program, and by torch.load alone."""
    path = tmp_path / "m.pth"
    path.write_bytes(whole[1])
    for found in (mura.read_checkpoint(path, "model"), torch.load(path, weights_only=True)):
        assert same(found, whole[0])
        assert (found["format"], found["version"]) == ("mura_anomaly_detection", mura.__version__)


def test_one_flipped_bit_is_refused(
    tmp_path: Path, whole: Whole, request: pytest.FixtureRequest
) -> None:
    """Or it changes nothing: in the date of an entry of the archive, or in its padding."""
    content, data = whole
    path, random = tmp_path / "m.pth", np.random.default_rng(1)
    loaded, count = 0, 4000 if request.config.getoption("many") else 200
    for at in random.integers(0, len(data), count).tolist():
        flipped = bytes([data[at] ^ 1 << int(random.integers(8))])
        path.write_bytes(data[:at] + flipped + data[at + 1 :])
        try:
            found = mura.read_checkpoint(path, "model")
        except mura.UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            continue
        assert same(found, content), at
        loaded += 1
    assert loaded <= count // 20
    first = content["state_dict"]["layer7.weight"].numpy().tobytes()
    at = data.index(first)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert torch.load(path, weights_only=True)["kind"] == "model"  # torch by itself takes it
    assert "damaged" in refusal(path)


def test_every_truncation_is_refused(tmp_path: Path, whole: Whole) -> None:
    path, data = tmp_path / "m.pth", whole[1]
    for length in {1, 4, 100, *np.linspace(0, len(data) - 1, 40).astype(int).tolist()}:
        path.write_bytes(data[:length])
        refusal(path)


@pytest.mark.parametrize("compressed", ["all", "one"])
def test_a_compressed_archive_is_refused_unread(
    compressed: str, tmp_path: Path, whole: Whole
) -> None:
    """torch.save writes none, and a small file could fill the memory: one entry is enough for it."""
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(io.BytesIO(whole[1])) as source, zipfile.ZipFile(path, "w") as target:
        for number, entry in enumerate(source.infolist()):
            how = zipfile.ZIP_DEFLATED if compressed == "all" or number == 1 else zipfile.ZIP_STORED
            target.writestr(entry.filename, source.read(entry), how)
    assert torch.load(path, weights_only=True)["kind"] == "model"
    assert "compressed" in refusal(path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    assert "cannot be read (No such file" in refusal(path) or "no such file" in refusal(path)
    assert "not a file" in refusal(tmp_path)
    for junk in (b"", b"GIF89a", b"\0" * 500, b"PK\x03\x04" + b"x" * 100, b"\x80\x02}q\0."):
        path.write_bytes(junk)
        refusal(path)
    for other in (torch.zeros(3), [1, 2], {}, {"state_dict": {}}, {"kind": "model"},
                  {"kind": "model", "format": "another program"}):
        torch.save(other, path)
        refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")
    refusal(path)


def test_what_torch_warns_of_stays_away_from_the_terminal(
    tmp_path: Path, whole: Whole, recwarn: pytest.WarningsRecorder
) -> None:
    """A zip archive that could be TorchScript."""
    path = tmp_path / "m.pth"
    path.write_bytes(whole[1])
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/constants.pkl", b"")
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=True)
    assert "TorchScript" in str(recwarn.pop(UserWarning).message)
    assert "damaged" in refusal(path)
    assert not recwarn.list


def test_a_model_is_no_state_and_a_state_no_model(tmp_path: Path) -> None:
    for kind, other in (("model", "state"), ("state", "model")):
        mura.write_checkpoint(tmp_path / "f.pth", {"kind": kind})
        assert mura.read_checkpoint(tmp_path / "f.pth", kind)["kind"] == kind
        assert "is another kind of file" in refusal(tmp_path / "f.pth", other)


@pytest.mark.parametrize(("kind", "remedy"), {
    "model": "--checkpoint wants the .pth file that training wrote",
    "state": "--resume wants the .last.pth file that training wrote",
}.items())
def test_the_flag_that_took_a_wrong_file_is_named(tmp_path: Path, kind: str, remedy: str) -> None:
    path = tmp_path / "f.pth"
    assert refusal(path, kind).endswith(f"; {remedy}")
    path.write_bytes(b"junk")
    assert refusal(path, kind).endswith(f"; {remedy}")


@pytest.mark.parametrize("kind", ["zeros", "fifo", "null"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = {"zeros": Path("/dev/zero"), "fifo": tmp_path / "f.pth"}.get(kind, Path(os.devnull))
    if kind == "fifo":
        os.mkfifo(path)
    with at_most(5):
        assert "not a file" in refusal(path)
        with pytest.raises(mura.UserError, match="not a file"):
            mura.read_weights(path, "a remedy")


class Payload:
    """Unpickled without care, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("flag", ["--checkpoint", "--weights", "--resume"])
def test_code_in_a_file_is_not_run(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, layout: str
) -> None:
    path = tmp_path / ("evil.last.pth" if flag == "--resume" else "evil.pth")
    mark = tmp_path / "mark"
    content = {"format": mura.PROGRAM, "kind": "state" if flag == "--resume" else "model",
               "version": mura.__version__, "settings": Payload(mark), "state_dict": {}}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content, 2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        torch.load(path, weights_only=False)
    mark.rmdir()  # it was armed: read without care, it does run
    training = ["--data-dir", phantoms, *TINY, "--checkpoint"]
    arguments: dict[str, list[object]] = {
        "--checkpoint": ["--predict", phantoms, "--checkpoint", path, "--device", "cpu"],
        "--weights": [*training, tmp_path / "n.pth", "--weights", path],
        "--resume": [*training, tmp_path / "evil.pth", "--resume"],
    }
    assert run_inside(*arguments[flag]) == mura.EXIT_USAGE
    (line,) = [text for text in capsys.readouterr().err.splitlines() if path.name in text]
    assert "other things than tensors" in line or "no file of weights" in line
    assert not mark.exists()
    assert names(tmp_path) == {path.name}


def test_safetensors_are_read_where_their_package_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    values = np.array([1.5, -2], np.float32)
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors", None)
        without.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(mura.UserError, match="pip install safetensors"):
            mura.read_weights(path, "a remedy")
    pytest.importorskip("safetensors")
    assert mura.read_weights(path, "a remedy")["a"].tolist() == [1.5, -2]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(mura.UserError, match="damaged"):
        mura.read_weights(path, "a remedy")


# ---- one run at a time ----


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.lock"
    with mura.run_lock(path):
        assert in_child(mura.run_lock(path).__enter__)[0] == 9
        with pytest.raises(mura.UserError, match="another run with this --checkpoint") as caught:
            mura.run_lock(path).__enter__()
        assert caught.value.exit_code == mura.EXIT_FAILED
        with mura.run_lock(tmp_path / "other.lock"):
            pass
        with pytest.raises(mura.UserError):  # the refused ones took nothing away
            mura.run_lock(path).__enter__()
    with mura.run_lock(path):
        pass
    assert names(path.parent) == set()


@pytest.mark.parametrize("third", [False, True])
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, third: bool
) -> None:
    """The run that held it ends between `open` and lock; a third may have made the file anew."""
    path, lock = tmp_path / "run.lock", fcntl.flock

    def late(file: Any, operation: int) -> None:
        path.unlink()
        if third:
            path.touch()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(mura.UserError, match="another run"):
        mura.run_lock(path).__enter__()
    assert path.exists() == third


@pytest.mark.parametrize("content", [b"mine", b"SQLite format 3\0"])
def test_a_foreign_file_in_the_place_of_the_lock_stays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    with pytest.raises(mura.UserError, match=r"run\.lock: is in the way"):
        mura.run_lock(path).__enter__()
    assert path.read_bytes() == content


def test_a_lock_that_a_crash_left_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"

    def crash() -> None:
        with mura.run_lock(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(crash) == (0, signal.SIGKILL)
    assert path.exists()
    assert names(tmp_path) == {"run.lock"}
    with mura.run_lock(path):
        assert in_child(mura.run_lock(path).__enter__)[0] == 9


def test_a_failing_run_gives_its_lock_back(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), mura.run_lock(tmp_path / "run.lock"):
            raise ZeroDivisionError
    assert names(tmp_path) == set()


def test_a_lock_in_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(mura.UserError, match="cannot be written"):
        mura.run_lock(tmp_path / "file" / "r.lock").__enter__()


# ---- output that fails ----


def full_disk() -> Any:
    return Path("/dev/full").open("w")


def gone_terminal() -> Any:
    leader, follower = os.openpty()
    os.close(leader)
    return os.fdopen(follower, "w")


def full_pipe() -> Any:
    _, number = os.pipe()
    fcntl.fcntl(number, fcntl.F_SETFL, os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(number, b"x" * 4096)
    return os.fdopen(number, "w")


def unread_pipe() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_number() -> Any:
    file = Path(os.devnull).open("w")  # noqa: SIM115
    os.close(file.fileno())
    return file


BROKEN: dict[str, tuple[Callable[[], Any], bool]] = {  # how to make one; whether output was lost
    "EIO": (gone_terminal, True), "ENOSPC": (full_disk, True),
    "EAGAIN": (full_pipe, True), "EPIPE": (unread_pipe, False), "EBADF": (closed_number, True),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_stream_that_fails_does_not_end_the_work(kind: str) -> None:
    """A closed pipe is no loss: the reader, such as `head`, has seen enough."""
    make, is_lost = BROKEN[kind]
    inner = make()
    stream = mura.SafeStream(inner)
    assert not stream.lost
    for text in ("one\n", "two\n" * 5000, "", "three\n"):
        assert stream.write(text) == len(text)
        stream.flush()
    assert bool(stream.lost) == is_lost
    inner.close()  # as the interpreter does at its end: nothing is left to fail


def test_a_stream_that_was_closed_does_not_end_the_work() -> None:
    inner = io.StringIO()
    stream = mura.SafeStream(inner)
    inner.close()
    assert stream.write("text") == 4 and stream.lost
    stream.flush()


def test_a_stream_that_works_is_written_through(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        stream = mura.SafeStream(file)
        print("one", "é", file=stream, flush=True)
        assert (tmp_path / "log").read_text(encoding="utf-8") == "one é\n"
        assert (stream.encoding, stream.fileno()) == ("utf-8", file.fileno())
        assert not stream.lost


@pytest.mark.parametrize(("kind", "code"), {"EIO": 1, "ENOSPC": 1, "EAGAIN": 1, "EPIPE": 0}.items())
@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_the_exit_code_says_that_output_was_lost(
    monkeypatch: pytest.MonkeyPatch, kind: str, code: int, which: str
) -> None:
    """A command that succeeds, with a stream that fails under it."""
    done = []

    def command(*_: object) -> int:
        for number in range(3):
            mura.log(f"a result {number}")
            mura.warn(f"a warning {number}")
            done.append(number)
        return 0

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.setattr(sys, which, BROKEN[kind][0]())
    monkeypatch.setattr(mura, "main", command)
    assert mura.run_as_script(mura.Config()) == code
    assert done == [0, 1, 2]
    if which == "stdout":
        told = "stdout: could not be written" in sys.stderr.stream.getvalue()
        assert told == bool(code)


def test_streams_that_are_not_there_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `>&- 2>&-`, where Python has None for them."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(mura, "main", lambda config: mura.log("x") or mura.warn("x") or 3)
    assert mura.run_as_script(mura.Config()) == 3


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_output_for_a_stream_that_was_closed_is_lost(
    monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """A command that succeeds; as after `>&-` a script would go on without the results."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if name == closed else io.StringIO())
    monkeypatch.setattr(mura, "main", lambda config: mura.log("x") or 0)
    assert mura.run_as_script(mura.Config()) == mura.EXIT_FAILED
    if closed == "stdout":
        assert "stdout: could not be written" in sys.stderr.stream.getvalue()


def test_a_hangup_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal has gone, as where a connection broke."""
    hung_up: list[int] = []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.setattr(mura, "main", lambda config: os.kill(os.getpid(), signal.SIGHUP) or 0)
    before = signal.signal(signal.SIGHUP, lambda signum, frame: hung_up.append(signum))
    try:
        assert mura.run_as_script(mura.Config()) == 0 and not hung_up
    finally:
        signal.signal(signal.SIGHUP, before)


def test_names_that_the_encoding_lacks_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(mura, "main", lambda config: mura.log("骨.png") or 0)
        assert mura.run_as_script(mura.Config()) == 0
    assert (tmp_path / "log").read_text() == "\\u9aa8.png\n"


# ---- progress ----


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_name_that_fits_is_left_as_it_is() -> None:
    assert [mura.shorten("patient1", width) for width in (9, 8, 7)] == [
        "patient1", "patient1", "pat~nt1"]


def test_progress_is_a_line_a_minute_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, err = [1000.0], io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with mura.Progress(200, "epoch 1/5", done=10) as bar:
        for _ in range(13):
            clock[0] += 11
            bar.advance(5, "loss 0.693")
    first, second = err.getvalue().splitlines()
    for line, count in ((first, " 40/200 "), (second, " 70/200 ")):
        assert line.startswith("mura_anomaly_detection: epoch 1/5: ") and count in line
        assert line.endswith(", loss 0.693]") and line.isascii()


def test_progress_is_a_bar_on_a_terminal_and_lines_stay_above_it(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    err, out = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    with mura.Progress(20, "epoch 1/5", "file") as bar:
        bar.advance(10, "loss 0.693")
        mura.log("a result")
        time.sleep(0.15)  # tqdm draws at most ten times a second
        bar.advance(5, "loss 0.5")
    assert all(text in err.getvalue() for text in ("epoch 1/5", "15/20", "loss 0.5"))
    assert "\n" not in err.getvalue(), "it goes when it is done: results stay"
    assert mura.PROGRAM not in err.getvalue(), "no lines beside the bar"
    assert out.getvalue().endswith("a result\n")


def test_a_bar_of_work_that_goes_on_begins_where_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    with mura.Progress(20, "epoch 1/5", done=15):
        pass
    assert " 15/20 " in err.getvalue() and " 0/20 " not in err.getvalue()


@pytest.mark.parametrize(("rank", "drawn"), [("0", True), ("1", False)])
def test_only_the_first_process_draws_a_bar(
    monkeypatch: pytest.MonkeyPatch, rank: str, drawn: bool
) -> None:
    for name, value in zip(DISTRIBUTED, (rank, "2", rank, "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    with mura.Progress(20, "epoch 1/5") as bar:
        bar.advance(10)
    assert bool(err.getvalue()) == drawn


# ---- signals ----


def test_a_signal_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(mura.Stopped) as caught, mura.StopSignals():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert caught.value.exit_code == 128 + number
        assert str(caught.value) == f"stopped by {signal.Signals(number).name}"
        assert capfd.readouterr().err == "\nmura_anomaly_detection: stopping\n"
    assert not issubclass(mura.Stopped, Exception)  # no `except Exception` takes it


def test_a_deferred_signal_is_acknowledged_and_waits_for_the_check(
    capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(mura.Stopped) as caught, mura.StopSignals() as signals:
        with signals.deferred():
            signals.check()
            for _ in range(3):  # torchrun and a scheduler may both send it
                os.kill(os.getpid(), signal.SIGTERM)
            assert capfd.readouterr().err == (
                "\nmura_anomaly_detection: stopping after this batch; Ctrl-C again stops at once\n")
            with pytest.raises(mura.Stopped):
                signals.check()
        signals.check()
    assert caught.value.exit_code == 143


def test_a_signal_is_heard_where_stderr_has_gone() -> None:
    """It waits for the check as ever: what there is to save is saved."""
    def stopped() -> None:
        os.close(2)
        with pytest.raises(mura.Stopped), mura.StopSignals() as signals:
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                saved.append("state")
            saved.append("went on")
        assert saved == ["state"]

    saved: list[str] = []
    assert in_child(stopped) == (0, 0)


def test_after_the_deferral_a_signal_stops_at_once_again() -> None:
    with pytest.raises(mura.Stopped), mura.StopSignals() as signals:
        with contextlib.suppress(ValueError), signals.deferred():
            raise ValueError
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_second_ctrl_c_ends_the_process_the_plain_way() -> None:
    def stubborn() -> None:
        with mura.StopSignals() as signals, signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert in_child(stubborn) == (0, signal.SIGINT)


def test_a_ctrl_c_after_a_sigterm_ends_the_process_too() -> None:
    def stubborn() -> None:
        with mura.StopSignals() as signals, signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert in_child(stubborn) == (0, signal.SIGINT)


def test_the_handlers_of_before_are_restored() -> None:
    def mine(*_: object) -> None: ...

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, mine) for number in numbers]
    try:
        for failure in (None, mura.Stopped(2), ValueError()):
            with contextlib.suppress(BaseException), mura.StopSignals():
                assert mine not in map(signal.getsignal, numbers)
                if failure:
                    raise failure
            assert [signal.getsignal(number) for number in numbers] == [mine, mine]
        with pytest.raises(mura.Stopped), mura.StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert [signal.getsignal(number) for number in numbers] == [mine, mine]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_thread_installs_no_handlers() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with mura.StopSignals() as signals, signals.deferred():
            signals.check()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


# ---- processes of torchrun ----


def test_stray_variables_of_a_scheduler_do_not_make_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = dict(zip(DISTRIBUTED, ("1", "4", "1", "localhost", "29500"), strict=True))
    for missing in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        for name in DISTRIBUTED:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            if name != missing:
                monkeypatch.setenv(name, value)
        assert not mura.is_distributed()
        alone = mura.Distributed()
        assert (alone.rank, alone.world_size, alone.local_rank) == (0, 1, 0)
        mura.log("a result")
        mura.warn("a warning")
        assert capsys.readouterr() == ("a result\n", "mura_anomaly_detection: a warning\n")
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert mura.is_distributed()
    job = mura.Distributed()
    assert (job.rank, job.world_size, job.local_rank) == (1, 4, 1)


def test_only_the_first_process_prints_but_each_says_why_it_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, out in (("0", "a result\n"), ("2", "")):
        for name, value in zip(DISTRIBUTED, (rank, "4", rank, "localhost", "29500"), strict=True):
            monkeypatch.setenv(name, value)
        mura.log("a result")
        mura.warn("a warning")
        mura.warn("boom", failed=True)
        found = capsys.readouterr()
        assert found.out == out
        mark = "" if rank == "0" else " (rank 2)"
        assert found.err.splitlines()[-1] == f"mura_anomaly_detection{mark}: boom"
        assert ("a warning" in found.err) == (rank == "0")


def test_a_process_alone_gathers_and_sums_its_own(tmp_path: Path) -> None:
    alone = mura.Distributed()
    assert alone.gather([3, 5]) == [3, 5]
    assert alone.sum(torch.tensor([1.5, 2.0])) == [1.5, 2.0]
    alone.wait()
    alone.wait_for_decoding()
    alone.require_shared(tmp_path)


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_some_machine_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    job = mura.Distributed()
    monkeypatch.setattr(job, "gather", lambda seen: [*seen, shared])
    (tmp_path / "run.lock").touch()
    refusal = pytest.raises(mura.UserError, match=f"{tmp_path}: is not shared by all machines")
    with contextlib.nullcontext() if shared else refusal:
        job.require_shared(tmp_path / "run.lock")
    with pytest.raises(mura.UserError, match="is not shared"):
        job.require_shared(tmp_path / "missing.lock")


def test_a_lock_does_not_remove_a_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "poetry.lock"
    path.write_text("important")
    with pytest.raises(mura.UserError, match="not of this program"), mura.run_lock(path):
        pass
    assert path.read_text() == "important"
