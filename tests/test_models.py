"""Block 6, models: torchvision's networks, the weights people have, and maps that pytorch-grad-cam confirms."""

from __future__ import annotations

import io
import math
import re
import sys
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from email.message import Message
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, ThinResNet, mura, run_inside, thin_networks
from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from scipy.ndimage import find_objects
from scipy.ndimage import label as label_regions
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional

NAMES = ("densenet169", "resnet50")
HUB_FILES = {"densenet169": "densenet169-b2777c0a.pth", "resnet50": "resnet50-0676ba61.pth"}
IMAGENET_RESNET = Path(__file__).resolve().parents[2] / "shared" / "weights" / "resnet50_imagenet_fp16.pth"
SIDE, OTHER_SIDE = 64, 96  # pixels: the last stage has 2 x 2 or 3 x 3 cells
FINE, GRADCAM = mura.CAM_METHODS["fine"], mura.CAM_METHODS["gradcam"]
REMEDY = "give weights of torchvision or timm"

Weights = dict[str, Any]


def draw_images(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """Return normalised images with structure at several scales, none of them symmetric."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    return functional.interpolate(coarse, (side, side), mode="bilinear") + 0.3 * fine


def draw_grey(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """Return grey images as a loader has them, (B, 1, S, S) uint8."""
    return (draw_images(count, side, seed)[:, :1] * 50 + 120).clamp(0, 255).byte()


def warm_up(network: nn.Module) -> nn.Module:
    """Give all batch norms figures of their own that suit the weights: fresh ones would hide a wrong order."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = 0.5
    with torch.no_grad():
        network.train()(draw_images(4, seed=2))
    return network.eval()


@cache
def torchvision_network(name: str) -> Any:
    """Return torchvision's own classifier with 1,000 classes and random weights; not to be changed."""
    torch.manual_seed(1)
    return warm_up(getattr(torchvision.models, name)())


@cache
def network_of(name: str) -> Any:
    """Return ours with the same weights; not to be changed.

    The head is made so that cells of the images of `draw_images(3)` speak for both classes, above chance.
    """
    torch.manual_seed(2)
    network = mura.Network(name)
    mura.load_backbone(network, torchvision_network(name).state_dict(), "twin.pth")
    features: Any = draw_images(3)
    with torch.no_grad():
        for stage in network.eval().architecture.stages:
            features = network.run_stage(stage, features)
        pooled = features.mean((2, 3)).double()
        cells = features.double().mean(0)
        weight = (cells[:, 0, 0] - cells[:, 1, 1] + torch.randn(len(cells)) * cells.std() / 4)[None]
        weight /= 20 * weight.std()
        weight -= (weight @ pooled.T) @ torch.linalg.inv(pooled @ pooled.T) @ pooled
        network.head.weight.copy_(weight)
        network.head.bias.fill_(0.3)
    return network


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def network(name: str) -> Any:
    return network_of(name)


@pytest.fixture
def thin() -> Iterator[None]:
    """Within the test resnet50 is a ThinResNet, so that its files are small."""
    with thin_networks():
        yield


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the one line with which it is refused."""
    with pytest.raises(mura.UserError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two networks hold the same tensors, bit for bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ----- the network


def test_the_logit_is_torchvisions_through_one_linear_unit(name: str, network: Any) -> None:
    """Its 1,000 classes are replaced by our head, all else is torchvision's own forward pass."""
    twin, images = torchvision_network(name), draw_images(3, seed=5)
    last = "classifier" if name == "densenet169" else "fc"
    before = getattr(twin, last)
    setattr(twin, last, network.head)
    with torch.inference_mode():
        theirs, ours = twin(images)[:, 0], network(images)
    setattr(twin, last, nn.Identity())
    with torch.inference_mode():
        pooled = twin(images)
    setattr(twin, last, before)
    assert ours.shape == (3,) and theirs.std() > 1e-3, "three equal logits would prove nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    features = images
    with torch.inference_mode():
        for stage in network.architecture.stages:
            features = network.run_stage(stage, features)
            assert features.shape[2:] == (SIDE // stage.stride,) * 2
            assert features.min() == 0 < features.max(), "the last layer of a stage rectifies"
    torch.testing.assert_close(features.mean((2, 3)), pooled, atol=1e-5, rtol=1e-5)


def test_logits_are_fp32_under_autocast() -> None:
    """The last sum has 2,048 terms; bf16 keeps three digits."""
    network, images = network_of("resnet50"), draw_images(1, 64)
    with torch.inference_mode():
        exact = network(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.3, rtol=0.1)
    features = torch.full((1, 2048, 2, 2), 1.0).bfloat16()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.classify(features)
    torch.testing.assert_close(found, network.head.weight.sum(1) + network.head.bias, atol=1e-4, rtol=1e-5)
    features[..., 0] += 2**-7  # the mean needs a digit more than bf16 has
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.classify(features)
    exact = (1 + 2**-8) * network.head.weight.sum(1) + network.head.bias
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-5)


def test_the_random_weights_are_those_of_the_seed(thin: None) -> None:
    def start(seed: int) -> nn.Module:
        return initial("--weights", "none", "--seed", seed)[0]

    assert same_weights(start(5), start(5))
    assert not torch.equal(start(5).head.weight, start(6).head.weight)


def test_a_random_resnet_begins_as_identity_blocks() -> None:
    """zero_init_residual (arXiv 1706.02677, section 5.1): the last norm of each branch starts at 0."""
    state = mura.Network("resnet50").state_dict()
    last = [value for key, value in state.items() if key.endswith("bn3.weight")]
    assert len(last) == 16 and not any(value.any() for value in last)


# ----- one table of architectures


def model_content(network: Any, **changes: Any) -> Weights:
    """Return what STEM.pth holds as far as prediction needs it."""
    return {
        "kind": "model", "model": network.name, "image_size": SIDE, "resize": "stretch", "tta": True,
        "temperature": 1.5, "study_temperature": 0.8, "threshold": 0.4, "threshold_source": "auto on val",
        "bad_images": 2, "body_parts": ["XR_HAND"], "patients": {"train": ["p1"], "val": ["p2"]},
        "normalization": asdict(mura.Normalization("given", (0.3,) * 3, (0.2,) * 3)),
        "state_dict": network.state_dict(), **changes,
    }


def test_every_model_that_can_be_chosen_can_be_built_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was in --model and not in the loader's list trained to the end and then failed."""
    assert run_inside("--data-dir", "d", "--model", "what") == mura.EXIT_USAGE
    named = re.search(r"choose from (.*?)\)", capsys.readouterr().err)
    choices = re.findall(r"\w+", named[1]) if named else []
    assert sorted(choices) == sorted(mura.ARCHITECTURES) == sorted(NAMES)
    for name in choices:
        network, path = network_of(name), tmp_path / f"{name}.pth"
        digest = mura.write_checkpoint(path, model_content(network))
        model = mura.load_model(path, mura.CPU)
        assert model.network.name == name and same_weights(model.network, network)
        assert not model.network.training
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        assert mura.digest(path.read_bytes()) == digest
        assert (model.path, model.resizing, model.tta) == (path, (SIDE, "stretch"), True)
        assert (model.temperature, model.study_temperature) == (1.5, 0.8)
        assert (model.threshold, model.threshold_source, model.bad_images) == (0.4, "auto on val", 2)
        assert model.patients == {"train": ["p1"], "val": ["p2"]} and list(model.body_parts) == ["XR_HAND"]
        assert model.normalization.mean == (0.3,) * 3 and model.normalization.std == (0.2,) * 3
        assert mura.load_model(path, mura.CPU, tta=False).tta is False


def test_a_model_file_that_lacks_something_is_of_another_version(thin: None, tmp_path: Path) -> None:
    network, path = mura.Network("resnet50"), tmp_path / "m.pth"
    for missing in ("temperature", "model", "state_dict", "normalization", "tta"):
        content = model_content(network)
        del content[missing]
        mura.write_checkpoint(path, content)
        assert f"{path}: written by another version" in refusal(mura.load_model, path, mura.CPU)
    for normalization in ({"kind": "image", "gain": 2.0}, {}):  # fields that came or went
        mura.write_checkpoint(path, model_content(network, normalization=normalization))
        assert "written by another version" in refusal(mura.load_model, path, mura.CPU)
    state = network.state_dict() | {"head.weight": torch.zeros(1, 9)}
    mura.write_checkpoint(path, model_content(network, state_dict=state))
    assert "written by another version" in refusal(mura.load_model, path, mura.CPU)
    spoilt = network.state_dict() | {"head.bias": torch.tensor([math.inf])}
    mura.write_checkpoint(path, model_content(network, state_dict=spoilt))
    line = refusal(mura.load_model, path, mura.CPU)
    assert str(path) in line and "head.bias holds numbers that are not finite" in line


ADDED = {  # as somebody would add torchvision's; in the second one layers have numbers for names
    "shufflenet_v2_x0_5": mura.Architecture(
        torchvision.models.shufflenet_v2_x0_5, "", "fc", (
            mura.Stage("conv1 maxpool", 4, 0), mura.Stage("stage2", 8, 0),
            mura.Stage("stage3", 16, 0), mura.Stage("stage4 conv5", 32, 0))),
    "efficientnet_b0": mura.Architecture(
        torchvision.models.efficientnet_b0, "features", "classifier.1", (
            mura.Stage("0 1 2", 4, 0), mura.Stage("3", 8, 0),
            mura.Stage("4 5", 16, 0), mura.Stage("6 7 8", 32, 0))),
}


@pytest.mark.parametrize("added", ADDED)
def test_one_entry_is_all_that_a_new_architecture_needs(
    added: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pretrained weights to a heatmap of a model that was saved and loaded."""
    monkeypatch.setitem(mura.ARCHITECTURES, added, ADDED[added])
    torch.manual_seed(0)
    twin: Any = warm_up(getattr(torchvision.models, added)())
    network = mura.Network(added)
    mura.load_backbone(network, twin.state_dict(), "twin.pth")
    trunk, theirs = ADDED[added].trunk, twin.state_dict()
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, theirs[f"{trunk}.{key}" if trunk else key])
    path = tmp_path / "m.pth"
    mura.write_checkpoint(path, model_content(network))
    ensemble = mura.Ensemble([mura.load_model(path, mura.CPU)], mura.CPU)
    assert ensemble.models[0].network.name == added
    for method in (FINE, GRADCAM):
        logits, maps = ensemble.explain([draw_grey(2)], method, 1.0)
        torch.testing.assert_close(logits, ensemble.logits([draw_grey(2)]), atol=1e-4, rtol=1e-4)
        assert maps[0].shape == (2, SIDE, SIDE)
        assert torch.isfinite(maps[0]).all() and (maps[0] >= 0).all()


# ----- backbones that people have


def old_names(state: Weights) -> Weights:
    """Return DenseNet's weights as torchvision distributes them, named before torch 0.4."""
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    return {dotted.sub(r"\1.\2", key): value for key, value in state.items() if "num_batches" not in key}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def without_classifier(state: Weights) -> Weights:
    return {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}


def lightning(state: Weights) -> Weights:
    """Return what a Lightning checkpoint looks like: the network is an attribute of the module."""
    return {
        "epoch": 4, "global_step": 100, "pytorch-lightning_version": "2.4.0",
        "state_dict": {**prefixed("model.")(state), "loss.weight": torch.ones(2)},
        "optimizer_states": [{"state": {}}], "hyper_parameters": {"model": "resnet50", "lr": 1e-3},
    }


def timm(state: Weights) -> Weights:
    """Return what timm's training script saves, or its state_dict of one class."""
    names = {"fc.weight": torch.ones(1, 2048), "fc.bias": torch.ones(1), "classifier.weight": torch.ones(1, 1664)}
    state = {key: names.get(key, value) for key, value in state.items()}
    return {"epoch": 3, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}, "version": 2,
            "metric": 0.5}


FORMS: dict[str, Callable[[Weights], Weights]] = {
    "torchvision": lambda state: state,
    "no classifier": without_classifier,
    "DataParallel": prefixed("module."),
    "an attribute": prefixed("model."),
    "both": prefixed("module.model."),
    "compiled": prefixed("_orig_mod."),
    "an encoder with a number": prefixed("encoders.0."),
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best": 0.3},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "model": lambda state: {"model": prefixed("module.")(state), "args": {"lr": 1}},
    "Lightning": lightning,
    "timm": timm,
    "half": lambda state: {key: value.half() if value.is_floating_point() else value
                           for key, value in state.items()},
    "before torch 0.4": old_names,
}


@cache
def receiver(name: str) -> Any:
    """Return a network that weights are loaded into, again and again."""
    return mura.Network(name)


@pytest.mark.parametrize("form", FORMS)
def test_backbones_that_people_have_are_loaded(form: str) -> None:
    for name in NAMES:
        network, twin = receiver(name), torchvision_network(name)
        for value in network.state_dict().values():
            value.zero_()
        content = FORMS[form](twin.state_dict())
        mura.load_backbone(network, content, "some.pth")
        expected = without_classifier(twin.state_dict())
        trunk = mura.ARCHITECTURES[name].trunk
        found = network.backbone.state_dict()
        assert len(found) == len(expected)
        for key, value in found.items():
            wanted = expected[f"{trunk}.{key}" if trunk else key]
            assert value.dtype == wanted.dtype
            if not (form == "before torch 0.4" and "num_batches" in key):
                assert torch.equal(value, wanted.half().to(wanted) if form == "half" else wanted), key
        assert not network.head.weight.any(), "a classifier of other classes is left out"


def numbered(name: str) -> Weights:
    """Return the weights of the layers in a row, as nn.Sequential(*network.children()) names them."""
    twin = torchvision_network(name)
    return nn.Sequential(*(twin.features if name == "densenet169" else twin).children()).state_dict()


def test_numbered_layers_are_refused_with_the_true_reason(name: str) -> None:
    for prefix in ("", "backbone.", "module.encoder.", "0."):  # fastai: body and head in a row
        line = refusal(mura.load_backbone, receiver(name), prefixed(prefix)(numbered(name)), "some.pth")
        assert line.startswith("--weights some.pth: its layers are numbered")
        assert f"save a {name}'s own state_dict" in line
        assert "--model" not in line and "looks like" not in line


@pytest.mark.parametrize("form", ["torchvision", "DataParallel", "Lightning", "before torch 0.4"])
def test_weights_of_the_other_architecture_are_refused(name: str, form: str) -> None:
    (other,) = set(NAMES) - {name}
    content = FORMS[form](torchvision_network(other).state_dict())
    line = refusal(mura.load_backbone, receiver(name), content, "some.pth")
    assert line.startswith(f"--weights some.pth: does not fit {name} (")
    assert "give weights of torchvision or timm for it, or the --model that they are of" in line
    assert "numbered" not in line


def drop_one(state: Weights, key: str) -> Weights:
    return {name: value for name, value in state.items() if name != key}


def cut_one(state: Weights, key: str) -> Weights:
    return state | {key: state[key][:-1]}


def text_for_one(state: Weights, key: str) -> Weights:
    return state | {key: "text"}


@pytest.mark.parametrize("spoil", [drop_one, cut_one, text_for_one])
def test_incomplete_weights_are_refused(spoil: Callable[..., Weights], name: str) -> None:
    """And are not taken for those of another architecture; nothing is loaded of them."""
    state = torchvision_network(name).state_dict()
    network = receiver(name)
    before = next(network.backbone.parameters()).clone()
    key = list(without_classifier(state))[-4]
    line = refusal(mura.load_backbone, network, spoil(state, key), "some.pth")
    count = len(without_classifier(state))
    assert f"does not fit {name} (1 of {count} tensors are missing or of another shape); {REMEDY}" in line
    assert torch.equal(next(network.backbone.parameters()), before)


def test_a_smaller_sister_is_not_taken_for_the_other_architecture() -> None:
    for name, sister in (("densenet169", "densenet121"), ("resnet50", "resnet18")):
        with torch.device("meta"):
            content = getattr(torchvision.models, sister)().state_dict()
        line = refusal(mura.load_backbone, receiver(name), content, "some.pth")
        assert f"does not fit {name}" in line and "looks like" not in line and "numbered" not in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["weight", "running_var"])
