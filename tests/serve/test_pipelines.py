"""Text-to-picture pipelines in the service: latents, prompts, sizes, previews by a linear map."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.sampling.settings import Settings
from fewstep.serve.engine import Engine
from fewstep.serve.pictures import to_pixels
from fewstep.serve.previews import Shown, fit, read_tiny, shown_by
from tests.support import pipelines
from tests.support.serving import asked_of, collect, make, running, submit


@pytest.fixture(scope="module")
def model() -> Any:
    return fewstep.models.from_pipe(pipelines.sd())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_unlike_prompts_and_guidance_share_a_batch(model):
    engine = Engine(rows=16, threads=1)
    asks = [
        {"prompt": "cat", "guidance": 4.0, "negative": "mat"},
        {"prompt": "a mat", "guidance": 2.0},
        {"prompt": "cat"},
        {},
    ]
    try:
        jobs = [
            submit(engine, asked_of(model, Settings("ddim", 3), [i], **given))[1]
            for i, given in enumerate(asks)
        ]
        for i, (events, given) in enumerate(zip(jobs, asks, strict=True)):
            picture = next(e.pixels for e in collect(events) if e.kind == "picture")
            alone = fewstep.sample(model, seeds=[i], solver="ddim", nfe=3, **given).images[0]
            assert np.abs(picture.astype(int) - alone).max() <= 1
    finally:
        engine.stop()


def test_the_linear_map_shows_what_a_linear_autoencoder_decodes():
    class Linear:
        """Latents are an invertible mix of shrunk pixels."""

        scale, shape, picture = 2, (3, 16, 16), (32, 32, 3)
        matrix = torch.tensor([[1.0, 0.2, 0.0], [0.1, 0.8, 0.3], [0.0, 0.4, 1.2]])

        def with_size(self, *_):
            return self

        def encode(self, images):
            x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            small = torch.nn.functional.avg_pool2d(x, 2)
            return torch.einsum("oc,nchw->nohw", self.matrix, small) + 0.3

    linear = Linear()
    shown = Shown(fit(linear).numpy())
    picture = pipelines.noise(3, 4, 4, seed=5).repeat_interleave(8, 1).repeat_interleave(8, 2)
    picture = (torch.tanh(picture) + 1) * 127.5
    image = picture.round().to(torch.uint8).permute(1, 2, 0).numpy()
    latents = linear.encode(image[None])[0].numpy()
    seen = shown.pixels(latents, (16, 16, 3))
    assert np.abs(seen.astype(int) - image[::2, ::2]).max() <= 2


def test_a_preview_of_latents_has_the_picture_s_size(model):
    shown = shown_by(model)
    assert shown.weights is not None
    assert shown.weights.shape == (3, model.shape[0] + 1)
    state = model.prior([1])[0].numpy()
    assert shown.pixels(state, model.picture).shape == model.picture
    again = shown_by(model).weights  # from the cache
    assert again is not None
    assert np.array_equal(again, shown.weights)


def tiny(folder: Any, channels: int) -> Any:
    """A folder with a tiny autoencoder, and what it decodes."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    net = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.5,
    )
    net.save_pretrained(folder)
    return net


def test_a_tiny_autoencoder_by_its_folder_shows_latents(model, tmp_path):
    net = tiny(tmp_path, model.shape[0])
    shown = shown_by(model, read_tiny(tmp_path))
    state = model.prior([1])[0]
    height, width, channels = model.picture
    with torch.no_grad():
        wanted = net.eval().decode(state[None] / 0.5).sample[0]
    seen = shown.pixels(state.numpy(), (2 * model.shape[1], 2 * model.shape[2], channels))
    assert np.array_equal(seen, to_pixels(wanted.numpy()))
    assert shown.pixels(state.numpy(), model.picture).shape == (height, width, channels)


def test_a_tiny_autoencoder_that_does_not_fit_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="preview_decoder must be a folder of AutoencoderTiny"):
        read_tiny(tmp_path)
    tiny(tmp_path, model.shape[0] + 1)
    with pytest.raises(ValueError, match="preview_decoder must take"):
        shown_by(model, read_tiny(tmp_path))


def test_painting_of_latents_keeps_pixels(model):
    from fewstep.sampling.request import Request
    from fewstep.serve.order import order

    height, width, _ = model.picture
    image = np.random.default_rng(0).integers(0, 255, (1, height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), bool)
    mask[: height // 2] = True
    request = Request((1,), prompt="cat", image=image, strength=1.0)
    engine = Engine(rows=4, threads=1)
    try:
        picture = make(engine, order("m", model, request, Settings("ddim", 2), mask=mask))[0]
    finally:
        engine.stop()
    assert (picture[height // 2 :] == image[0, height // 2 :]).all()
    assert (picture[: height // 2] != image[0, : height // 2]).any()


def test_a_pipeline_is_served_with_its_sizes(model):
    with (
        running(models={"sd": model}) as (address, _),
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        facts = http.get("/v1/models").json()["data"][0]
        assert facts["text"]
        height, width, _ = model.picture
        body = {"prompt": "a cat", "nfe": 3, "seed": 1, "size": f"{2 * width}x{height}"}
        found = http.post("/v1/images/generations", json=body).json()
        picture = Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
        assert picture.size == (2 * width, height)
        assert found["data"][0]["revised_prompt"] == "a cat"
        assert (
            http.post("/v1/images/generations", json={**body, "size": "16384x16384"}).status_code
            == 400
        )
        assert (
            http.post("/v1/images/generations", json={**body, "size": "17x17"}).status_code == 400
        )
        stream = http.post("/v1/previews", json={"prompt": "a cat", "n": 2, "nfe": 3, "seed": 1})
        assert stream.text.count("preview.partial_image") >= 4
        assert "error" not in stream.text
