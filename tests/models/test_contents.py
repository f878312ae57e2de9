"""What a file of weights is, and what a single file says of its process, from its keys alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.models.formats.contents import declared, recognise, tensor_names

V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}


def file(folder: Path, *keys: str, said: str | None = None) -> Path:
    metadata = None if said is None else {"modelspec.prediction_type": said}
    save_file({key: torch.zeros(1) for key in keys}, folder / "m.safetensors", metadata)
    return folder / "m.safetensors"


@pytest.mark.parametrize(
    "keys, said, wanted",
    [
        (["w"], None, {}),
        (["w", "v_pred"], None, V),
        (["w", "model.v_pred"], None, V),
        (["w", "ztsnr"], None, ZERO),
        (["w", "v_pred", "ztsnr"], None, {**V, **ZERO}),
        (["w"], "v", V),
        (["w"], "V", V),
        (["w"], "epsilon", {"prediction_type": "epsilon"}),
        (["w"], "", {}),
        (["w"], "something new", {}),
        (["v_pred", "ztsnr"], "v", {**V, **ZERO}),
        (["w.v_pred.weight"], None, {}),
    ],
)
def test_a_file_says_what_it_predicts_by_keys_and_metadata(keys, said, wanted, tmp_path) -> None:
    assert declared(file(tmp_path, *keys, said=said)) == wanted


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max", "edm_eps.sigma_min"])
def test_edm_s_process_is_refused(key, tmp_path) -> None:
    with pytest.raises(ValueError, match="of EDM's process"):
        declared(file(tmp_path, "w", key))


def test_one_that_contradicts_itself_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="has the key v_pred, and its metadata say epsilon"):
        declared(file(tmp_path, "v_pred", said="epsilon"))


@pytest.mark.parametrize(
    "keys, name",
    [
        (["lora_unet_x.lora_up.weight"], "a LoRA"),
        (["unet.x.lora_A.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["emb_params"], "an embedding of textual inversion"),
        (["clip_l", "clip_g"], "an embedding of textual inversion"),
        (["double_blocks.0.x"], "a Flux"),
    ],
)
def test_an_addition_to_a_model_is_told_from_a_model(keys, name, tmp_path) -> None:
    kind = recognise(file(tmp_path, *keys))[0]
    assert kind is not None
    assert (kind.name, bool(kind.advice)) == (name, True)


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"\n<html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"GGUF\x03\0\0\0", "it is a GGUF"),
        (b'{"error": "x"}', "it is JSON"),
        (b"\x08\x07\x12\x04", "neither safetensors, nor of torch.save"),
    ],
)
def test_what_is_no_file_of_weights_is_called_what_it_is(data, what, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"cannot be read: .*{what}"):
        tensor_names(path)
