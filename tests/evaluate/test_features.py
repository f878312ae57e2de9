"""Feature networks: preprocessing, TorchScript files, Inception's checks, CLIP scores."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.evaluate import features as features_module
from fewstep.evaluate.clip import load_clip
from fewstep.evaluate.features import (
    Preprocessing,
    load_inception,
    load_torchscript,
    module_features,
    own_features,
    resolve_features,
)
from fewstep.networks.features import feature_networks, reference_path


def random_images(n: int, h: int, w: int, c: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, h, w, c), dtype=np.uint8)


class Means(nn.Module):
    """Mean and mean square of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return torch.cat([x.mean(dim=(2, 3)), (x * x).mean(dim=(2, 3))], dim=1)


class FakeInception(nn.Module):
    """Called like the Inception file: uint8 of any size, 2048 features where they are asked for."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        means = img.float().mean(dim=(2, 3))
        ramp = torch.arange(2048, dtype=torch.float32)
        out = means[:, :1] + ramp * means[:, 1:2]
        if return_features:
            return out
        return out[:, :10]


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what such files are
        torch.jit.script(module).save(str(path))  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize(
    "scale, mean, std",
    [
        ("unit", [0.5] * 3, [0.5] * 3),
        ("zero-one", [0.0] * 3, [1.0] * 3),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_scales(scale, mean, std):
    images = random_images(2, 3, 4, 3)
    found = Preprocessing(scale=scale)(images)
    exact = (images / 255 - np.array(mean)) / np.array(std)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - exact.transpose(0, 3, 1, 2)).max() < 1e-6


def test_bytes_go_through_as_they_are_and_grey_is_repeated():
    images = random_images(2, 3, 4, 1)
    found = Preprocessing(scale="bytes", channels="rgb")(images)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), images.repeat(3, axis=3).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("c", [1, 3])
def test_resizing_is_pillows_and_rounds_to_bytes(c):
    images = random_images(2, 7, 7, c)
    found = Preprocessing.parse("pil-lanczos-5,bytes")(images).numpy()
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(image.squeeze())
        exact = np.asarray(picture.resize((5, 5), Image.Resampling.LANCZOS)).reshape(5, 5, c)
        assert np.array_equal(ours, exact.transpose(2, 0, 1))


def test_rgb_pictures_pass_for_grey_only_without_colours():
    grey = random_images(2, 4, 4, 1)
    spec = Preprocessing(channels="grey")
    assert torch.equal(spec(grey.repeat(3, axis=3)), spec(grey))
    with pytest.raises(ValueError, match="grey pictures, and these have colours"):
        spec(random_images(1, 4, 4, 3))


def test_words_and_names_go_together():
    words = ["native", "pil-bicubic-299", "pil-box-64,imagenet,rgb", "bytes", "grey,zero-one"]
    specs = [Preprocessing.parse(text) for text in words]
    assert len({spec.name for spec in specs}) == len(words)
    assert specs[1].name == "pil-bicubic-299 uint8"
    assert specs[0] == Preprocessing()
    for bad in ("pil-sinc-32", "pil-box-", "sepia"):
        with pytest.raises(ValueError, match=f"preprocessing .* got '{bad}'"):
            Preprocessing.parse(bad)


@pytest.mark.parametrize("bad", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)])
def test_only_uint8_nhwc_is_taken(bad):
    with pytest.raises(ValueError, match="uint8"):
        Preprocessing()(bad)


def test_a_module_is_an_extractor_of_its_own_numbers():
    images = random_images(5, 6, 6, 3)
    extractor = module_features(Means(), "means", shape=(6, 6, 3))
    assert (extractor.dim, extractor.name, extractor.distance) == (6, "means native", "FD-means")
    x = images.transpose(0, 3, 1, 2) / 127.5 - 1
    exact = np.concatenate([x.mean((2, 3)), np.square(x).mean((2, 3))], axis=1)
    found = extractor(images)
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() < 1e-6


def test_a_network_without_rows_of_features_is_refused():
    with pytest.raises(ValueError, match=r"must give features \[n, d\], got \(1, 3, 32, 32\)"):
        module_features(nn.Identity(), "maps")


def test_a_torchscript_file_is_named_by_its_hash_and_gives_the_modules_numbers(tmp_path):
    path = script(Means(), tmp_path / "means.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    trust = [digest[:12]]
    extractor = resolve_features(f"{path}:pil-box-4,imagenet", trust=trust)
    assert extractor.name == f"means-{digest[:8]} pil-box-4 uint8 imagenet"
    assert (extractor.dim, extractor.weights) == (6, digest)
    images = random_images(3, 8, 8, 3)
    own = module_features(Means(), "own", Preprocessing.parse("pil-box-4,imagenet"))
    assert np.abs(extractor(images) - own(images)).max() < 1e-6
    assert resolve_features(str(path), trust=trust).name.endswith(" native")


def test_a_network_that_fails_says_so_in_one_line(tmp_path):
    path = script(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), tmp_path / "net.pt")
    trust = [hashlib.sha256(path.read_bytes()).hexdigest()]
    extractor = load_torchscript(path, trust=trust, shape=(4, 4, 3))
    assert extractor.dim == 2
    with pytest.raises(ValueError, match="fails on") as raised:
        extractor(random_images(1, 8, 8, 3))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="cannot run on a picture of 8x8x3"):
        load_torchscript(path, trust=trust, shape=(8, 8, 3))


@pytest.mark.parametrize("data", [b"", b"not TorchScript", b"PK\x03\x04"])
def test_a_file_that_is_no_torchscript_is_refused(data, tmp_path):
    (tmp_path / "net.pt").write_bytes(data)
    trust = [hashlib.sha256(data).hexdigest()]
    with pytest.raises(ValueError, match=r"net\.pt is not a TorchScript file") as raised:
        resolve_features(str(tmp_path / "net.pt"), trust=trust)
    assert "\n" not in str(raised.value)


def test_a_pickle_is_never_run(tmp_path):
    sprung = tmp_path / "sprung"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (sprung,))

    torch.save({"weights": Evil()}, tmp_path / "net.pt")
    trust = [hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()]
    with pytest.raises(ValueError, match="not a TorchScript file"):
        resolve_features(str(tmp_path / "net.pt"), trust=trust)
    assert not sprung.exists()


def test_unknown_features_list_what_there_is():
    with pytest.raises(ValueError, match=r"no features 'vgg'; there are .*inception"):
        resolve_features("vgg")


def test_inception_is_called_for_its_features_and_only_the_checked_file_is_fid(tmp_path):
    path = script(FakeInception(), tmp_path / "inception-2015-12-05.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"its SHA-256 is {digest}, not f58cb9b6"):
        load_inception(path)
    own = load_inception(path, sha256=digest)
    assert own.distance == f"FD-inception-{digest[:8]}"
    assert own.dim == 2048
    images = random_images(3, 10, 12, 1)
    means = images.mean((1, 2))
    exact = means + np.arange(2048) * means
    assert np.abs(own(images) - exact).max() < 0.1  # float32 at 5e5


def test_the_usual_inception_is_named_with_its_resize_and_is_fid(tmp_path, monkeypatch):
    path = script(FakeInception(), tmp_path / "i.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest)
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(path))
    extractor = load_inception(sha256=digest)
    assert extractor.distance == "FID"
    assert extractor.name == "inception-2015-12-05 tf1-bilinear-299 uint8"
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(tmp_path / "missing.pt"))
    with pytest.raises(FileNotFoundError, match="fetch https://"):
        resolve_features("inception")


class Answer:
    def __init__(self, data: bytes):
        self.data = data

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def read(self, most: int) -> bytes:
        return self.data[:most]


def test_inception_is_downloaded_once_checked_and_kept(tmp_path, monkeypatch):
    data = script(FakeInception(), tmp_path / "source.pt").read_bytes()
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return Answer(data)

    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features_module.urllib.request, "urlopen", answer)
    with pytest.raises(ValueError, match="answered with another file"):
        load_inception()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", hashlib.sha256(data).hexdigest())
    for _ in range(2):
        assert load_inception(sha256=hashlib.sha256(data).hexdigest()).distance == "FID"
    assert len(asked) == 2  # once refused, once kept
    assert (tmp_path / "cache" / "inception-2015-12-05.pt").read_bytes() == data


def test_without_a_network_it_says_where_to_put_the_file(tmp_path, monkeypatch):
    def fail(url, timeout):
        raise OSError("no route to host")

    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(features_module.urllib.request, "urlopen", fail)
    with pytest.raises(ValueError, match=r"no route.*put it at .*FEWSTEP_INCEPTION") as raised:
        resolve_features("inception")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not feature_networks(), reason="the built-in networks are not there")
def test_built_in_networks_are_extractors_with_their_data():
    names = own_features("fashion-mnist")
    assert names == ("fashion-a", "fashion-b")
    images = random_images(3, 32, 32, 1)
    for name in names:
        extractor = resolve_features(name)
        folder = reference_path(name).parent
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert extractor.name == f"{name}-{digest[:8]} native"
        assert extractor.distance == f"FD-{name}"
        assert extractor.data is not None
        assert extractor.data.extractor == extractor.name
        assert extractor.data.dim == extractor.dim
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        assert np.abs(extractor(images) - extractor.network(x).numpy()).max() < 1e-4
        with pytest.raises(ValueError, match="takes pictures of 32x32, got 28x28"):
            extractor(random_images(1, 28, 28, 1))
    assert own_features("another-model") == ()


def tiny_clip(folder: Path) -> Path:
    """A random CLIP model with tokenizer and preprocessor, in the files that the hub has."""
    from transformers import CLIPConfig, CLIPModel

    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    config = CLIPConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 12,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    files = {
        "vocab.json": {word: i for i, word in enumerate(words)},
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 12,
            "pad_token": "<|endoftext|>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
            "resample": 3,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_the_clip_score_is_the_cosine_of_the_models_own_embeddings(clip_folder):
    scorer = load_clip(clip_folder)
    images, captions = random_images(4, 16, 16, 3), ["a", "b c", "dd", "a e"]
    found = scorer(images, captions)
    model = scorer.model
    ids = {"a": 28, "b": 29, "c": 30, "e": 32, "d": 5, "d</w>": 31}
    tokens = [
        [0, ids["a"], 1, 1],
        [0, ids["b"], ids["c"], 1],
        [0, ids["d"], ids["d</w>"], 1],
        [0, ids["a"], ids["e"], 1],
    ]
    pixels = torch.from_numpy((images / 255 - 0.5) / 0.25).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        vision = model.visual_projection(model.vision_model(pixels).pooler_output)
        cosines = []
        for row, caption in zip(tokens, vision, strict=True):
            row = row[: row.index(1) + 1]  # one by one, so that nothing is padded
            text = model.text_model(torch.tensor([row])).pooler_output
            text = model.text_projection(text)[0]
            cosines.append(float(text @ caption / text.norm() / caption.norm()))
    exact = 100 * np.maximum(cosines, 0)
    assert (exact > 0).any()
    assert np.abs(found - exact).max() < 1e-3


def test_long_captions_are_cut_and_grey_pictures_are_taken(clip_folder):
    scorer = load_clip(clip_folder)
    long = "a b c d e f g h i j k l m n o p"
    found = scorer(random_images(2, 20, 24, 1), [long, long])
    assert found.shape == (2,)
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="got 1 captions for 2"):
        scorer(random_images(2, 20, 24, 1), ["a"])


def test_a_folder_that_is_no_clip_model_is_refused_in_one_line(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a CLIP model that can be read") as raised:
        load_clip(tmp_path)
    assert "\n" not in str(raised.value)
