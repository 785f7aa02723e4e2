"""What the tests share: phantoms in MURA's layout, a small trained model, the real command."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")
SCRIPT = Path(__file__).resolve().parent.parent / "mura_anomaly_detection.py"
sys.path.insert(0, str(SCRIPT.parent))

from torch import nn  # noqa: E402

import mura_anomaly_detection as mura  # noqa: E402

# the smallest honest training run: random weights, 64 px, a few seconds on one core; in fp32, as
# --precision auto is bf16 on processors with AMX
TINY = (
    "--model", "resnet50", "--weights", "none", "--image-size", "64", "--normalization", "image",
    "--epochs", "1", "--batch-size", "8", "--lr", "0.001", "--precise-bn", "16",
    "--bootstrap", "100", "--device", "cpu", "--workers", "1", "--precision", "fp32",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --many, for a night's run; a test asks `request.config.getoption("many")`."""
    parser.addoption("--many", action="store_true", help="run the long crash and fuzz tests too")


def pytest_configure(config: pytest.Config) -> None:
    """Have -n start files in their order: the first, test_api.py, has the demo."""
    config.option.loadscopereorder = False


def run_command(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script as its user does, off a terminal; returns exit code, stdout and stderr."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, env=os.environ | environment,
        capture_output=True, text=True, timeout=1200, check=False, stdin=subprocess.DEVNULL,
    )


def run_inside(*arguments: object) -> int:
    """Run a command within this process, which saves the import of torch; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return mura.main(mura.parse_options([str(argument) for argument in arguments]))
    except SystemExit as left:  # wrong use; argparse has printed its line
        return int(left.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder MURA-v1.1 of phantoms, two body parts; not to be written to: see `phantom_copy`."""
    parts = ("XR_FOREARM", "XR_HUMERUS")
    return mura.write_phantoms(tmp_path_factory.mktemp("data"), 16, 8, parts, seed=1, size=96)


@pytest.fixture
def phantom_copy(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may spoil, without a cache."""
    ignored = shutil.ignore_patterns(".mura_cache")
    return Path(shutil.copytree(phantoms, tmp_path / "MURA-v1.1", ignore=ignored))


@pytest.fixture(scope="session")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of one finished tiny training run, with all its other files beside it."""
    checkpoint = tmp_path_factory.mktemp("trained") / "tiny.pth"
    assert run_inside("--data-dir", phantoms, "--checkpoint", checkpoint, *TINY) == 0
    return checkpoint


@pytest.fixture(scope="session")
def demo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The demo in an empty folder and HOME, as the README has it with --many, else of three epochs.

    Its folder, and what it printed.
    """
    home = tmp_path_factory.mktemp("home")
    shorter = () if request.config.getoption("many") else ("--epochs", "3")
    done = run_command("--demo", *shorter, cwd=home, HOME=str(home))
    assert done.returncode == 0, done.stderr
    return home / "mura_demo", done.stdout


class ThinResNet(nn.Module):
    """Submodules named as torchvision's ResNet-50 has them, one layer and a few channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 4, 4, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(), nn.Identity()
        self.layer1, self.layer2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 2, 2)
        self.layer3, self.layer4 = nn.Conv2d(6, 6, 2, 2), nn.Conv2d(6, 8, 2, 2)
        self.fc = nn.Linear(8, 1000)


@contextlib.contextmanager
def thin_networks() -> Iterator[None]:
    """Within it resnet50 is a ThinResNet: the arithmetic of a whole training run takes a second."""
    thin = replace(mura.ARCHITECTURES["resnet50"], constructor=ThinResNet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mura.ARCHITECTURES, "resnet50", thin)
        yield