def test_numbers_that_are_not_finite_are_refused(value: float, part: str, name: str) -> None:
    state = dict(torchvision_network(name).state_dict())
    key = [key for key in without_classifier(state) if key.endswith(part)][-1]
    state[key] = state[key].clone()
    state[key].view(-1)[-1] = value
    line = refusal(mura.load_backbone, receiver(name), state, "some.pth")
    trunk = mura.ARCHITECTURES[name].trunk
    assert f"--weights some.pth: {key.removeprefix(f'{trunk}.')} holds numbers that are not finite" in line


def test_a_classifier_that_is_not_finite_is_no_matter() -> None:
    state = torchvision_network("resnet50").state_dict() | {"fc.bias": torch.full((1000,), math.nan)}
    mura.load_backbone(receiver("resnet50"), state, "some.pth")


# ----- --weights


def initial(*flags: Any, resumed: bool = False) -> tuple[Any, Weights]:
    """Return the network that a training run with these flags begins with."""
    asked = ("--data-dir", "d", *flags)
    if "--model" not in flags and "{no model}" not in flags:
        asked += ("--model", "resnet50")
    config = mura.parse_options([str(word) for word in asked if word != "{no model}"])
    return mura.initial_network(config, resumed=resumed)


def test_a_file_gives_the_backbone_and_the_seed_the_head(thin: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin = ThinResNet()
    torch.save(lightning(twin.state_dict()), tmp_path / "twin.ckpt")
    network, seen = initial("--weights", tmp_path / "twin.ckpt", "--seed", 4)
    plain, _ = initial("--weights", "none", "--seed", 4)
    assert not seen and network.name == "resnet50"
    assert torch.equal(network.backbone.layer4.weight, twin.layer4.weight)
    assert torch.equal(network.head.weight, plain.head.weight)
    assert not torch.equal(network.backbone.layer4.weight, plain.backbone.layer4.weight)
    assert network.head.weight.requires_grad and network.backbone.conv1.weight.requires_grad
    resumed, _ = initial("--weights", tmp_path / "gone.pth", resumed=True)
    assert resumed.name == "resnet50", "--resume does without the file"


def test_safetensors_are_read_where_the_package_is(thin: None, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    twin, path = ThinResNet(), tmp_path / "twin.safetensors"
    safetensors.save_file(prefixed("model.")(twin.state_dict()), path)
    network, _ = initial("--weights", path)
    assert torch.equal(network.backbone.layer4.weight, twin.layer4.weight)
    path.write_bytes(path.read_bytes()[:-9])
    assert "twin.safetensors: is damaged" in refusal(initial, "--weights", path)


def test_safetensors_without_the_package_say_what_to_install(
    thin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 99)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "w.safetensors: needs an optional package: pip install safetensors" in refusal(
        initial, "--weights", tmp_path / "w.safetensors")


def test_a_model_of_this_program_brings_its_architecture(
    tmp_path: Path, thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is not the default, and with its head."""
    monkeypatch.setitem(mura.ARCHITECTURES, "added", mura.ARCHITECTURES["resnet50"])
    saved, path = mura.Network("added"), tmp_path / "own.pth"
    mura.write_checkpoint(path, model_content(saved))
    network, seen = initial("--weights", path, "{no model}")
    assert network.name == "added" and same_weights(network, saved)
    assert seen == {"p1", "p2"}
    mura.write_checkpoint(path, model_content(mura.Network("resnet50")))
    assert initial("--weights", path, "--model", "resnet50")[0].name == "resnet50"
    line = refusal(initial, "--weights", path, "--model", "densenet169")
    assert f"--weights {path}: is a resnet50, not a densenet169; leave --model out" in line


def test_a_model_of_this_program_that_cannot_be_used_gives_one_line(thin: None, tmp_path: Path) -> None:
    """A saved state, an unknown architecture, weights missing, of another shape or not finite."""
    network, path = mura.Network("resnet50"), tmp_path / "own.pth"
    state = network.state_dict()
    for content in (
        {"kind": "state", "settings": {}, "network": state},
        model_content(network, model="vgg16"),
        model_content(network, state_dict=drop_one(state, "head.bias")),
        model_content(network, state_dict=cut_one(state, "head.weight")),
        drop_one(model_content(network), "state_dict"),
        model_content(network, state_dict=state | {"head.bias": torch.tensor([math.nan])}),
    ):
        mura.write_checkpoint(path, content)
        assert f"--weights {path}: " in refusal(initial, "--weights", path, "{no model}")


def test_weights_are_read_once_in_a_whole_training_run(
    thin: None, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read four times."""
    torch.save(ThinResNet().state_dict(), tmp_path / "w.pth")
    mura.write_checkpoint(tmp_path / "own.pth", model_content(mura.Network("resnet50"), settings={
        "resize": "stretch", "normalization": "image"}))
    opened, real = Counter[str](), io.open

    def counted(file: Any, *arguments: Any, **options: Any) -> Any:
        opened[Path(file).name if isinstance(file, str | Path) else ""] += 1
        return real(file, *arguments, **options)

    monkeypatch.setattr("io.open", counted)
    monkeypatch.setattr("builtins.open", counted)
    for name in ("plot_history", "plot_report"):
        monkeypatch.setattr(mura, name, lambda *arguments, **options: b"")
    for file in ("w.pth", "own.pth"):
        options = ("--data-dir", phantoms, "--checkpoint", tmp_path / f"new.{file}", *TINY)
        assert run_inside(*options, "--weights", tmp_path / file) == 0
        assert opened[file] == 1


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cut the network off and give torch an empty hub folder; returns where it keeps checkpoints."""

    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


def test_offline_the_file_and_its_place_are_named(name: str, offline: Path) -> None:
    with pytest.raises(mura.UserError) as caught:
        initial("--model", name)
    line = str(caught.value)
    assert "\n" not in line and caught.value.exit_code == mura.EXIT_FAILED
    assert line.startswith(f"the ImageNet weights of {name} are not available (URLError: ")
    assert "fetch https://" in line and f"/models/{HUB_FILES[name]} " in line
    assert f"put it at {offline / HUB_FILES[name]}, or give --weights FILE, or --weights none" in line


def test_a_file_put_there_by_hand_is_used(thin: None, offline: Path) -> None:
    """The remedy that the message names works; and a broken one is named again."""
    offline.mkdir(parents=True)
    twin = ThinResNet()
    torch.save(twin.state_dict(), offline / HUB_FILES["resnet50"])
    network, _ = initial()
    assert torch.equal(network.backbone.layer4.weight, twin.layer4.weight)
    (offline / HUB_FILES["resnet50"]).write_bytes(b"<html>proxy login</html>")
    assert str(offline / HUB_FILES["resnet50"]) in refusal(initial)


class Answer(io.BytesIO):
    """What a server sends."""

    def info(self) -> Message:
        return Message()


def test_a_download_that_is_not_whole_is_not_kept(
    thin: None, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name tells its SHA-256; kept, it would be taken for the weights ever after."""
    file = io.BytesIO()
    torch.save(ThinResNet().state_dict(), file)
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Answer(file.getvalue()))
    assert "are not available (RuntimeError: invalid hash value" in refusal(initial)
    assert list(offline.iterdir()) == []


def test_code_in_a_file_put_there_by_hand_is_not_run(thin: None, offline: Path) -> None:
    offline.mkdir(parents=True)
    trace = offline / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return trace.mkdir, ()

    torch.save({"conv1.weight": Code()}, offline / HUB_FILES["resnet50"])
    assert "are not available (UnpicklingError: " in refusal(initial)
    assert not trace.exists()


# ----- device and precision


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False, capability: int = 9) -> None:
    """Let torch report other hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("hardware", "asked", "rank", "expected"), [
    ({"cuda": 2, "mps": True}, "auto", 0, "cuda:0"), ({"cuda": 2}, "auto", 1, "cuda:1"),
    ({"mps": True}, "auto", 0, "mps"), ({"mps": True}, "auto", 1, "mps"), ({}, "auto", 0, "cpu"),
    ({"cuda": 2}, "cuda", 1, "cuda:1"), ({"cuda": 2}, "cuda:1", 0, "cuda:1"), ({"cuda": 2}, "cuda:0", 1, "cuda:0"),
    ({"cuda": 2, "mps": True}, "mps", 0, "mps"), ({"cuda": 2, "mps": True}, "cpu", 1, "cpu"),
])
def test_device_choice(
    hardware: Weights, asked: str, rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **hardware)
    assert mura.choose_device(asked, rank) == torch.device(expected)


@pytest.mark.parametrize(("hardware", "asked", "rank"), [
    ({}, "cuda", 0), ({}, "cuda:0", 0), ({}, "mps", 0), ({"cuda": 1}, "cuda:1", 0), ({"cuda": 1}, "mps", 0),
    ({"cuda": 1}, "cuda:99999999999999999999", 0), ({"cuda": 2}, "cuda", 2), ({"mps": True}, "cuda", 0),
])
def test_an_absent_device_is_named(
    hardware: Weights, asked: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **hardware)
    line = refusal(mura.choose_device, asked, rank)
    assert line.startswith(f"--device {asked}: there is no such device here ({hardware.get('cuda', 0)} CUDA")


def test_more_processes_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2)
    assert "2 CUDA devices" in refusal(mura.choose_device, "auto", 2)


@pytest.fixture
def tf32_restored() -> Iterator[None]:
    """Put torch's process-wide switches back after the test."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


AUTO = {  # device, CUDA compute capability, AMX: T4 and V100 have 7, A100 8, H100 9, P100 6
    ("cuda", 12, False): "bf16", ("cuda", 9, False): "bf16", ("cuda", 8, False): "bf16",
    ("cuda", 7, True): "fp16", ("cuda", 6, True): "fp32", ("cuda", 3, True): "fp32",
    ("cpu", 0, False): "fp32", ("cpu", 0, True): "bf16", ("mps", 0, True): "fp32",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize(("device", "capability", "amx"), AUTO)
def test_auto_precision_is_what_the_hardware_gains_from(
    device: str, capability: int, amx: bool, tf32_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cuda=1, mps=True, capability=capability)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags\t: sse2 {'amx_bf16' * amx} avx512_bf16\n")
    expected = AUTO[device, capability, amx]
    found = mura.choose_precision(torch.device(device), "auto")
    assert found.precision == expected and found.device.type == device
    assert (found.order == torch.channels_last) is (device != "mps")
    name = "Tesla T4" if device == "cuda" else f"{torch.get_num_threads()} threads"
    assert str(found) == f"{found.device} ({name}), {expected}"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_precision_that_is_given_is_used(
    precision: str, tf32_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cuda=1)
    for device in ("cpu", "cuda", "mps"):
        found = mura.choose_precision(torch.device(device), precision)
        assert str(found).endswith(f", {precision}")
    found = mura.choose_precision(torch.device("cpu"), precision)
    with found.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert torch.is_autocast_enabled("cpu") is (precision != "fp32")
    assert product.dtype == DTYPES[precision]


def test_tf32_is_on_only_when_asked_for(tf32_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=1)
    for precision in ("tf32", "fp32", "tf32", "auto"):
        found = mura.choose_precision(torch.device("cuda:0"), precision)
        asked = precision == "tf32"
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is asked
        assert str(found) == f"cuda:0 (Tesla T4), {'bf16' if precision == 'auto' else precision}"
    for device in ("cpu", "mps"):
        line = refusal(mura.choose_precision, torch.device(device), "tf32")
        assert f"--precision tf32: needs a CUDA device, this is {device}" in line


def test_where_cpuinfo_is_absent_precision_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert mura.choose_precision(torch.device("cpu"), "auto").precision == "fp32"


def test_channels_last_is_the_order_of_the_weights(thin: None) -> None:
    hardware = mura.choose_precision(torch.device("cpu"), "fp32")
    weight = hardware.prepare(mura.Network("resnet50")).backbone.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert mura.CPU.prepare(mura.Network("resnet50")).backbone.conv1.weight.is_contiguous()


# ----- class activation maps against pytorch-grad-cam


class Tapped(nn.Module):
    """The network as pytorch-grad-cam wants it: logits (B, 1), and one module whose output is a stage's.

    Not the stage's own last module: torchvision's DenseNet has one ReLU that is used twice.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.taps = nn.ModuleList(nn.Identity() for _ in network.architecture.stages)

    def forward(self, features: Tensor) -> Tensor:
        for stage, tap in zip(self.network.architecture.stages, self.taps, strict=True):
            features = tap(self.network.run_stage(stage, features))
        return self.network.classify(features)[:, None]


@cache
def peer_maps(name: str, sign: int) -> dict[str, Any]:
    """Return pytorch-grad-cam's maps of sign * logit of `draw_images(3)`, by rule and stage.

    They are neither scaled nor clipped.
    """
    batch, model = draw_images(3), Tapped(network_of(name))
    targets = [lambda output: sign * output[0]] * len(batch)
    found: dict[str, Any] = {}
    taps = list(model.taps)
    with (
        LayerCAM(model, taps) as layer, HiResCAM(model, taps) as hires, GradCAM(model, taps[-1:]) as grad
    ):
        layer(batch, targets)
        kept: Any = layer.activations_and_grads
        for stage, tap in enumerate(model.taps):
            pair = kept.activations[stage].numpy(), kept.gradients[stage].numpy()
            for rule, method in (("layer_cam", layer), ("hires_cam", hires), ("grad_cam", grad)):
                raw = method.get_cam_image(batch, tap, targets, *pair, False)
                found[rule, stage] = torch.from_numpy(raw)
        found["gradcam"] = grad(batch, targets)
    model.zero_grad(set_to_none=True)
    return found


def cam(network: Any, method: Any, sign: float = 1, images: Tensor | None = None) -> Tensor:
    """Return the heatmaps of images, by default those of `peer_maps`."""
    images = draw_images(3) if images is None else images
    heat: Tensor = mura.class_activation_map(network, images, method, sign)[1]
    return heat


@cache
def cam_of(name: str, method: Any, sign: int = 1) -> Tensor:
    """Return the heatmaps of `draw_images(3)`; not to be changed."""
    return cam(network_of(name), method, sign)


def enlarged(maps: Tensor) -> Tensor:
    """Return bilinear enlargements of maps (B, h, w), as pytorch-grad-cam's."""
    return functional.interpolate(maps[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]


@pytest.mark.parametrize("sign", [1, -1], ids=["abnormal", "normal"])
def test_gradcam_equals_pytorch_grad_cam(name: str, sign: int) -> None:
    peer, ours = peer_maps(name, sign), cam_of(name, GRADCAM, sign)
    assert ours.amax((1, 2)).min() > 0, "an empty map would prove nothing"
    np.testing.assert_allclose(scale_cam_image(ours.numpy()), peer["gradcam"], atol=1e-5)
    cells = (SIDE // 32) ** 2  # that it leaves out: with them the mean of the map is the logit
    expected = enlarged(peer["grad_cam", 3].relu() * cells)
    torch.testing.assert_close(ours, expected, atol=1e-5 * float(expected.max()), rtol=0)


@pytest.mark.parametrize("sign", [1, -1], ids=["abnormal", "normal"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("rule", "negative"), [("layer_cam", 0.0), ("hires_cam", 1.0)])
def test_layercam_and_hirescam_of_a_stage_equal_pytorch_grad_cam(
    name: str, network: Any, stage: int, sign: int, rule: str, negative: float
) -> None:
    method = mura.CamMethod(((stage, partial(mura.layer_cam, negative=negative)),), "", classical=True)
    peer, ours = peer_maps(name, sign)[rule, stage].relu(), cam(network, method, sign)
    assert ours.amax((1, 2)).max() > 0
    torch.testing.assert_close(ours, enlarged(peer), atol=1e-5 * float(peer.max()), rtol=0)


def last_map(network: Any, sign: float) -> Tensor:
    """Return head weights x features of the last stage (CAM, arXiv 1512.04150), less 1.5 standard deviations.

    Each shift of its input by a cell, edge cells repeated, gives every second row and column.
    """
    *finer, last = network.architecture.stages
    features = draw_images(3)
    with torch.inference_mode():
        for stage in finer:
            features = network.run_stage(stage, features)
        cells = SIDE // 32
        dense, variance = torch.zeros(2, 3, 2 * cells, 2 * cells)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            moved = np.pad(features.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode="edge")
            output = network.run_stage(last, torch.from_numpy(moved[:, :, down:, right:].copy()))
            dense[:, down::2, right::2] = torch.einsum("bchw,c->bhw", output, network.head.weight[0])
            variance[:, down::2, right::2] = torch.einsum("bchw,c->bhw", output**2, network.head.weight[0] ** 2)
    unshifted = peer_maps(network.name, int(sign))["grad_cam", 3] * cells**2
    torch.testing.assert_close(sign * dense[:, ::2, ::2], unshifted, atol=1e-4, rtol=1e-4)
    return sign * dense - 1.5 * variance.sqrt()


def test_chance_is_a_random_sign_for_each_channel() -> None:
    """The standard deviation of the sum is that of many draws; 1.5 of them are taken off on either side."""
    generator = torch.Generator().manual_seed(0)
    activations, gradients = torch.rand(2, 1, 300, 3, 4, generator=generator)
    weights = gradients.sum((2, 3), keepdim=True)
    signs = torch.randint(0, 2, (4000, 300, 1, 1), generator=generator) * 2 - 1
    chance = (signs * weights * activations).sum(1).std(0)
    for sign in (1, -1):
        found = mura.grad_cam_above_chance(activations, sign * gradients)[0]
        expected = sign * mura.grad_cam(activations, gradients)[0] - 1.5 * chance
        torch.testing.assert_close(found, expected, atol=0, rtol=0.05)


def test_a_head_that_has_learnt_nothing_makes_no_heat() -> None:
    """The sanity check of arXiv 1810.03292 in the small: above chance by luck in 6.7 % of the draws."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 500, 1, 1, generator=generator)
    drawn = torch.randn(1000, 500, 1, 1, generator=generator)
    warm = (mura.grad_cam_above_chance(features, drawn) > 0).float().mean()
    assert 0.05 < warm < 0.09
    assert (mura.grad_cam_above_chance(features, drawn.abs()) > 0).all(), "where all channels agree"


def stack_shifts(network: Any, features: Tensor) -> Tensor:
    """Return the last stage's outputs for its input as it is and shifted, (4, B, C, h, w)."""
    unshifted = network.run_stage(network.architecture.stages[-1], features)
    return torch.stack([unshifted, *network.shift_last_stage(features)])


def test_shifts_of_the_last_stage_are_its_dilated_convolutions() -> None:
    """As torchvision builds them (`replace_stride_with_dilation`), where padding is not felt."""
    network = network_of("resnet50")
    dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    dilated.layer4.load_state_dict(network.backbone.layer4.state_dict())
    features = torch.rand(2, network.backbone.layer4[0].conv1.in_channels, 24, 24)
    with torch.inference_mode():
        expected = dilated.layer4(features)
        shifted = stack_shifts(network, features)
    for channel in (0, 17):
        stitched = mura.stitch(shifted[:, :, channel])
        assert stitched.shape == (2, 24, 24) and stitched[:, 7:-7, 7:-7].std() > 0
        torch.testing.assert_close(
            stitched[:, 7:-7, 7:-7], expected[:, channel, 7:-7, 7:-7], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1], ids=["abnormal", "normal"])
def test_fine_is_the_product_of_pytorch_grad_cams_maps(name: str, network: Any, sign: int) -> None:
    """Each in its place, clipped there, and with a peak of 1.

    LayerCAM of the first stage, what is midway from it to HiResCAM of two more, Grad-CAM of the last, which
    has a cell for each of its input and counts above chance alone.
    """
    peer = peer_maps(name, sign)
    product = torch.ones(3, SIDE, SIDE)
    midway = [(peer["layer_cam", stage] + peer["hires_cam", stage]) / 2 for stage in (1, 2)]
    terms = [peer["layer_cam", 0], *midway, last_map(network, sign)]
    *stages, last = network.architecture.stages
    for found, stage in zip(terms, [*stages, replace(last, stride=16)], strict=True):
        placed = mura.enlarge(found, SIDE, stage).relu()
        product *= placed / placed.amax((1, 2), keepdim=True).clamp(min=1e-30)
    ours = cam_of(name, FINE, sign)
    wanted = product / product.amax((1, 2), keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=0)
    assert torch.isfinite(ours).all() and ours.min() >= 0 and ours.any()
    assert set(ours.amax((1, 2)).round(decimals=5).tolist()) <= {0.0, 1.0}, "cold where a factor is"


def test_gradcam_is_in_logits(name: str, network: Any) -> None:
    """Before it is clipped, the map has the mean of the cells' logit less the bias (arXiv 1512.04150)."""
    logits, _ = mura.class_activation_map(network, draw_images(3), GRADCAM, 1.0)
    with torch.inference_mode():
        torch.testing.assert_close(logits, network(draw_images(3)), atol=1e-5, rtol=1e-5)
    cells = (SIDE // 32) ** 2
    signed = peer_maps(name, 1)["grad_cam", 3]
    torch.testing.assert_close(signed.mean((1, 2)) * cells, logits - network.head.bias, atol=1e-4, rtol=1e-4)


def test_a_batch_gives_what_single_images_give(name: str, network: Any) -> None:
    images = draw_images(3)
    alone = torch.cat([cam(network, FINE, images=images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(cam_of(name, FINE), alone, atol=1e-2, rtol=0)


@pytest.mark.parametrize("method", [FINE, GRADCAM], ids=["fine", "gradcam"])
def test_one_backward_pass_and_nothing_left_behind(
    method: Any, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient of a weight is computed or kept, no graph is kept alive, no hook, no flag turned."""
    passes, real = [], torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        weights = {id(parameter) for parameter in network.parameters()}
        passes.append(len(weights & {id(tensor) for tensor in inputs}))
        return real(outputs, inputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(torch.autograd, "backward", lambda *arguments, **options: passes.append(-1))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = draw_images(2)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            results = mura.class_activation_map(network, images, method, 1.0)
            assert torch.is_grad_enabled() is (mode is torch.enable_grad)
        assert not any(tensor.requires_grad for tensor in results)
    assert passes == [0, 0]
    assert all(value.grad is None and value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert not network.training and not images.requires_grad


def test_a_network_that_was_frozen_is_explained_too() -> None:
    """As `load_model` returns it; and in bf16 the maps are float32."""
    network, expected = network_of("resnet50"), cam_of("resnet50", FINE)
    network.requires_grad_(False)
    try:
        torch.testing.assert_close(cam(network, FINE), expected, atol=1e-3, rtol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, heat = mura.class_activation_map(network, draw_images(3), FINE, 1.0)
    finally:
        network.requires_grad_(True)
    assert logits.dtype == heat.dtype == torch.float32
    assert torch.isfinite(heat).all() and heat.max() == pytest.approx(1)


def test_where_no_gradient_is_there_is_no_heat(name: str) -> None:
    """A last stage that lets nothing pass: zeros, and not 0 / 0."""
    network = network_of(name)
    last = network.backbone.norm5 if name == "densenet169" else network.backbone.layer4[-1].bn3
    weight, bias = last.weight.clone(), last.bias.clone()
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-1e9)
    try:
        images = torch.cat([torch.zeros(1, 3, SIDE, SIDE), draw_images(1)])
        for method in (FINE, GRADCAM):
            logits, heat = mura.class_activation_map(network, images, method, 1.0)
            assert not heat.any() and torch.equal(logits, network.head.bias.detach().expand(2))
    finally:
        with torch.no_grad():
            last.weight.copy_(weight)
            last.bias.copy_(bias)


def test_a_map_that_is_not_finite_is_cold() -> None:
    maps = torch.tensor([[[math.nan, 2.0], [4.0, 0.0]], [[0, 0], [0, 0]], [[math.inf, 3.0], [0, 0]]])
    expected = [[[0, 0.5], [1, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    assert mura.peak_of_one(maps - 1e-9 * (maps == 0)).tolist() == expected, "clipped at 0"
    assert mura.peak_of_one(maps).tolist() == expected


# ----- maps in their place


STAGES = [stage for name in NAMES for stage in mura.ARCHITECTURES[name].stages]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.stride}+{stage.offset}")
def test_a_cell_lies_at_its_offset_and_stride(stage: Any) -> None:
    """The profile is a Gaussian about the cell's centre, by SciPy; rows and columns are not swapped."""
    side, (rows, columns) = 224, (9, 7)
    if stage.stride < 16:
        rows, columns = 12, 11
    row, column = 4, 3
    maps = torch.zeros(2, rows, columns)
    maps[1, row, column] = 5
    heat = mura.enlarge(maps, side, stage).numpy()
    assert heat.shape == (2, side, side) and not heat[0].any()
    spread, profiles = max(0.6, side / 56 / stage.stride), []
    for cell, count in ((row, rows), (column, columns)):
        places = ((np.arange(side) - stage.offset) / stage.stride).clip(0, count - 1)
        density = norm.pdf(places[:, None], np.arange(count), spread)
        profiles.append(density[:, cell] / density.sum(axis=1))
    np.testing.assert_allclose(heat[1], 5 * np.outer(*profiles), atol=1e-5)
    peak = np.unravel_index(heat[1].argmax(), heat[1].shape)
    assert peak == (stage.offset + stage.stride * row, stage.offset + stage.stride * column)


@pytest.mark.parametrize("side", [64, 97, 250, 320])
def test_enlarging_keeps_the_scale_and_the_rim(side: int) -> None:
    """Weights add up to 1 everywhere; beyond the outer cells the map stays as it is; sizes need not divide."""
    for stage in STAGES:
        cells = -(-side // stage.stride)
        flat = mura.enlarge(torch.full((1, cells, cells), 3.0), side, stage)
        torch.testing.assert_close(flat, torch.full((1, side, side), 3.0))
        if stage.stride < 32:
            continue
        heat = mura.enlarge(torch.rand(1, cells, cells), side, stage)[0]
        first, last = int(stage.offset), min(side - 1, int(stage.offset + stage.stride * (cells - 1)))
        assert torch.equal(heat[: first + 1], heat[first].expand(first + 1, side))
        assert torch.equal(heat[last:], heat[last].expand(side - last, side))
        assert 0 <= heat.min() <= heat.max() <= 1


def test_there_are_no_creases() -> None:
    """Bilinear enlargement bends by 2 / stride at each cell's centre, a Gaussian far less."""
    torch.manual_seed(0)
    maps = torch.rand(1, 10, 10)
    bilinear = functional.interpolate(maps[None], (320, 320), mode="bilinear")[0, 0]
    spline = mura.enlarge(maps, 320, mura.Stage("", 32, 15.5))[0]

    def bend(heat: Tensor) -> float:
        inner = heat[64:-64, 64:-64]
        return float(torch.diff(inner, n=2, dim=1).abs().max())

    assert bend(spline) < 4 / 32**2 < bend(bilinear) / 4
    assert spline.std() > 0.05, "the map is not flattened"


@cache
def centre_of_a_cell(name: str) -> list[float]:
    """Return, for each stage, the centre of what a central cell sees less stride x its number, in pixels.

    All weights of a layer are equal and positive, so nothing but strides and padding decides.
    """
    network: Any = mura.Network(name).eval()
    setattr(network.backbone, "pool0" if name == "densenet169" else "maxpool", nn.AvgPool2d(3, 2, 1))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    side = 256 if name == "densenet169" else 192  # beyond which the rim would be felt
    images = torch.ones(1, 3, side, side, requires_grad=True)
    features, centres = images, []
    for stage in network.architecture.stages:
        features = network.run_stage(stage, features)
        cell = features.shape[-1] // 2
        (seen,) = torch.autograd.grad(features[0, :, cell, cell].sum(), images, retain_graph=True)
        seen = seen[0].sum((0, 1))
        centres.append(float((seen * torch.arange(side)).sum() / seen.sum()) - stage.stride * cell)
    return centres


def test_cells_are_placed_where_strides_and_padding_put_them() -> None:
    """DenseNet-169: 0, 2, 6, 14. ResNet-50: 0, and a little to the right of it, as ImageNet weights have it."""
    dense = mura.ARCHITECTURES["densenet169"].stages
    assert centre_of_a_cell("densenet169") == pytest.approx([stage.offset for stage in dense], abs=0.5)
    assert centre_of_a_cell("resnet50") == pytest.approx([0] * 4, abs=0.5)
    for stage in mura.ARCHITECTURES["resnet50"].stages:
        assert 0 <= stage.offset <= max(1, 0.4 * stage.stride) and stage.offset <= 5


def square_distances(network: Any, side: int, squares: int) -> np.ndarray:
    """Return how far each stage's change lies from squares pasted into a phantom, shares of the side."""
    rng = np.random.default_rng(side)
    drawn, *_ = mura.draw_phantom(np.random.default_rng(1), side)
    pixels = np.stack([mura.resize_square(drawn, side, "stretch")] * (squares + 1))
    wanted = []
    for changed in pixels[1:]:
        width = int(side * rng.uniform(0.06, 0.12))
        top, left = rng.integers(0, side - width, 2)
        changed[top : top + width, left : left + width] = 255
        wanted.append((top + (width - 1) / 2, left + (width - 1) / 2))
    features = mura.Normalization("imagenet")(mura.to_unit(torch.from_numpy(pixels)[:, None]))
    distances = []
    with torch.inference_mode():
        for stage in network.architecture.stages:
            if stage is network.architecture.stages[-1]:
                outputs, stage = stack_shifts(network, features), replace(stage, stride=16)
                change = mura.stitch((outputs[:, 1:] - outputs[:, :1]).square().sum(2))
            else:
                features = network.run_stage(stage, features)
                change = (features[1:] - features[:1]).square().sum(1)
            for heat, centre in zip(mura.enlarge(change, side, stage), wanted, strict=True):
                found = torch.nonzero(heat >= heat.max() / 2).float().mean(0).numpy()
                distances.append(float(np.hypot(*(found - centre))) / side)
    return np.array(distances).reshape(-1, squares).mean(axis=1)


@pytest.mark.parametrize("side", [220, 250, 320])
def test_a_pasted_square_is_found_where_it_is(side: int) -> None:
    """DenseNet-169 with random weights, which look less sharply than trained ones, at its border too."""
    distances = square_distances(network_of("densenet169"), side, 5)
    assert distances[:3].max() <= 0.02 and distances[3] <= 0.04


@pytest.mark.skipif(not IMAGENET_RESNET.exists(), reason="needs a ResNet-50 with ImageNet weights")
@pytest.mark.parametrize("side", [250, 320])
def test_a_pasted_square_is_found_where_it_is_by_a_trained_resnet(side: int) -> None:
    network = receiver("resnet50").eval()
    mura.load_backbone(network, torch.load(IMAGENET_RESNET, weights_only=True), str(IMAGENET_RESNET))
    assert square_distances(network, side, 5).max() <= 0.05


# ----- what is read off a map


def test_the_strongest_region_by_hand() -> None:
    heat = np.zeros((6, 9), np.float32)
    heat[1, 2:5] = 4, 8, 4  # the half of the peak belongs to it
    heat[2, 3], heat[3, 3], heat[1, 5] = 5, 3.9, 3.9
    heat[4:6, 7:9] = 7.9  # as strong, but does not hang together with the peak
    assert mura.strongest_region(heat) == (2, 1, 5, 3)
    heat[5, 8] = 8.1
    assert mura.strongest_region(heat) == (7, 4, 9, 6)
    assert mura.strongest_region(np.ones((3, 4), np.float32)) == (0, 0, 4, 3)
    one = np.zeros((3, 3), np.float32)
    one[2, 1] = 1e-6
    assert mura.strongest_region(one) == (1, 2, 2, 3)
    one[1, 2] = 1e-6  # a corner does not hang together
    assert mura.strongest_region(one) == (2, 1, 3, 2)
    for cold in (np.zeros((4, 4)), np.full((4, 4), -1.0), np.full((2, 2), math.nan)):
        assert mura.strongest_region(cold.astype(np.float32)) is None


def test_the_strongest_region_is_that_of_scipy() -> None:
    for seed in range(5):
        heat = mura.enlarge(torch.from_numpy(np.random.default_rng(seed).random((1, 12, 12))).float(), 60,
                            mura.Stage("", 5, 2))[0].numpy() ** 4
        regions, _ = label_regions(heat >= heat.max() / 2)
        rows, columns = find_objects((regions == regions.flat[heat.argmax()]).astype(int))[0]
        assert mura.strongest_region(heat) == (columns.start, rows.start, columns.stop, rows.stop)


def test_log_odds_above_the_threshold() -> None:
    assert mura.log_odds_above(0.5, 0.5) == 0
    assert mura.log_odds_above(0.75, 0.5) == pytest.approx(math.log(3))
    assert mura.log_odds_above(0.5, 0.75) == pytest.approx(-math.log(3))
    assert mura.log_odds_above(0.9, 0.2) == pytest.approx(math.log(9 * 4))
    for probability in (0.0, 1.0):
        assert abs(mura.log_odds_above(probability, 0.5)) == pytest.approx(math.log(999_999))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (3, 500), (500, 2)])
def test_maps_on_the_pixels_of_an_original(height: int, width: int) -> None:
    heat = mura.resize_map(np.full((4, 4), 2.5, np.float64)[:, ::-1], height, width)
    assert heat.shape == (height, width) and heat.dtype == np.float32
    np.testing.assert_allclose(heat, 2.5, rtol=1e-6)


def test_enlarging_bilinearly_by_hand() -> None:
    """Two cells, 0 and 4, over 8 pixels: flat up to their centres at 1.5 and 5.5, and 1 a pixel between."""
    heat = mura.resize_map(np.array([[0, 4]], np.float32), 2, 8)
    assert heat.tolist() == [[0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]] * 2


# ----- the ensemble


def members() -> list[Any]:
    """Return two models that differ in all that is a model's own."""
    dense, res = (network_of(name) for name in NAMES)
    grey = mura.Normalization("given", (0.2,) * 3, (0.4,) * 3)
    return [
        mura.LoadedModel(Path("a.pth"), res, mura.Normalization("imagenet"), SIDE, "stretch", tta=True,
                         temperature=2.0, study_temperature=0.5),
        mura.LoadedModel(Path("b.pth"), dense, grey, OTHER_SIDE, "letterbox", tta=False, temperature=0.5,
                         study_temperature=8.0),
    ]


def inputs(count: int = 2) -> list[Tensor]:
    """Return images of the members' sizes."""
    return [draw_grey(count, SIDE), draw_grey(count, OTHER_SIDE, seed=1)]


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return the network's input, worked by hand."""
    constants = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
    return (images.float() / 255 - constants[0]) / constants[1]


def test_an_ensemble_gives_what_each_member_gives_by_itself() -> None:
    ensemble, images = mura.Ensemble(members(), mura.CPU), inputs()
    dense, res = (network_of(name) for name in NAMES)
    first = normalised(images[0], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    second = normalised(images[1], (0.2,) * 3, (0.4,) * 3)
    with torch.inference_mode():
        expected = torch.stack([(res(first) + res(first.flip(3))) / 2, dense(second)])
        assert (res(first) - res(first.flip(3))).abs().max() > 1e-3
    logits = ensemble.logits(images)
    assert logits.shape == (2, 2) and not logits.requires_grad
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    found = ensemble.probabilities(logits.double().numpy())
    z = logits.double().numpy()
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-z / [[2.0], [0.5]])), rtol=1e-9)
    assert found.dtype == np.float64
    assert ensemble.study_temperature == pytest.approx(2), "the geometric mean of 0.5 and 8"
    assert mura.Ensemble(members()[1:], mura.CPU).study_temperature == pytest.approx(8)
    with pytest.raises(ValueError):
        ensemble.logits(images[:1])


def test_an_ensemble_explains_in_the_precision_in_which_it_predicts(thin: None) -> None:
    """Else an image would have two probabilities, by --predict and by --evaluate."""
    torch.manual_seed(0)
    network = mura.Network("resnet50").eval().requires_grad_(False)
    model = mura.LoadedModel(
        Path("a.pth"), network, mura.Normalization("imagenet"), SIDE, "stretch", tta=False)
    half = mura.Ensemble([model], mura.DevicePrecision(torch.device("cpu"), "bf16"))
    images = [draw_grey(3)]
    exact, expected = mura.Ensemble([model], mura.CPU).logits(images), half.logits(images)
    assert not torch.allclose(exact, expected, atol=1e-5), "bf16 keeps three digits"
    torch.testing.assert_close(half.explain(images, FINE, 1.0)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sign", [1, -1], ids=["abnormal", "normal"])
@pytest.mark.parametrize("method", [FINE, GRADCAM], ids=["fine", "gradcam"])
def test_an_ensemble_explains_each_member_with_its_own(method: Any, sign: int) -> None:
    """With its normalisation, size and TTA, in calibrated logits, with the sign of the class explained."""
    ensemble, images = mura.Ensemble(members(), mura.CPU), inputs()
    dense, res = (network_of(name) for name in NAMES)
    first = normalised(images[0], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    second = normalised(images[1], (0.2,) * 3, (0.4,) * 3)

    (_, own), (_, flipped) = (mura.stage_maps(res, batch, method, sign) for batch in (first, first.flip(3)))
    terms = (own + flipped.flip(3)) / 2
    if method is FINE:
        terms = terms.relu()
        terms = terms / terms.amax((2, 3), keepdim=True).clamp(min=1e-30)
    product = terms.prod(0)
    if method is FINE:
        product = product / product.amax((1, 2), keepdim=True).clamp(min=1e-30)
    expected = [product, mura.class_activation_map(dense, second, method, sign)[1]]
    logits, maps = ensemble.explain(images, method, sign)
    torch.testing.assert_close(logits, ensemble.logits(images), atol=1e-4, rtol=1e-4)
    assert not any(tensor.requires_grad for tensor in (logits, *maps))
    for model, found, heat in zip(ensemble.models, maps, expected, strict=True):
        scale = 1 if method is FINE else model.temperature
        assert found.shape == (2, model.image_size, model.image_size)
        assert found.min() >= 0 and heat.any()
        expected_map = heat / scale
        torch.testing.assert_close(found, expected_map, atol=1e-3 * float(heat.max()), rtol=0)


def test_with_tta_a_flipped_image_has_the_flipped_map(name: str) -> None:
    """About the image and not about the cells, which are not symmetric in it."""
    model = replace(members()[0], network=network_of(name))
    images = draw_grey(1)
    found = [mura.Ensemble([model], mura.CPU).explain([batch], FINE, 1.0)
             for batch in (images, images.flip(3))]
    (logits, (heat,)), (flipped_logits, (flipped,)) = found
    torch.testing.assert_close(logits, flipped_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flipped.flip(2), heat, atol=3e-3, rtol=0)
    assert (heat - heat.flip(2)).abs().max() > 0.1 * heat.max(), "a symmetric map would prove nothing"


class StubDataset:
    """Images held in memory, as a MuraDataset gives them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> Tensor:
        return self.images[torch.from_numpy(indices)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_data_set_is_predicted_once_and_in_order(thin: None, batch_size: int) -> None:
    torch.manual_seed(0)
    first, second = (mura.Network("resnet50").eval() for _ in range(2))
    plain = mura.Normalization("imagenet")
    models = [mura.LoadedModel(Path("a.pth"), first, plain, 64, "stretch", tta=False),
              mura.LoadedModel(Path("b.pth"), second, plain, 32, "stretch", tta=False)]
    ensemble, images = mura.Ensemble(models, mura.CPU), [draw_grey(7, 64), draw_grey(7, 32)]
    datasets, done = [StubDataset(batch) for batch in images], []
    found = ensemble.predict_dataset(datasets, batch_size, mura.Distributed(), done.append)
    assert found.shape == (2, 7) and found.dtype == np.float64 and sum(done) == 7
    assert max(done) <= batch_size
    np.testing.assert_allclose(found, ensemble.logits(images).numpy(), atol=1e-5)


def test_an_infinite_logit_is_no_probability() -> None:
    ensemble = mura.Ensemble(members(), mura.CPU)
    found = ensemble.probabilities(np.array([[np.inf, 0.0], [-np.inf, np.nan]]))
    np.testing.assert_array_equal(found, [[np.nan, 0.5], [np.nan, np.nan]])
