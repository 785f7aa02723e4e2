"""What stands outside the script: the three lists of packages agree, and the README's commands are ones the script takes."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import SCRIPT, run_inside
from tiny_run import TinyNetwork

import mura_anomaly_detection as mad

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REQUESTED = {"torch", "torchvision", "pillow", "matplotlib", "tqdm"}


def pep723() -> dict[str, object]:
    """The script's own metadata, read as PEP 723 says."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SCRIPT.read_text(encoding="utf-8"))
    assert block
    return tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\s]", line)[0] for line in requirements}


def test_the_lists_of_packages_are_the_same() -> None:
    script = pep723()["dependencies"]
    assert isinstance(script, list)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    from_pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    from_conda = [
        entry for entry in conda if isinstance(entry, str) and entry not in ("pip",) and not entry.startswith("python>")
    ]
    tests = [line.strip() for line in (ROOT / "tests/requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert set(script) == set(from_pip + from_conda)
    assert set(script) <= set(tests)
    assert names(script) == REQUESTED | {"numpy"}


def test_python_version_is_the_same_in_script_and_conda() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert f"python{pep723()['requires-python']}" in conda


def test_floor_of_torch_is_above_its_unsafe_loader() -> None:
    listed = pep723()["dependencies"]
    assert isinstance(listed, list) and {"torch>=2.10", "torchvision>=0.25"} <= set(listed)


def commands() -> list[str]:
    """The arguments of every command line in the README that calls the script."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) + re.findall(r"`([^`\n]+)`", README)
    lines = [line for block in blocks for line in block.splitlines() if "mura_anomaly_detection.py " in line]
    return [line.rpartition("mura_anomaly_detection.py ")[2] for line in lines]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_are_taken(line: str) -> None:
    mad.parse_options(shlex.split(line))


@pytest.fixture
def newcomer(phantom_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a reader follows the README: MURA-v1.1 (phantoms, with an elbow), an image, a study, more images.

    The network is a tiny one, which stands in for the ImageNet weights, too.
    """
    folder = phantom_copy.parent
    for file in phantom_copy.glob("*.csv"):
        file.unlink()
    for split in ("train", "valid"):
        (phantom_copy / split / "XR_HUMERUS").rename(phantom_copy / split / "XR_ELBOW")
    study = next((phantom_copy / "valid").glob("XR_ELBOW/*/*_positive"))
    shutil.copytree(study, folder / "study1_positive")
    shutil.copytree(study, folder / "more_images")
    shutil.copy(study / "image1.png", folder)
    monkeypatch.setattr(mad, "Network", TinyNetwork)
    monkeypatch.setattr(mad, "imagenet_state", lambda model: {})
    monkeypatch.setattr(mad, "load_torchvision", lambda network, state, name: None)
    monkeypatch.chdir(folder)
    return folder


def test_commands_of_the_readme_work_one_after_the_other(newcomer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The demo has tests of its own, with the real networks."""
    for line in commands():
        if "--demo" in line:
            continue
        if "densenet.pth" in line:  # of runs that the README leaves to its reader
            shutil.copy("paper.pth", "densenet.pth")
            shutil.copy("elbow.pth", "resnet.pth")
        assert run_inside(*shlex.split(line)) == 0, f"{line}\n{capfd.readouterr().err}"
    left = {path.name for path in newcomer.iterdir()}
    endings = (".pth", ".last.pth", ".history.csv", ".history.png", ".split.csv", ".valid.csv", ".report.json", ".report.png")
    assert left >= {"mura" + ending for ending in endings}
    assert left >= {"image1_heatmap.png", "results.csv", "figures"}
    assert all(f"`STEM{ending}`" in README or f"`{ending[-4:]}`" in README for ending in endings)


def test_examples_of_the_help_are_taken() -> None:
    lines = [
        line.strip() for line in (mad.__doc__ or "").splitlines() if line.strip().startswith("mura_anomaly_detection.py --")
    ]
    assert len(lines) >= 5
    for line in lines:
        mad.parse_options(shlex.split(line, comments=True)[1:])


def test_flags_named_in_the_readme_exist() -> None:
    # of torchrun, benchmark.py and recipe.py
    others = {"--nproc-per-node", "--quick", "--only", "--out", "--recipes", "--take", "--valid"}
    known = set(mad.build_parser()._option_string_actions) | others
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_what_the_readme_shows_is_there_and_nothing_is_left_to_fill_in() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", README)


def test_docstring_examples() -> None:
    import doctest

    result = doctest.testmod(mad)
    assert result.attempted >= 8
    assert result.failed == 0


def test_top_level_holds_the_four_and_nothing_else() -> None:
    agreed = {"README.md", "environment.yml", "mura_anomaly_detection.py", "tests"}
    ignored = {"__pycache__", "mura_demo", "MURA-v1.1"}
    assert {path.name for path in Path(ROOT).iterdir() if path.name[0] != "."} - ignored == agreed
