"""The HTTP interface, against a real server on loopback; with the official client where it can."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import fewstep
from fewstep.data.images import metadata_in
from fewstep.serve.engine import Full
from fewstep.serve.keys import read_keys
from fewstep.serve.settings import Limits
from tests.support.serving import running

KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def server():
    with running(
        Limits(most_images=6, most_evaluations=20, prompt_bytes=200, upload_pixels=10_000)
    ) as found:
        yield found


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as found:
        yield found


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def expected(**given: Any) -> np.ndarray:
    return fewstep.sample(fewstep.load("fashion-mnist"), **given).images[..., 0]


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


# -- OpenAI's Images API ------------------------------------------------------------------------


def test_generate_gives_the_pictures_of_the_library_with_every_field(client):
    found = client.images.generate(
        prompt="two sneakers", n=2, extra_body={"seed": [7, 9], "num_inference_steps": 3}
    )
    wanted = expected(seeds=[7, 9], label="sneaker", nfe=3)
    for i, image in enumerate(found.data):
        assert near(pixels(image.b64_json), wanted[i])
        assert image.revised_prompt == "sneaker"
        assert (image.seed, image.nfe) == ([7, 9][i], 3)
        assert image.id.startswith("img_")
    for name in ("created", "background", "output_format", "quality", "size", "usage"):
        assert getattr(found, name) is not None
    assert found.size == "32x32"
    assert found.usage.output_tokens == 6
    assert found.usage.input_tokens_details.text_tokens == 0


def test_a_stream_gives_partial_images_and_then_the_picture(client):
    given = {"seed": 7, "nfe": 5}
    stream = client.images.generate(
        prompt="bag", stream=True, partial_images=2, output_format="webp", extra_body=given
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [event.nfe for event in events] == [2, 3, 5]
    for event in events:
        for name in ("b64_json", "background", "created_at", "output_format", "quality", "size"):
            assert getattr(event, name) is not None, name
        assert event.seed == 7
    assert events[-1].usage.total_tokens == 5
    picture = Image.open(io.BytesIO(base64.b64decode(events[-1].b64_json)))
    assert picture.format == "WEBP"


def test_a_stream_of_several_pictures_completes_each(client):
    stream = client.images.generate(
        prompt="bag", n=3, stream=True, extra_body={"seed": 1, "nfe": 2}
    )
    events = [event for event in stream if event.type == "image_generation.completed"]
    assert sorted(event.index for event in events) == [0, 1, 2]
    assert sorted(event.seed for event in events) == [1, 2, 3]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_file_has_its_format_and_says_how_it_was_made(client, kind):
    found = client.images.generate(
        prompt="boot", output_format=kind, output_compression=80, extra_body={"seed": 3, "nfe": 2}
    )
    data = base64.b64decode(found.data[0].b64_json)
    picture = Image.open(io.BytesIO(data))
    assert picture.format == kind.upper()
    if kind == "png":
        about = metadata_in(io.BytesIO(data))
    else:
        about = json.loads(picture.getexif()[0x010E])
    assert about is not None
    assert (about["seed"], about["nfe"], about["label"]) == (3, 2, "boot")
    assert about["model"] == "fashion-mnist"


def test_an_edit_starts_from_the_picture(client):
    image = expected(seeds=[3], label="bag", nfe=3)[0]
    found = client.images.edit(
        image=("a.png", png(image)),
        prompt="bag",
        n=2,
        extra_body={"seed": 5, "strength": 0.4, "nfe": 3},
    )
    wanted = expected(seeds=[5, 6], label="bag", nfe=3, image=image[..., None], strength=0.4)
    assert near(pixels(found.data[0].b64_json), wanted[0])
    assert near(pixels(found.data[1].b64_json), wanted[1])


def test_an_edit_with_a_mask_changes_what_is_transparent_alone(client):
    image = expected(seeds=[3], label="bag", nfe=3)[0]
    mask = np.zeros((32, 32, 4), np.uint8)
    mask[:, :16, 3] = 255
    stream = client.images.edit(
        image=[("a.png", png(image))],
        mask=("m.png", png(mask)),
        prompt="boot",
        stream=True,
        partial_images=1,
        extra_body={"seed": 5, "nfe": 4},
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    made = pixels(events[-1].b64_json)
    assert (made[:, :16] == image[:, :16]).all()
    assert (made[:, 16:] != image[:, 16:]).any()


def test_models_are_listed_and_found(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["fashion-mnist"]
    one = client.models.retrieve("fashion-mnist")
    assert (one.object, one.owned_by) == ("model", "fewstep")
    assert one.created > 0
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("no-such-model")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    "given, kind, param",
    [
        ({"prompt": "a red dragon"}, openai.BadRequestError, "prompt"),
        ({"prompt": "bag", "n": 7}, openai.BadRequestError, "n"),
        ({"prompt": "bag", "size": "64x64"}, openai.BadRequestError, "size"),
        ({"prompt": "bag " * 100}, openai.BadRequestError, "prompt"),
        ({"prompt": "bag", "extra_body": {"nfe": 21}}, openai.BadRequestError, "nfe"),
        ({"prompt": "bag", "extra_body": {"solver": "eular"}}, openai.BadRequestError, "solver"),
        ({"prompt": "bag", "extra_body": {"sede": 1}}, openai.BadRequestError, "sede"),
        ({"prompt": "bag", "extra_body": {"seed": [1, 2]}}, openai.BadRequestError, "seed"),
        ({"prompt": "bag", "model": "gpt-image-2"}, openai.NotFoundError, "model"),
        ({"prompt": "bag", "n": "two"}, openai.UnprocessableEntityError, "n"),
        ({"prompt": "bag", "extra_body": {"seed": -1}}, openai.UnprocessableEntityError, "seed"),
        (
            {"prompt": "bag", "extra_body": {"guidance_scale": 1e9}},
            openai.UnprocessableEntityError,
            "guidance_scale",
        ),
    ],
)
def test_an_error_has_its_class_and_names_the_field(client, given, kind, param):
    with pytest.raises(kind) as error:
        client.images.generate(**given)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert error.value.message
    assert error.value.response.headers["x-should-retry"] == "false"
    assert error.value.request_id


def test_what_the_model_cannot_do_is_refused_before_any_work(client, server):
    before = server[1].engine.stats.evaluations
    with pytest.raises(openai.BadRequestError, match="cannot spend exactly 3"):
        client.images.generate(prompt="bag", extra_body={"solver": "heun", "nfe": 3})
    assert server[1].engine.stats.evaluations == before


def test_a_client_retries_when_the_queue_is_full(server):
    with (
        running(Limits(most_waiting=1), workers=1) as (address, service),
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        body = {"prompt": "bag", "n": 8, "nfe": 12, "stream": True, "progress": True}
        path = "/v1/images/generations"
        with http.stream("POST", path, json={**body, "n": 10}) as one:
            while service.engine.waiting():
                time.sleep(0.002)  # until the worker has them all: ten of its sixteen rows
            other = http.send(http.build_request("POST", path, json=body), stream=True)
            assert one.status_code == other.status_code == 200
            while service.engine.waiting() == 8:
                time.sleep(0.002)  # until it has six of these
            refused = http.post("/v1/images/generations", json={"prompt": "bag"})
            if service.engine.waiting():
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
            other.close()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=3) as client:
            assert client.images.generate(prompt="bag", extra_body={"nfe": 1}).data


def test_a_client_that_is_refused_once_gets_its_picture_by_its_own_retry(server, monkeypatch):
    engine, refusals = server[1].engine, [Full(0.5)]
    check = engine.check_room

    def full_once(pictures: int) -> None:
        if refusals:
            raise refusals.pop()
        check(pictures)

    monkeypatch.setattr(engine, "check_room", full_once)
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="x", max_retries=1) as client:
        found = client.images.generate(prompt="bag", extra_body={"nfe": 1, "seed": 3})
    assert [image.model_dump()["seed"] for image in found.data or ()] == [3]
    assert not refusals


def test_an_error_that_nobody_foresaw_has_the_form_of_the_others(server, http, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(server[1], "model", broken)
    answer = http.post("/v1/images/generations", json={"prompt": "bag"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "failed"
    assert int(answer.headers["retry-after"]) >= 1
    assert "a fault of ours" not in answer.text


# -- previews, refinement, variations -----------------------------------------------------------


def events_of(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_previews_come_as_they_get_ready_for_each_prompt(http):
    body = {"prompts": ["bag", "boot"], "n": 2, "nfe": 2, "seed": 1}
    events = events_of(http, "/v1/previews", body)
    done = [event for event in events if event["type"] == "preview.completed"]
    assert sorted((e["index"], e["revised_prompt"]) for e in done) == [
        (0, "bag"),
        (1, "bag"),
        (2, "boot"),
        (3, "boot"),
    ]
    assert {event["nfe"] for event in events if event["type"] == "preview.partial_image"} == {1}
    assert http.post("/v1/previews", json={**body, "nfe": 5}).status_code == 422


def test_a_refinement_is_the_same_picture_with_more_evaluations(http):
    made = http.post("/v1/previews", json={"prompt": "bag", "n": 1, "seed": 4, "stream": False})
    first = made.json()["data"][0]
    found = http.post(f"/v1/images/{first['id']}/refine", json={"nfe": 8}).json()["data"][0]
    assert near(pixels(found["b64_json"]), expected(seeds=[4], label="bag", nfe=8)[0])
    assert found["seed"] == 4
    assert (found["nfe_before"], found["refines"]) == (2, first["id"])
    apart = pixels(found["b64_json"]).astype(float) - pixels(first["b64_json"])
    assert found["pixel_error"]["rms"] == pytest.approx(np.sqrt((apart**2).mean()), abs=0.01)
    same = http.post(f"/v1/images/{found['id']}/refine", json={"nfe": 8}).json()["data"][0]
    assert same["pixel_error"]["max"] <= 1


def test_variations_are_the_nearer_the_less_the_strength(http):
    first = http.post("/v1/images/generations", json={"prompt": "bag", "seed": 4, "nfe": 4})
    key = first.json()["data"][0]["id"]
    errors = []
    for strength in ("near", "far"):
        body = {"n": 4, "strength": strength, "seed": 100}
        found = http.post(f"/v1/images/{key}/variations", json=body).json()["data"]
        assert [one["nfe"] for one in found] == [4] * 4
        errors.append(np.mean([one["pixel_error"]["rms"] for one in found]))
    assert 0 < errors[0] < errors[1]
    again = http.post(f"/v1/images/{found[0]['id']}/variations", json={"n": 1, "stream": False})
    assert again.status_code == 200


def test_a_picture_is_kept_under_its_address(http):
    body = {"prompt": "bag", "seed": 4, "nfe": 1, "response_format": "url"}
    one = http.post("/v1/images/generations", json=body).json()["data"][0]
    assert one["b64_json"] is None
    file = http.get(one["url"])
    assert file.headers["content-type"] == "image/png"
    metadata = metadata_in(io.BytesIO(file.content))
    assert metadata is not None
    assert metadata["seed"] == 4
    lost = http.get("/v1/images/img_none")
    assert lost.status_code == 404
    assert lost.json()["error"]["code"] == "image_not_found"


# -- what anybody may send ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, kind, status",
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "bag"}', "text/plain", 422),
        (b'{"prompt": NaN}', "application/json", 422),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "' + b"a" * 300_000 + b'"}', "application/json", 413),
        (b'{"prompt": "\\ud800 bag", "nfe": 1}', "application/json", None),
        (b'{"prompt": "bag", "seed": 99999999999999999999}', "application/json", 422),
    ],
)
def test_a_body_that_is_not_as_it_must_be_is_refused(http, content, kind, status):
    answer = http.post("/v1/images/generations", content=content, headers={"content-type": kind})
    assert answer.status_code == status or (status is None and answer.status_code < 500)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_upload_is_bounded(http):
    def send(data: bytes, **fields: str) -> httpx.Response:
        return http.post(
            "/v1/images/edits", files={"image": ("a.png", data)}, data={"prompt": "bag", **fields}
        )

    assert send(b"no picture").json()["error"]["code"] == "invalid_image"
    bomb = png(np.zeros((200, 200), np.uint8))
    assert "at most 10000 pixels" in send(bomb).json()["error"]["message"]
    whole = png(np.zeros((32, 32), np.uint8))
    assert send(whole[:-30]).status_code == 400
    assert send(whole, strength="2").status_code == 422
    assert send(whole, unknown="2").json()["error"]["code"] == "unknown_parameter"
    assert send(b"a" * 17_000_000).status_code == 413
    no_file = http.post("/v1/images/edits", files={"mask": ("a.png", whole)})
    assert no_file.json()["error"]["code"] == "missing_image"
    assert http.post("/v1/images/edits", json={}).status_code == 400


def test_a_solver_is_a_name_and_never_a_folder(http, tmp_path, monkeypatch):
    for name in (str(tmp_path), "../x", "./tuned", "."):
        answer = http.post("/v1/images/generations", json={"prompt": "bag", "solver": name})
        assert answer.status_code in (400, 422)


def test_pages_of_other_hosts_are_refused(http, server):
    host = server[0].removeprefix("http://")
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"origin": f"http://{host}"}).status_code == 200
    assert "access-control-allow-origin" not in http.get("/v1/models").headers


def test_a_client_that_goes_away_stops_its_evaluations(http, server):
    engine = server[1].engine
    cancelled = engine.stats.cancelled
    body = {"prompt": "bag", "n": 6, "nfe": 20, "stream": True, "progress": True}
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/images/generations", json={**body, "stream": False}, timeout=0.05)
    deadline = time.monotonic() + 20
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.busy
    assert engine.stats.cancelled == cancelled + 2


# -- operations ---------------------------------------------------------------------------------


def test_health_readiness_and_metrics(http):
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").status_code == 200
    text = http.get("/metrics").text
    for name in ("queue_pictures", "batch_pictures", "evaluations_total", "evaluations_per_second"):
        assert f"\nfewstep_{name} " in text
    for name in ("cancelled", "refused"):
        assert f"fewstep_requests_{name}_total" in text
    assert 'fewstep_seconds_bucket{le="+Inf",stage="evaluate"}' in text
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert http.delete("/v1/models").status_code == 405
    given = http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"


def test_the_log_has_no_prompts(http, caplog):
    with caplog.at_level("INFO", logger="fewstep.serve"):
        http.post("/v1/images/generations", json={"prompt": "secret bag", "nfe": 1})
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)  # a line is written when the answer has gone
    facts = [getattr(record, "facts", {}) for record in caplog.records]
    assert any(one.get("status") == 200 and one.get("n") == 1 for one in facts)
    assert "secret" not in str(facts)


def test_keys_are_needed_counted_and_limited(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(f'[shop]\nkey = "{KEY}"\nrate = 3\n[other]\nkey = "{KEY}-other"\n')
    with (
        running(keys=read_keys(path), local=False, origins=("https://shop.example",)) as (
            address,
            _,
        ),
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        assert http.get("/v1/models").status_code == 401
        assert http.get("/metrics").status_code == 401
        assert http.get("/healthz").status_code == 200
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        head = {"authorization": f"Bearer {KEY}"}
        body = {"prompt": "bag", "nfe": 1}
        made = http.post("/v1/images/generations", json=body, headers=head)
        key = made.json()["data"][0]["id"]
        assert http.get(f"/v1/images/{key}", headers=head).status_code == 200
        other = {"authorization": f"Bearer {KEY}-other"}
        assert http.get(f"/v1/images/{key}", headers=other).status_code == 404  # somebody else's
        assert http.get("/v1/models", headers=head).status_code == 200
        refused = http.get("/v1/models", headers=head)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        page = {**other, "origin": "https://shop.example"}
        allowed = http.get("/v1/models", headers=page).headers
        assert allowed["access-control-allow-origin"] == "https://shop.example"


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "it has no key"),
        ("[a]\nkey = 'short'", "at least 16 characters"),
        (f"[a]\nkey = '{KEY}'\nsha256 = 'x'", "either key or sha256"),
        (f"[a]\nkey = '{KEY}'\nrates = 3", "rates"),
        (f"[a]\nkey = '{KEY}'\nrate = 0", "whole number from 1"),
        (f"[a]\nkey = '{KEY}'\n[b]\nkey = '{KEY}'", "the same key"),
        ("a = 1", "must have key or sha256"),
        ("[a", "is not a key file"),
    ],
)
def test_a_key_file_that_is_none_is_refused_without_its_keys(tmp_path, text, match):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_keys(path)
    assert KEY not in str(error.value)


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client():
    with (
        running() as (address, service),
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
    ):
        given = {"nfe": 40, "solver": "ddim", "progress": True}
        stream = client.images.generate(prompt="bag", stream=True, extra_body=given)
        assert next(iter(stream)).b64_json
        service.engine.stop(0)
        with pytest.raises(openai.APIError, match="stopping") as error:
            list(stream)
        assert error.value.code == "stopping"
        assert httpx.get(f"{address}/readyz").status_code == 503
        refused = httpx.post(f"{address}/v1/images/generations", json={"prompt": "bag"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
