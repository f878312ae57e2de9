"""A folder of pictures is of one model: whatever changes a pixel is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.integrations.pipeline import FewstepPipeline
from fewstep.learned.grid_search import OnGrid
from fewstep.learned.solver import LearnedSolver
from fewstep.learned.training import known_of
from fewstep.models.formats.diffusers import from_pipe
from fewstep.models.identity import checksum, checksums, differ
from fewstep.sampling.folder import sample_to_folder
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from tests.support import pipelines


def into(folder: Path, model: Any, **given: Any) -> Any:
    if model.card.kind == "pipeline" and model.family.encode:
        given = {"prompt": "a cat", **given}
    return sample_to_folder(model, folder, Request((0,), **given), Settings("ddim", 1))


@torch.no_grad()
def nudged(module: torch.nn.Module) -> None:
    next(module.parameters()).view(-1)[0] += 1e-3


def shorter(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = 8


def other(**config: Any) -> Callable[[Any], None]:
    """Changes the scheduler's configuration."""

    def change(pipe: Any) -> None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)

    return change


CHANGES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("sd", lambda pipe: nudged(pipe.unet), "components.unet="),
    ("sd", lambda pipe: nudged(pipe.vae), "components.vae="),
    ("sd", lambda pipe: nudged(pipe.text_encoder), "components.text_encoder="),
    ("sd", shorter, "components.tokenizer="),
    ("sd", lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4), "components.unet="),
    ("sd", lambda pipe: pipe.unet.register_to_config(norm_num_groups=4), "components.unet="),
    ("sd", lambda pipe: pipe.vae.enable_slicing(), "autoencoder.use_slicing=False (now True)"),
    ("sd", lambda pipe: pipe.vae.enable_tiling(), "autoencoder.use_tiling=False (now True)"),
    (
        "sd",
        lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
        "autoencoder.scaling_factor=0.18215 (now 0.5)",
    ),
    ("sd", other(beta_end=0.02), "scheduler.beta_end=0.012 (now 0.02)"),
    (
        "sd",
        other(prediction_type="v_prediction"),
        "scheduler.prediction_type=epsilon (now v_prediction)",
    ),
    ("sd", other(clip_sample=True), "scheduler.clip_sample=False (now True)"),
    ("ddpm", other(trained_betas=[1e-4 * i for i in range(1, 101)]), "scheduler.table of betas="),
    ("ddpm", lambda pipe: nudged(pipe.unet), "components.unet="),
    ("ldm", lambda pipe: nudged(pipe.vqvae), "components.vqvae="),
    ("sdxl", lambda pipe: nudged(pipe.text_encoder_2), "components.text_encoder_2="),
    (
        "sdxl",
        lambda pipe: pipe.register_to_config(force_zeros_for_empty_prompt=False),
        "conditioning.force_zeros_for_empty_prompt=True (now False)",
    ),
    ("sd3", other(shift=2.0), "scheduler.shift=3.0 (now 2.0)"),
    ("sd3", lambda pipe: nudged(pipe.transformer), "components.transformer="),
    ("sd3", lambda pipe: nudged(pipe.text_encoder_3), "components.text_encoder_3="),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a picture of each pipeline."""
    folder = tmp_path_factory.mktemp("made")
    for name in dict.fromkeys(name for name, *_ in CHANGES):
        pipe = pipelines.MAKERS[name]()
        into(folder / name, from_pipe(pipe))
        assert into(folder / name, from_pipe(pipe)).skipped == 1
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name, change, named", CHANGES)
def test_a_folder_refuses_a_pipeline_that_was_changed(name, change, named, made):
    pipe, picture = pipelines.MAKERS[name](), made[name] / "000000.png"
    before = picture.read_bytes()
    change(pipe)
    with pytest.raises(ValueError, match="is there already, made with") as caught:
        into(made[name], from_pipe(pipe))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert picture.read_bytes() == before


def test_a_folder_refuses_another_size_and_another_solver_version(tmp_path):
    model = from_pipe(pipelines.sd())
    into(tmp_path, model)
    with pytest.raises(ValueError, match=r"size=\[16, 16\] \(now \[32, 16\]\)"):
        into(tmp_path, model, size=(32, 16))
    with pytest.raises(ValueError, match=r"size=\[16, 16\] \(now \[16, 32\]\)"):
        into(tmp_path, model.with_size(16, 32))


def own(**changed: Any) -> Any:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    given = {"name": "mine", "shape": (1, 8, 8), "sigma_data": 0.5} | changed
    return fewstep.models.of(lambda x, sigma: net(x) * 0, net=net, **given)


NATIVE = [
    (lambda: own(shape=(1, 16, 8)), "shape=[1, 8, 8] (now [1, 16, 8])"),
    (lambda: own(sigma_max=70.0), "range=[0.002, 80.0] (now [0.002, 70.0])"),
    (lambda: own(sigma_data=1.0), "sigma_data=0.5 (now 1.0)"),
]


@pytest.mark.parametrize("change, named", NATIVE, ids=["shape", "range", "sigma_data"])
def test_a_folder_refuses_another_network_of_ones_own(change, named, tmp_path):
    into(tmp_path, own())
    assert into(tmp_path, own()).skipped == 1
    with pytest.raises(ValueError, match="is there already, made with") as caught:
        into(tmp_path, change())
    assert named in str(caught.value)


def test_a_folder_refuses_a_network_whose_weights_were_changed_in_memory(tmp_path):
    model = own()
    into(tmp_path, model)
    nudged(model.net)
    with pytest.raises(ValueError, match=r"components.network=\w+ \(now \w+\)"):
        into(tmp_path, model)


# --- learned solvers and weights in memory -------------------------------------------------------


def table(model: Any) -> LearnedSolver:
    """A solver as training on the model leaves it."""
    card = model.card
    about = {"name": card.name, "weights": card.weights_sha256, **known_of(model)}
    return LearnedSolver(OnGrid("ddim", (card.sigma_max, 1.0, 0.0), "none"), about)


class Adapted(torch.nn.Module):
    """A linear layer with a LoRA, its weights named as peft names them."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@torch.no_grad()
