"""What the tests share: phantom radiographs in MURA's layout, a small trained model, and the real command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
SCRIPT = Path(__file__).resolve().parent.parent / "mura_anomaly_detection.py"
sys.path.insert(0, str(SCRIPT.parent))

import mura_anomaly_detection as mad  # noqa: E402

# the smallest honest run: random weights, 64 px, a few seconds on one core
TINY = ["--model", "resnet50", "--weights", "none", "--image-size", "64", "--normalization", "image", "--epochs", "1",
        "--batch-size", "8", "--lr", "0.001", "--bootstrap", "100", "--device", "cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --many, for a night's run."""
    parser.addoption("--many", action="store_true", help="kill training processes 200 times rather than 50")


def run_command(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its user does, off a terminal; returns exit code, stdout and stderr."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=1200, check=False, stdin=subprocess.DEVNULL,
    )


def run_inside(*arguments: object) -> int:
    """Run a command within this process, which saves the seconds that importing torch takes; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return mad.main(mad.parse_options([str(argument) for argument in arguments]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder (MURA-v1.1) of phantoms, two body parts; not to be written to: see `phantom_copy`."""
    return mad.write_phantoms(tmp_path_factory.mktemp("data"), 16, 8, ("XR_FOREARM", "XR_HUMERUS"), seed=1, size=96)


@pytest.fixture
def phantom_copy(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may spoil."""
    return Path(shutil.copytree(phantoms, tmp_path / "MURA-v1.1", ignore=shutil.ignore_patterns(".mura_cache")))


@pytest.fixture(scope="session")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of one finished tiny training run, with all its other files beside it."""
    checkpoint = tmp_path_factory.mktemp("trained") / "tiny.pth"
    assert run_inside("--data-dir", phantoms, "--checkpoint", checkpoint, *TINY) == 0
    return checkpoint


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo as the README has it, in an empty folder and with an empty HOME: its folder and what it printed."""
    home = tmp_path_factory.mktemp("home")
    done = run_command("--demo", cwd=home, HOME=str(home))
    assert done.returncode == 0, done.stderr
    return home / "mura_demo", done.stdout
