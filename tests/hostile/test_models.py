"""Hostile models: nothing runs, nothing is written, one line says why, memory stays small."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fewstep
from fewstep.learned import LearnedSolver
from fewstep.models import BUILTIN
from fewstep.networks.features import BUILTIN as FEATURES
from fewstep.networks.features import load_feature_folder
from fewstep.tensors import read_header

GIB = 2**30


def refused(call: Callable[[], Any], words: str) -> None:
    """The refusal is a ValueError of one printable line with these words."""
    with pytest.raises(ValueError, match=words) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000


class Runs:
    """Unpickled by a careless reader, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# -- records ----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / "fashion-mnist", tmp_path / "in" / "model"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "../x"}, "name must be letters"),
        ({"name": "/etc/x"}, "name must be letters"),
        ({"name": ".."}, "name must be letters"),
        ({"name": "a\x00b"}, "control character"),
        ({"name": "a" * 10_000}, "name must be letters"),
        ({"summary": "\x1b[2J"}, "control character"),
        ({"summary": "\u202egnp"}, "control character"),
        ({"summary": "a" * 10_000}, "summary must have at most"),
        ({"classes": ["a", "\x07"] + ["c"] * 8}, "control character"),
        ({"classes": ["a", 3]}, "classes.1 must be text"),
        ({"auto": {"5": {"solver": "ddim", "learned": "../outside"}}}, "auto.5.learned must be"),
        ({"auto": {"5": {"solver": "../outside"}}}, "auto.5.solver must be letters"),
        ({"auto": {"5": {"solver": "/outside"}}}, "auto.5.solver must be letters"),
        ({"auto": {"5": {"solver": "ddim", "grid": [1.0, 2.0]}}}, "strictly decrease"),
        ({"auto": {"5": {"solver": "ddim", "grid": ["80", 0]}}}, "list of levels"),
        ({"auto": {"5": {"solver": "ddim", "path": "x"}}}, "unknown field 'auto.5.path'"),
        ({"auto": {"-1": {"solver": "ddim"}}}, "keyed by a number"),
        ({"folder": "/etc"}, "unknown field 'folder'"),
        ({"sigma_min": "0.002"}, "sigma_min must be a finite number"),
        ({"sigma_max": True}, "sigma_max must be a finite number"),
        ({"sigma_max": 10**400}, "sigma_max"),
        ({"distilled": {"method": "x"}}, "it lacks distilled"),
        ({"distilled": 3}, "distilled must be a table"),
        ({"weights_sha256": "../x"}, "weights_sha256 must be a hash"),
        ({"kind": "../x"}, "kind must be letters"),
        ({"feature_module": "a b"}, "feature_module"),
        ({"feature_module": "nothing.here"}, "no module of the network"),
        ({"network": {"size": 10**9}}, "size must be an integer from 1"),
        ({"network": {"blocks": 10**7}}, "blocks must be an integer from 1"),
        ({"network": {"widths": [64] * 10**6}}, "widths must be 1 to"),
        ({"network": {"size": 32, "blocks": 64, "widths": [4096] * 8}}, "go with its card"),
        ({"network": {"size": 32.0}}, "size must be an integer"),
        ({"network": {"classes": 10**6, "embedding": 16384}}, "go with its card"),
    ],
)
def test_cards(model: Path, fields: dict[str, Any], words: str) -> None:
    edit(model / "card.json", **fields)
    refused(lambda: fewstep.load(model), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not JSON, or was cut short"),
        (b"[]", "must be a table"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": NaN}', "must be finite"),
        (b'{"a": 1e999}', "must be finite"),
        (b"[" * 200_000, "nested more than"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested more than"),
        (b'{"a": "' + b"x" * (17 * 2**20) + b'"}', "at most"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not"),
    ],
)
@pytest.mark.parametrize("kind", ["card.json", "solver.json", "features"])
def test_json(kind: str, text: bytes, words: str, tmp_path: Path) -> None:
    name = "solver.json" if kind == "solver.json" else "card.json"
    (tmp_path / name).write_bytes(text)
    calls = {
        "card.json": lambda: fewstep.load(tmp_path),
        "solver.json": lambda: LearnedSolver.load(tmp_path),
        "features": lambda: load_feature_folder(tmp_path),
    }
    refused(calls[kind], words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sigmas": ["80", "1"]}, "sigmas.0 must be a finite number"),
        ({"sigmas": [1.0, 80.0]}, "sigmas must strictly decrease"),
        ({"sigmas": []}, "at least 2 points"),
        ({"sigmas": [80.0, -1.0]}, "sigmas.1 must be at least 0"),
        ({"nfe": "5"}, "nfe must be an integer"),
        ({"nfe": 10**9}, "nfe is 1000000000"),
        ({"method": ["tuned"]}, "update fewstep"),
        ({"base": "../x"}, "base must be letters"),
        ({"afs": 3}, "afs must be text"),
        ({"settings": 3}, "settings must be a table"),
        ({"settings": {}}, "it lacks"),
        ({"predictor_sha256": "0" * 64}, "is missing"),
        ({"predictor_sha256": "../../etc/passwd"}, "must be a hash"),
        ({"extra": 3}, "unknown field 'extra'"),
    ],
)
def test_learned_solvers(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    shutil.copytree(BUILTIN / "fashion-mnist" / "solvers" / "tuned" / "5", tmp_path / "s")
    edit(tmp_path / "s" / "solver.json", **fields)
    refused(lambda: LearnedSolver.load(tmp_path / "s"), words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "../x"}, "name must be letters"),
        ({"network": {"kind": "residual", "widths": [8], "blocks": 10**7}}, "blocks must be"),
        ({"network": {"kind": "residual", "widths": [10**9], "blocks": 1}}, "widths must be"),
        ({"network": {"kind": ["residual"]}}, "network kind must be"),
        ({"weights_sha256": "x/y"}, "weights_sha256 must be a hash"),
    ],
)
def test_feature_networks(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    shutil.copytree(FEATURES / "fashion-a", tmp_path / "f")
    edit(tmp_path / "f" / "card.json", **fields)
    refused(lambda: load_feature_folder(tmp_path / "f"), words)


# -- files of weights -------------------------------------------------------------------------


def headed(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ONE = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"\xff" * 64, "declares a header of"),
        (struct.pack("<Q", 2**62) + b"{}", "declares a header of"),
        (headed(b"[]"), "must be a table"),
        (headed(f'{{"a":{ONE},"a":{ONE}}}'.encode()), "'a' stands twice"),
        (headed(b'{"a":3}'), "'a' is declared as 3"),
        (headed(ONE.replace("[2]", "[1e3]").join(['{"a":', "}"]).encode()), "is declared as"),
        (headed(ONE.replace("[2]", "[-2]").join(['{"a":', "}"]).encode()), "is declared as"),
        (headed(ONE.replace("[2]", f"[{10**14}]").join(['{"a":', "}"]).encode()), "not fit"),
        (headed(ONE.replace("[0,8]", "[0,80]").join(['{"a":', "}"]).encode()), "not fit"),
        (headed(ONE.replace("[0,8]", "[0]").join(['{"a":', "}"]).encode()), "not fit"),
        (headed(ONE.replace("F32", "F99").join(['{"a":', "}"]).encode()), "is declared as"),
        (headed(f'{{"a":{ONE},"b":{ONE}}}'.encode()), "declares 16 bytes of tensors and has 8"),
        (headed(b'{"__metadata__":{"a":3}}'), "metadata must be a table of texts"),
        (headed(b'{"__metadata__":{"a":"\\u001b[31m"}}'), "control character"),
    ],
)
def test_safetensors_headers(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(lambda: read_header(path), words)


def names(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(1) for key in keys}


UNET, VAE, TEXT = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "first_stage_model.x",
    "cond_stage_model.x",
)
KINDS = [
    (names("lora_unet_a.lora_up.weight", "lora_unet_a.lora_down.weight"), "is a LoRA"),
    (names("unet.a.lora_A.weight", "unet.a.lora_B.weight"), "is a LoRA"),
    (names("unet.a.lora.up.weight"), "is a LoRA"),
    (names("input_blocks.0.0.weight", "time_embed.0.weight"), "guided-diffusion, but damaged"),
    (names(UNET, "first_stage_model.quantize.embedding.weight"), "latent-diffusion, but damaged"),
    (names(UNET, TEXT), r"without its autoencoder: it lacks first_stage_model"),
    (names(UNET, VAE), r"without its text encoder: it lacks cond_stage_model"),
    (names(UNET), "U-Net of a Stable Diffusion alone"),
    (names("conv_in.weight", "down_blocks.0.x"), "one component in diffusers' names"),
    (names("text_model.x"), "a text encoder alone"),
    (names("model.diffusion_model.double_blocks.0.x"), "is a Flux"),
    (names("anything"), "no model that fewstep knows; its tensors: 'anything'"),
]


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize(("tensors", "words"), KINDS, ids=[words[:20] for _, words in KINDS])
def test_single_files_of_another_kind_are_named(
    tensors: dict[str, torch.Tensor], words: str, ending: str, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / f"file{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors}, file)
    refused(lambda: fewstep.load(file), words)


def zipped(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


FOREIGN = b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R."
PICKLES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "runs": (
        lambda p, mark: p.write_bytes(pickle.dumps(Runs(mark))),
        "names .*system., which is no data",
    ),
    "runs in a zip": (lambda p, mark: torch.save({"a": Runs(mark)}, p), "which is no data"),
    "runs as a key": (lambda p, mark: torch.save({"a": [Runs(mark)]}, p), "which is no data"),
    "EDM": (lambda p, mark: p.write_bytes(FOREIGN), "with what that does not take"),
    "memo": (lambda p, mark: p.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f."), "memo has an index"),
    "long": (lambda p, mark: p.write_bytes(b"\x80\x04\x8a\x7f."), "cannot be read"),
    "cut": (lambda p, mark: p.write_bytes(b"\x80\x02}q"), "cannot be read"),
    "text": (lambda p, mark: p.write_bytes(b"hello, this is no model"), "neither safetensors"),
    "zip of text": (lambda p, mark: zipped(p, "a.txt", b"x"), "zip without weights"),
    "zip bomb": (lambda p, mark: zipped(p, "a/data.pkl", b"\0" * 2**27), "is compressed"),
    "broken zip": (lambda p, mark: p.write_bytes(b"PK\x03\x04" + b"x" * 99), "cannot be read"),
    "names": (lambda p, mark: torch.save({"\x1b[31m": torch.zeros(1)}, p), "no model that"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(case: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    make, words = PICKLES[case]
    file, mark = tmp_path / "file.ckpt", tmp_path / "mark"
    make(file, mark)
    refused(lambda: fewstep.load(file), words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.ckpt"]


# -- folders of diffusers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("diffusers")
    from tests.support import pipelines

    base = tmp_path_factory.mktemp("pipelines")
    return {name: pipelines.saved(name, base / name) for name in ("sd", "ddpm", "ldm")}


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "mine.Model"}}, "asks for code"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"A": "b--c.D"}}, "asks for code"),
        ("unet/config.json", {"inner": {"auto_map": {"A": "b"}}}, "asks for code"),
        ("unet/config.json", {"layers_per_block": 10**7}, "layers_per_block must be at most"),
        ("unet/config.json", {"layers_per_block": [10**7, 1]}, "layers_per_block must be"),
        ("unet/config.json", {"block_out_channels": [10**9, 32]}, "block_out_channels must be"),
        ("unet/config.json", {"sample_size": 10**9}, "sample_size must be at most"),
        ("unet/config.json", {"sample_size": float("nan")}, "must be finite"),
        ("vae/config.json", {"latent_channels": 10**12}, "latent_channels must be at most"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers must be"),
        ("text_encoder/config.json", {"vocab_size": 10**10}, "vocab_size must be at most"),
        ("model_index.json", {"_class_name": ["x"]}, "pipeline of class"),
        ("model_index.json", {"unet": ["mine", "UNet"]}, "code beside weights"),
        ("model_index.json", {"unet": ["diffusers", {"a": 1}]}, "must name a class"),
        ("model_index.json", {"../x": ["diffusers", "UNet"]}, "component must be letters"),
        ("model_index.json", {"unet": ["diffusers", "DiffusionPipeline"]}, "of its own"),
    ],
)
def test_pipelines(
    file: str, fields: dict[str, Any], words: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["sd"], tmp_path / "sd"))
    edit(folder / file, **fields)
    refused(lambda: fewstep.load(folder), words)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "."])
