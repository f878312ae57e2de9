"""The page, in a headless Chromium: `make test-browser`."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.serve.settings import Limits
from tests.support.serving import running

STATIC = Path(__file__).parent.parent.parent / "src/fewstep/serve/static"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("FEWSTEP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (1280, 390)


def test_the_page_asks_no_other_host_for_anything():
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(src|href|url\(|import|fetch\()[^\n]{0,40}https?://", text), path
        assert " style=" not in text
        assert not re.search(r"\son\w+=", text), path  # the page's policy has no inline scripts


def test_the_page_writes_no_html_of_what_the_service_says():
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium; name one with FEWSTEP_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def server():
    with running(Limits(most_images=8, most_evaluations=30)) as found:
        yield found


@pytest.fixture(params=WIDTHS)
def page(request, browser, server):
    context = browser.new_context(
        viewport={"width": request.param, "height": 844},
        permissions=["clipboard-read", "clipboard-write"],
    )
    made = context.new_page()
    faults: list[str] = []
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on("console", lambda one: faults.append(one.text) if one.type == "error" else None)
    made.goto(server[0])
    made.get_by_role("radio", name="sneaker").check()
    yield made
    assert not [fault for fault in faults if "429" not in fault]
    context.close()


def made(page, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(".card.done")).to_have_count(count, timeout=60_000)


@pytest.mark.slow
def test_pictures_are_made_refined_varied_and_copied(page):
    page.locator("summary").click()
    page.get_by_label("First seed").fill("7")
    page.get_by_role("button", name="Make").click()
    made(page, 6)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "s" in page.locator("#first").inner_text()

    page.get_by_role("button", name=re.compile("sneaker, seed 8")).click()
    before = page.locator("#detail-image").get_attribute("src")
    page.get_by_role("button", name="Refine").click()
    page.get_by_role("button", name="Show the draft").wait_for()
    after = page.locator("#detail-image").get_attribute("src")
    assert before != after
    assert "grey levels apart" in page.locator("#nearness").inner_text()
    page.keyboard.press("b")
    assert page.locator("#detail-image").get_attribute("src") == before
    page.keyboard.press("b")
    page.get_by_role("button", name="Copy as curl").click()
    assert "/refine" in page.evaluate("navigator.clipboard.readText()")
    with page.expect_download() as found:
        page.keyboard.press("d")
    assert found.value.suggested_filename == "sneaker-8.png"

    page.keyboard.press("m")
    made(page, 12)
    assert page.get_by_role("region", name="Like sneaker, seed 8").count() == 1


@pytest.mark.slow
def test_the_copied_python_makes_the_same_picture(page, tmp_path):
    page.get_by_label("Pictures", exact=True).fill("1")
    page.get_by_role("button", name="Make").click()
    made(page, 1)
    page.locator(".card").click()
    page.get_by_role("button", name="Copy as Python").click()
    code = page.evaluate("navigator.clipboard.readText()")
    source = page.locator("#detail-image").get_attribute("src")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    picture = (tmp_path / "picture.png").read_bytes()
    assert source == f"data:image/png;base64,{base64.b64encode(picture).decode()}"


@pytest.mark.slow
def test_the_keyboard_is_enough(page):
    page.keyboard.press("Control+Enter")
    made(page, 6)
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.getAttribute('aria-label')"
    second = page.locator(".card").nth(1).get_attribute("aria-label")
    assert page.evaluate(focused) == second
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    assert page.evaluate(focused) == second


@pytest.mark.slow
def test_everything_that_acts_has_a_name(page):
    page.keyboard.press("Control+Enter")
    made(page, 6)
    nameless = """[...document.querySelectorAll('button, input, select, textarea, a')].filter(
        (one) => !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim()))
        .map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    images = (
        "[...document.querySelectorAll('img')].filter((one) => !one.hasAttribute('alt')).length"
    )
    assert page.evaluate(images) == 0


@pytest.mark.slow
def test_a_refusal_is_told_on_the_page(page):
    page.route(
        "**/v1/images/generations",
        lambda route: route.fulfill(
            status=429,
            headers={"retry-after": "3", "content-type": "application/json"},
            body='{"error": {"message": "the queue is full; try again later"}}',
        ),
    )
    page.get_by_role("button", name="Make").click()
    page.get_by_role("alert").wait_for()
    assert "the queue is full" in page.get_by_role("alert").inner_text()
    assert "Try again in 3 s" in page.get_by_role("alert").inner_text()
