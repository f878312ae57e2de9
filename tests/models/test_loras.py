"""Adapters (LoRA) in files: what they add to a model's weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewstep
from tests.support import pipelines

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONFIG = "lora_adapter_metadata"


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


def adapter(file: Path, said: Any = None, **others: torch.Tensor) -> Path:
    values = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2), **others}
    texts = {} if said is None else {CONFIG: said if isinstance(said, str) else json.dumps(said)}
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