def test_code_beside_weights(part: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["sd"], tmp_path / "sd"))
    (folder / part / "diffusers.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    refused(lambda: fewstep.load(folder), "code beside weights")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "size"), [("ddpm", (17, 17)), ("ddpm", (16, 17)), ("ldm", (18, 18)), ("sd", (17, 16))]
)
def test_sizes_that_the_network_cannot_halve(
    name: str, size: tuple[int, int], saved: dict[str, Path]
) -> None:
    refused(lambda: fewstep.load(saved[name], size=size), "size must be multiples of")


def test_sizes_are_bounded(saved: dict[str, Path]) -> None:
    refused(lambda: fewstep.load(saved["ddpm"], size=(2**30, 2**30)), "up to 16384")


# -- memory -----------------------------------------------------------------------------------

MEASURED = """
import sys
import fewstep
try:
    fewstep.load(sys.argv[1])
except ValueError as error:
    print("refused", str(error)[:200])
# VmHWM, since ru_maxrss begins with the peak of the process that started this one
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.parametrize("case", ["layers", "size", "header", "memo"])
def test_memory_stays_below_one_gib(case: str, model: Path, tmp_path: Path) -> None:
    path = model
    if case == "layers":
        edit(model / "card.json", network={"blocks": 64, "widths": [4096] * 8, "size": 4096})
    elif case == "size":
        edit(model / "card.json", network={"size": 10**9})
    elif case == "header":
        edit(model / "card.json", weights_sha256="")
        entry = ONE.replace("[2]", f"[{10**14}]").replace("8]", f"{4 * 10**14}]")
        (model / "model.safetensors").write_bytes(headed(f'{{"a":{entry}}}'.encode()))
    else:
        pytest.importorskip("diffusers")
        path = tmp_path / "memo.ckpt"
        path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told, peak = done.stdout.splitlines()
    assert told.startswith("refused")
    assert int(peak) * 1024 < GIB
