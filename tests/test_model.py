"""Section 6, the model: it is torchvision's network, it loads what people have, and it says what does not fit."""

from __future__ import annotations

import functools
import hashlib
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import mura_anomaly_detection as mad

MODELS = ("densenet169", "resnet50")
HUB_FILES = {"densenet169": "densenet169-b2777c0a.pth", "resnet50": "resnet50-0676ba61.pth"}


@functools.cache
def torchvision_network(model: str) -> Any:
    """Make torchvision's own classifier (not to be changed), all random: fresh norms would hide a wrong order."""
    torch.manual_seed(3)
    network = getattr(torchvision.models, model)()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
            module.momentum = 0.5
    with torch.no_grad():  # brings the running figures near the true ones, so that nothing overflows
        network.train()(torch.randn(4, 3, 64, 64))
    return network.eval()


@pytest.fixture(scope="module", params=MODELS)
def torchvision_twin(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Give the name of an architecture and torchvision's network with 1,000 classes."""
    return request.param, torchvision_network(request.param)


def loaded(model: str, state: dict[str, Any]) -> mad.Network:
    """Make our network of a torchvision state_dict."""
    network = mad.build_network(model, "none", seed=0)
    mad.load_torchvision(network, state, "some.pth")
    return network.eval()


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two networks hold the same tensors, bit for bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_forward_is_that_of_torchvision(torchvision_twin: tuple[str, Any]) -> None:
    """Same weights, torchvision's 1,000 classes replaced by ours: the same logit."""
    model, twin = torchvision_twin
    network = loaded(model, twin.state_dict())
    name = "classifier" if model == "densenet169" else "fc"
    before = getattr(twin, name)
    setattr(twin, name, network.head)
    images = torch.randn(3, 3, 96, 64)
    with torch.inference_mode():
        theirs, ours = twin(images)[:, 0], network(images)
    setattr(twin, name, before)
    assert ours.shape == (3,)
    assert theirs.std() > 1e-3, "three images with the same logit would prove nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_features_are_rectified_maps_and_classify_is_their_pooling(torchvision_twin: tuple[str, Any]) -> None:
    model, twin = torchvision_twin
    network = loaded(model, twin.state_dict())
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        maps = network.features(images)
        assert maps.shape == (2, network.head.in_features, 3, 2)
        assert maps.min() == 0 < maps.max()
        torch.testing.assert_close(network.classify(maps), network.head(maps.mean((2, 3)))[:, 0])
        torch.testing.assert_close(network(images), network.classify(maps), atol=0, rtol=0)


def test_logits_are_fp32_under_autocast() -> None:
    """The last sum has 2,048 terms; bf16 keeps three digits."""
    network = mad.build_network("resnet50", "none", seed=0).eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.features(torch.randn(1, 3, 64, 64)).dtype == torch.bfloat16
        assert network(torch.randn(1, 3, 64, 64)).dtype == torch.float32


# ----- weights from files


def test_legacy_densenet_names_are_understood() -> None:
    """torchvision's own DenseNet file still has norm.1, relu.1 and conv.1 where its network has norm1, relu1, conv1."""
    twin = torchvision_network("densenet169")
    legacy = {}
    for key, value in twin.state_dict().items():
        for unit in ("norm", "conv"):
            for number in "12":
                if "denselayer" in key:
                    key = key.replace(f".{unit}{number}.", f".{unit}.{number}.")
        legacy[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in legacy
    assert "features.denseblock1.denselayer1.norm1.weight" not in legacy
    assert same_weights(loaded("densenet169", legacy), loaded("densenet169", twin.state_dict()))


def test_half_precision_file_gives_a_single_precision_network(tmp_path: Path) -> None:
    twin = torchvision_network("resnet50")
    half = {key: value.half() if value.is_floating_point() else value for key, value in twin.state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    network = mad.build_network("resnet50", str(tmp_path / "half.pth"), seed=0)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(network.backbone[0].weight, twin.conv1.weight, atol=1e-3, rtol=1e-3)
    assert not torch.equal(network.backbone[0].weight, twin.conv1.weight)


def test_file_without_batch_counters_or_classifier_is_enough(tmp_path: Path) -> None:
    """Files from before torch 0.4 count no batches, and the 1,000 classes are not ours."""
    twin = torchvision_network("resnet50")
    bare = {
        key: value for key, value in twin.state_dict().items() if "num_batches" not in key and not key.startswith("fc.")
    }
    assert len(bare) < len(twin.state_dict()) - 50
    torch.save(bare, tmp_path / "bare.pth")
    network = mad.build_network("resnet50", str(tmp_path / "bare.pth"), seed=0)
    torch.testing.assert_close(network.backbone[-1][-1].conv3.weight, twin.layer4[-1].conv3.weight, atol=0, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_head_is_new_whatever_the_weights(model: str, tmp_path: Path) -> None:
    """The backbone is loaded, the head is the seed's: the same as with random weights."""
    torch.save(torchvision_network(model).state_dict(), tmp_path / "twin.pth")
    pretrained, plain = (mad.build_network(model, weights, seed=4) for weights in (str(tmp_path / "twin.pth"), "none"))
    assert torch.equal(pretrained.head.weight, plain.head.weight)
    assert not torch.equal(next(pretrained.backbone.parameters()), next(plain.backbone.parameters()))


def drop_a_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out one tensor of 318."""
    return {key: value for key, value in state.items() if key != "layer3.2.conv2.weight"}


def reshape_a_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make one tensor too small."""
    return {**state, "layer3.2.conv2.weight": state["layer3.2.conv2.weight"][:-1]}


def wrap(state: dict[str, Tensor]) -> dict[str, Any]:
    """Hide the weights one level down, among other things, as training programs do."""
    return {"epoch": 3, "state_dict": state, "layer1": "text"}


@pytest.mark.parametrize("spoil", [drop_a_layer, reshape_a_layer, wrap])
def test_incomplete_weights_are_refused_by_name(spoil: Callable[[Any], Any], tmp_path: Path) -> None:
    file = tmp_path / "spoilt.pth"
    torch.save(spoil(torchvision_network("resnet50").state_dict()), file)
    with pytest.raises(mad.UserError, match=r"does not fit resnet50 \(\d+ of 318 tensors") as caught:
        mad.build_network("resnet50", str(file), seed=0)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("mine", "theirs"), [MODELS, MODELS[::-1]])
def test_weights_of_the_other_architecture_are_refused(mine: str, theirs: str, tmp_path: Path) -> None:
    torch.save(getattr(torchvision.models, theirs)().state_dict(), tmp_path / "other.pth")
    with pytest.raises(mad.UserError, match=f"other.pth: does not fit {mine} .*--model"):
        mad.build_network(mine, str(tmp_path / "other.pth"), seed=0)


def test_our_own_checkpoint_gives_head_and_all(trained: Path) -> None:
    network = mad.build_network("resnet50", str(trained), seed=9)
    arithmetic = mad.choose_arithmetic(torch.device("cpu"), "fp32")
    assert same_weights(network, mad.load_member(trained, arithmetic).network)


def test_our_own_checkpoint_of_the_other_architecture_names_the_flag(trained: Path) -> None:
    with pytest.raises(mad.UserError, match=r"tiny\.pth: is a resnet50, not a densenet169; add --model resnet50"):
        mad.build_network("densenet169", str(trained), seed=0)


def test_our_own_checkpoint_with_a_flipped_bit_is_not_taken(trained: Path, tmp_path: Path) -> None:
    """Weights are 99 % of the file: without the checksum a flip there would pass unnoticed."""
    data = bytearray(trained.read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(mad.UserError, match=r"flipped\.pth: damaged"):
        mad.build_network("resnet50", str(tmp_path / "flipped.pth"), seed=0)


def test_saved_state_is_no_source_of_weights(trained: Path) -> None:
    """STEM.last.pth is for --resume; the error names it and is no KeyError."""
    state = trained.with_suffix(".last.pth")
    with pytest.raises(mad.UserError, match=r"tiny\.last\.pth"):
        mad.build_network("resnet50", str(state), seed=0)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half a zip file"])
def test_damaged_weights_give_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "damaged.pth"
    file.write_bytes(content)
    with pytest.raises(mad.UserError, match=r"damaged\.pth: cannot be loaded") as caught:
        mad.build_network("resnet50", str(file), seed=0)
    assert "\n" not in str(caught.value)


def test_missing_weights_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(mad.UserError, match="no such file; give imagenet, none, or a file"):
            mad.build_network("resnet50", str(path), seed=0)


# ----- ImageNet weights


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cut the network off and give torch an empty hub folder; returns where it keeps checkpoints."""

    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("model", MODELS)
def test_offline_says_which_file_goes_where(model: str, offline: Path) -> None:
    with pytest.raises(mad.UserError) as caught:
        mad.build_network(model, "imagenet", seed=0)
    text = str(caught.value)
    assert str(offline / HUB_FILES[model]) in text
    assert f"https://download.pytorch.org/models/{HUB_FILES[model]}" in text
    assert "\n" not in text
    assert caught.value.exit_code == mad.EXIT_FAILED


def test_offline_training_ends_with_that_line(
    offline: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data-dir",
        phantoms,
        "--checkpoint",
        tmp_path / "a.pth",
        "--model",
        "resnet50",
        "--device",
        "cpu",
        "--image-size",
        64,
    ]
    assert mad.main(mad.parse_options([str(argument) for argument in arguments])) == mad.EXIT_FAILED
    assert HUB_FILES["resnet50"] in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "a.pth").exists()


def test_file_put_there_by_hand_is_used(offline: Path) -> None:
    """The remedy that the message names works."""
    offline.mkdir(parents=True)
    twin = torchvision_network("resnet50")
    torch.save(twin.state_dict(), offline / HUB_FILES["resnet50"])
    network = mad.build_network("resnet50", "imagenet", seed=0)
    assert torch.equal(network.backbone[0].weight, twin.conv1.weight)


def test_broken_file_put_there_is_reported_in_one_line(offline: Path) -> None:
    offline.mkdir(parents=True)
    (offline / HUB_FILES["resnet50"]).write_bytes(b"<html>proxy login</html>")
    with pytest.raises(mad.UserError) as caught:
        mad.build_network("resnet50", "imagenet", seed=0)
    assert "\n" not in str(caught.value)
    assert str(offline / HUB_FILES["resnet50"]) in str(caught.value)


# ----- seeds


def test_seed_decides_the_random_weights() -> None:
    first, again, other = (mad.build_network("resnet50", "none", seed=seed) for seed in (5, 5, 6))
    assert same_weights(first, again)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.backbone[0].weight, other.backbone[0].weight)


def test_random_resnet_begins_as_identity_blocks() -> None:
    """zero_init_residual (arXiv 1706.02677, section 5.1): the last norm of each block starts at 0."""
    network = mad.build_network("resnet50", "none", seed=0)
    assert all(block.bn3.weight.abs().max() == 0 for stage in network.backbone[4:] for block in stage)


# ----- device and arithmetic


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False, capability: int = 9) -> None:
    """Let torch report other hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("hardware", "name", "rank", "expected"),
    [
        ({"cuda": 2, "mps": True}, "auto", 0, "cuda:0"),
        ({"mps": True}, "auto", 0, "mps"),
        ({}, "auto", 0, "cpu"),
        ({"cuda": 2}, "cuda", 1, "cuda:1"),
        ({"cuda": 2}, "cuda:1", 0, "cuda:1"),
        ({"cuda": 2}, "cpu", 1, "cpu"),
    ],
)
def test_device_choice(
    hardware: dict[str, Any], name: str, rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **hardware)
    assert mad.choose_device(name, rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ({}, "cuda"),
        ({}, "cuda:0"),
        ({}, "mps"),
        ({"cuda": 1}, "cuda:1"),
        ({"cuda": 1}, "mps"),
        ({"cuda": 1}, "cuda:300"),
        ({"cuda": 1}, "cuda:99999999999999999999"),
    ],
)
def test_absent_device_is_named(hardware: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **hardware)
    with pytest.raises(mad.UserError, match=f"--device {name}: there is no such device here") as caught:
        mad.choose_device(name)
    assert caught.value.exit_code == mad.EXIT_USAGE


def test_more_processes_than_cards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2)
    with pytest.raises(mad.UserError, match="2 CUDA devices"):
        mad.choose_device("auto", local_rank=2)


@pytest.mark.parametrize(
    ("device", "units", "precision", "bf16"),
    [
        ("cpu", False, "auto", False),
        ("cpu", True, "auto", True),
        ("cpu", True, "fp32", False),
        ("cpu", False, "bf16", True),
        ("mps", True, "auto", False),
    ],
)
def test_bf16_only_where_the_hardware_gains(
    device: str, units: bool, precision: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mad, "cpu_has_amx", lambda: units)
    arithmetic = mad.choose_arithmetic(torch.device(device), precision)
    assert arithmetic.bf16 is bf16
    assert arithmetic.channels_last is (device != "mps")


@pytest.fixture
def tf32_restored() -> Iterator[None]:
    """Put torch's process-wide switches back after the test."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize(("capability", "bf16"), [(7, False), (8, True), (9, True)])
def test_bf16_on_cuda_from_ampere_on(
    capability: int, bf16: bool, tf32_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute capability 7 (V100, T4) has no bf16 units."""
    pretend(monkeypatch, cuda=1, capability=capability)
    assert mad.choose_arithmetic(torch.device("cuda:0"), "auto").bf16 is bf16
    assert not mad.choose_arithmetic(torch.device("cuda:0"), "fp32").bf16


def test_tf32_is_switched_on_only_when_asked_for(tf32_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=1)
    for precision in ("tf32", "fp32"):
        arithmetic = mad.choose_arithmetic(torch.device("cuda:0"), precision)
        assert not arithmetic.bf16
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (precision == "tf32")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_tf32_needs_cuda(device: str) -> None:
    with pytest.raises(mad.UserError, match="--precision tf32: needs a CUDA device"):
        mad.choose_arithmetic(torch.device(device), "tf32")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2 avx512_bf16 avx512f", False),  # measured: slower than fp32
        ("fpu amx_bf16 amx_tile", True),
        ("fpu avx2 avx512f avx512_vnni", False),
        ("fpu xamx_bf16 avx512_bf16x", False),
        ("", False),
    ],
)
def test_amx_is_read_from_cpuinfo(flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        f"processor\t: 0\nmodel name\t: amx_bf16 in a name counts for nothing\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path, **options: text)
    assert mad.cpu_has_amx() is expected


def test_no_cpuinfo_means_no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS."""

    def missing(path: Path, **options: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert mad.cpu_has_amx() is False


def test_preparing_changes_order_not_values() -> None:
    network = mad.build_network("resnet50", "none", seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(images)
        prepared = mad.Arithmetic(torch.device("cpu"), bf16=False, channels_last=True).prepare(network)
        assert prepared.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(prepared(images), before, atol=1e-5, rtol=1e-5)


def test_arithmetic_describes_itself() -> None:
    text = str(mad.Arithmetic(torch.device("cpu"), bf16=True, channels_last=True))
    assert text == f"cpu ({torch.get_num_threads()} threads), bf16, channels_last"


def test_to_unit_spans_zero_to_one() -> None:
    assert mad.to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


def test_hub_names_carry_the_hash_that_torch_checks() -> None:
    """The names that the tests above expect are torchvision's: the end of each is the start of the file's sha256."""
    for model, name in HUB_FILES.items():
        weights = getattr(
            torchvision.models, f"{model.replace('densenet', 'DenseNet').replace('resnet', 'ResNet')}_Weights"
        )
        assert weights.IMAGENET1K_V1.url.endswith("/" + name)
        assert len(name.rpartition("-")[2].removesuffix(".pth")) == 8 < len(hashlib.sha256().hexdigest())