def adapted(pipe: Any) -> None:
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_q = Adapted(attention.to_q)


@torch.no_grad()
def fused(pipe: Any) -> None:
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight
    weight.data += 1e-2 * torch.ones_like(weight)  # as peft merges: past the version counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_of_a_folder_is_told_from_a_pipeline_in_memory(dtype, tmp_path, recwarn):
    folder = pipelines.saved("sd", tmp_path / "sd")
    solver = table(fewstep.load(folder))
    solver.save(tmp_path / "table")
    run = {"solver": str(tmp_path / "table"), "seeds": [0], "prompt": "a cat"}
    pipe = pipelines.diffusers.StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, safety_checker=None
    )
    fewstep.sample(from_pipe(pipe), **run)
    assert not [w for w in recwarn if "trained on other weights" in str(w.message)]
    for change in (fused, adapted):
        one = pipelines.diffusers.StableDiffusionPipeline.from_pretrained(
            folder, dtype=dtype, safety_checker=None
        )
        change(one)
        one.to(dtype)
        with pytest.warns(UserWarning, match="was trained on other weights"):
            fewstep.sample(from_pipe(one), **run)


def test_weights_changed_on_a_loaded_model_are_noticed(tmp_path, recwarn):
    model: Any = fewstep.load(pipelines.saved("sd", tmp_path / "sd"))
    solver = table(model)
    fewstep.sample(model, solver=solver, seeds=[0], prompt="a")
    assert not [w for w in recwarn if "trained on other weights" in str(w.message)]
    fused(model.pipe)
    with pytest.warns(UserWarning, match="was trained on other weights"):
        fewstep.sample(model, solver=solver, seeds=[0], prompt="a")


def test_a_pipeline_in_memory_with_fused_weights_is_warned_of(recwarn):
    pipe = pipelines.sd()
    pipe.set_progress_bar_config(disable=True)
    fast = FewstepPipeline(pipe, table(from_pipe(pipe)))
    run = {"seeds": [0], "output_type": "latent"}
    fast("a cat", **run)
    assert not [w for w in recwarn if "trained on other weights" in str(w.message)]
    fused(pipe)
    with pytest.warns(UserWarning, match="was trained on other weights"):
        fast("a cat", **run)


def test_a_record_without_checksums_goes_by_the_file(tmp_path, recwarn):
    model = own()
    solver = replace(table(model), model={"weights": model.card.weights_sha256})
    fewstep.sample(model, solver=solver, seeds=[0])
    assert not list(recwarn)
    for nonsense in (3, [], {"float32": 3}, {"int8": "a"}):
        solver = replace(table(model), model={"checksums": nonsense})
        LearnedSolver.program(solver)


# --- the checksum --------------------------------------------------------------------------------


def test_a_checksum_is_of_values_places_names_and_shapes():
    def net(*values: float, shape: tuple[int, ...] = (4,), name: str = "a") -> torch.nn.Module:
        made = torch.nn.Module()
        made.register_buffer(name, torch.tensor(values).reshape(shape))
        return made

    plain = net(1, 2, 3, 4.5)
    assert checksum(plain) == checksum(net(1, 2, 3, 4.5))
    others = [
        net(2, 1, 3, 4.5),
        net(1, 2, 3, 4.5000005),
        net(1, 2, 3, 4.5, shape=(2, 2)),
        net(1, 2, 3, 4.5, name="b"),
    ]
    found = {checksum(one) for one in (plain, *others)}
    assert len(found) == 5
    many = torch.nn.Linear(700, 300)
    before = checksum(many)
    with torch.no_grad():
        many.weight[[0, 250]] = many.weight[[250, 0]]  # rows change places, periods apart
    assert checksum(many) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_any_dtype_and_length_has_a_checksum(dtype):
    for length in (0, 1, 3, 7, 2**16 + 5):
        made = torch.nn.Module()
        made.register_buffer("a", torch.arange(length).to(dtype))
        assert len(checksum(made)) == 16
        made.register_buffer("a", torch.arange(length + 1)[1:].to(dtype))
        assert len(checksum(made)) == 16


def test_checksums_compare_over_casts_to_what_is_narrower():
    net = torch.nn.Linear(8, 8)
    known = checksums(net, torch.float32)
    assert set(known) == {"float32", "float16", "bfloat16"}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cast = torch.nn.Linear(8, 8)
        cast.load_state_dict(net.state_dict())
        assert differ(known, cast.to(dtype), dtype) is False
    half = torch.nn.Linear(8, 8).half()
    known = checksums(half, torch.float16)
    assert set(known) == {"float16"}
    assert differ(known, half, torch.float16) is False
    assert differ(known, half.float(), torch.float32) is False  # cast back
    assert differ(known, half.bfloat16(), torch.bfloat16) is None
    assert differ(None, net, torch.float32) is None
    assert checksums(torch.nn.Linear(8, 8, device="meta"), torch.float32) == {}


@pytest.mark.parametrize("name", ["fashion-mnist"])
def test_a_model_that_ships_has_an_identity(name):
    model: Any = fewstep.load(name)
    assert set(model.components()["components"]) == {"network"}
    assert model.differs(model.checksums()) is False
    half: Any = fewstep.load(name, dtype="float16")
    assert half.differs(model.checksums()) is False
    assert model.facts() == half.facts()
