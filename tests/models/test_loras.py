"""Adapters (LoRA) in files: what they add to a model's weights, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewstep
from fewstep.models.formats.loras import Lora, with_loras
from tests.support import pipelines

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONFIG = "lora_adapter_metadata"
EMPTY: Mapping[str, torch.Tensor] = MappingProxyType({})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.saved("sd", tmp_path_factory.mktemp("lora") / "sd")


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Of the network and the text encoder, by names that adapters do not change."""
    found = {}
    for part in ("unet", "text_encoder"):
        for name, weight in getattr(pipe, part).state_dict().items():
            if "lora_" not in name:
                found[f"{part}.{name.replace('.base_layer', '')}"] = weight
    return found


PATTERNS: list[tuple[dict[str, float], bool]] = [
    ({"to_q": 32}, True),
    ({f"^{LAYER}": 2, "attn1.to_q": 5.5}, False),  # the first holds
    ({r"attn2\.to_k": 3, r"conv1$": 0}, True),
]


@pytest.mark.parametrize(("pattern", "root"), PATTERNS)
def test_configurations_of_peft_add_what_they_add_in_diffusers(
    pattern: dict[str, float], root: bool, folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    diffusers = pipelines.diffusers
    from peft.utils import get_peft_model_state_dict

    how = {"r": 4, "lora_alpha": 6, "use_rslora": root, "init_lora_weights": False}
    unet = peft.LoraConfig(
        **how,
        target_modules=["to_q", "to_k", "conv1"],
        alpha_pattern=pattern,
        rank_pattern={"to_k": 2},
    )
    text = peft.LoraConfig(
        **how, target_modules=["q_proj"], alpha_pattern={"1.self_attn.q_proj": 9.0}
    )
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in weights(pipe).items()}
    torch.manual_seed(0)
    pipe.unet.add_adapter(unet)
    pipe.text_encoder.add_adapter(text)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(
            pipe.text_encoder, adapter_name="default"
        ),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    pipe.fuse_lora(components=["unet", "text_encoder"])
    theirs = weights(pipe)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    ours = weights(fewstep.load(folder, loras=[(file, 1.0)]).pipe)  # type: ignore[attr-defined]
    assert ours.keys() == theirs.keys()
    changed = [name for name in ours if not torch.equal(theirs[name], before[name])]
    assert len(changed) > 8
    assert any(name.startswith("text_encoder.") for name in changed)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-5)


def adapter(
    file: Path, said: Any = None, text: str = CONFIG, others: Mapping[str, torch.Tensor] = EMPTY
) -> Path:
    values = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2), **others}
    texts = {} if said is None else {text: said if isinstance(said, str) else json.dumps(said)}
    save_file({f"unet.{LAYER}.{end}": value for end, value in values.items()}, file, texts)
    return file


FIELDS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "it must be a table, got"),
    "no JSON": ("{", "it is not JSON"),
    "a long number": (
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        "unet.lora_alpha must be a finite",
    ),
    "a longer one": ('{"unet.lora_alpha": 1' + "0" * 5000 + "}", "integer string"),
    "infinite": ('{"unet.lora_alpha": 1e999}', "numbers must be finite"),
    "a text": ({"unet.lora_alpha": "8"}, "unet.lora_alpha must be a finite number, got '8'"),
    "none": ({"unet.lora_alpha": None}, "unet.lora_alpha must be a finite number, got None"),
    "true": ({"unet.lora_alpha": True}, "unet.lora_alpha must be a finite number, got True"),
    "of layers": ({"unet.alpha_pattern": {"to_q": [1]}}, "unet.alpha_pattern 'to_q' must be a fin"),
    "no layers": ({"unet.alpha_pattern": [1]}, "unet.alpha_pattern must be a table"),
    "a rule": ({"unet.alpha_pattern": {"(a|a)*q": 1}}, r"names of layers, or their ends, got '\(a"),
    "root": ({"unet.use_rslora": "yes"}, "unet.use_rslora must be true or false, got 'yes'"),
    "dora": ({"unet.use_dora": True}, "unet.use_dora is True, a kind of adapter that fewstep"),
    "bias": ({"text_encoder.bias": "all"}, "text_encoder.bias is 'all', a kind"),
    "base": ({"unet.init_lora_weights": "pissa_niter_4"}, "unet.init_lora_weights is 'pissa_nit"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_configurations_that_cannot_be_followed_are_refused_by_their_field(
    case: str, folder: Path, tmp_path: Path
) -> None:
    said, words = FIELDS[case]
    file = adapter(tmp_path / "lora.safetensors", said)
    with pytest.raises(ValueError, match=words) as told:
        fewstep.load(folder, loras=[(file, 1.0)])
    assert str(told.value).startswith(f"{file} has {CONFIG}")
    assert "\n" not in str(told.value)


def test_two_words_for_alpha_are_refused(folder: Path, tmp_path: Path) -> None:
    said, alpha = {"unet.lora_alpha": 4}, torch.tensor(2.0)
    file = adapter(tmp_path / "lora.safetensors", said, others={"alpha": alpha})
    with pytest.raises(ValueError, match=r"to_q.alpha', which both say alpha; remove one"):
        fewstep.load(folder, loras=[(file, 1.0)])


def test_one_layer_under_two_names_is_refused(folder: Path, tmp_path: Path) -> None:
    file, short = tmp_path / "lora.safetensors", f"lora_unet_{LAYER.replace('.', '_')}"
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    values = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    save_file({**values, f"{short}.lora_down.weight": down.clone()}, file)
    with pytest.raises(ValueError, match="for a layer that has it under another name"):
        fewstep.load(folder, loras=[(file, 1.0)])


HUGE = torch.full((2, 32), 1e30)
NUMBERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "two alphas": ({"alpha": torch.ones(2)}, "must have one finite number, got torch.float32 of"),
    "no alpha": ({"alpha": torch.ones(0)}, r"must have one finite number, got .* shape \[0\]"),
    "NaN": ({"alpha": torch.tensor(torch.nan)}, "one finite number, got NaN or infinity in"),
    "infinite": ({"alpha": torch.tensor([torch.inf]).half()}, "one finite number, got NaN or inf"),
    "true": ({"alpha": torch.tensor(True)}, "one finite number, got torch.bool"),
    "complex": ({"alpha": torch.tensor(1j)}, "one finite number, got torch.complex64"),
    "down": ({"lora_A.weight": torch.full((2, 32), torch.inf)}, "'unet.*lora_A.weight' must have"),
    "up": ({"lora_B.weight": torch.full((32, 2), torch.nan).bfloat16()}, "lora_B.weight' must"),
    "integers": ({"lora_A.weight": torch.ones(2, 32, dtype=torch.int64)}, "floating point numbers"),
    "their product": ({"lora_A.weight": HUGE, "lora_B.weight": HUGE.T.contiguous()}, "too large"),
    "alpha of it": ({"lora_A.weight": HUGE, "alpha": torch.tensor(1e30)}, "too large for"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_are_not_finite_are_refused_before_anything_changes(
    case: str, folder: Path, tmp_path: Path
) -> None:
    values, words = NUMBERS[case]
    good, bad = adapter(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    adapter(bad, others=values)
    model: Any = fewstep.load(folder)
    before = {name: weight.clone() for name, weight in weights(model.pipe).items()}
    with pytest.raises(ValueError, match=words) as told:
        with_loras(model, [Lora(good), Lora(bad)])
    assert str(told.value).startswith(f"{bad} ")
    assert "\n" not in str(told.value)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model.pipe).items())


def test_an_alpha_of_any_kind_of_number_is_one(folder: Path, tmp_path: Path) -> None:
    before = fewstep.load(folder).net.get_submodule(LAYER).weight  # type: ignore[attr-defined]
    for alpha in (torch.tensor(3), torch.tensor([3.0]).half(), torch.tensor([[3]]).to(torch.uint8)):
        file = adapter(tmp_path / "lora.safetensors", others={"alpha": alpha})
        found: Any = fewstep.load(folder, loras=[(file, 0.5)])
        more = found.net.get_submodule(LAYER).weight - before
        # ones of rank 2 make 2, times alpha / rank and the scale
        torch.testing.assert_close(more, torch.full((32, 32), 2 * 3 / 2 * 0.5), rtol=0, atol=1e-6)


HOW = {"method": "lcm", "levels": [2.0, 1.0], "teacher": "a", "teacher_weights": ""}
CARDS = {
    "a list": ("[1]", "must be a mapping"),
    "a number": ("1", "must be a mapping"),
    "a long number": ('{"name": "a", "sigma_min": 1' + "0" * 400 + "}", "sigma_min must be a fin"),
    "told": (
        json.dumps({"name": "a", "distilled": HOW, "network": {"told": [["gamma"]]}}),
        "its network is told numbers",
    ),
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_that_cannot_be_used_are_refused(case: str, folder: Path, tmp_path: Path) -> None:
    said, words = CARDS[case]
    file = adapter(tmp_path / "lora.safetensors", text="fewstep", said=said)
    with pytest.raises(ValueError, match=f"has a card that cannot be read .*{words}") as told:
        fewstep.load(folder, loras=[(file, 1.0)])
    assert str(told.value).startswith(str(file))
    assert "\n" not in str(told.value)


def test_a_file_in_float8_adds_what_its_numbers_are(folder: Path, tmp_path: Path) -> None:
    before = fewstep.load(folder).net.get_submodule(LAYER).weight  # type: ignore[attr-defined]
    down = torch.full((2, 32), 0.5, dtype=torch.float8_e4m3fn)
    file = adapter(tmp_path / "lora.safetensors", others={"lora_A.weight": down})
    found: Any = fewstep.load(folder, loras=[(file, 1.0)])
    more = found.net.get_submodule(LAYER).weight - before
    torch.testing.assert_close(more, torch.ones(32, 32), rtol=0, atol=1e-6)
