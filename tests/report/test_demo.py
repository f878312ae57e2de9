"""What the demo promises: true numbers, two whole files, a page that needs nothing else."""

import base64
import functools
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import fewstep
from fewstep.data.images import read_png
from fewstep.evaluate.demo import FAMILIES, STOCHASTIC, run_demo
from fewstep.reference import ReferenceSolve
from fewstep.report.demo import demo_page, write_demo
from fewstep.report.terminal import demo_table
from fewstep.solver import names

SEEDS = (3, 11)
SOLVERS = ("ddim-eta", "heun", "auto", "ddim")
STUDENT = "fashion-mnist-splam"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(result, what was reported)"""
    reported: list[tuple[str, int, int]] = []
    result = run_demo(
        "fashion-mnist",
        seeds=SEEDS,
        solvers=SOLVERS,
        command="fewstep demo --seeds <3,11>",
        report=lambda *what: reported.append(what),
    )
    return write_demo(result, tmp_path_factory.mktemp("demo") / "new" / "folder"), reported


@pytest.fixture(scope="module")
def page(demo):
    return demo[0].files[1].read_text()


@functools.lru_cache
def solved(solver, nfe):
    model = fewstep.load("fashion-mnist")
    with torch.no_grad():
        start, known = model.prior(SEEDS), {}
        if solver == "auto":
            known = model.card.auto["5"].given()
            solver = known.pop("solver")
            if "learned" in known:  # it comes with a grid of its own
                solver, known = str(model.card.learned(5)), {}
        elif solver != "exp-adams-4":
            known = model.card.setting(solver, nfe)
        return fewstep.solve(model.denoiser(), start, solver, nfe, **known).double().numpy()


@functools.lru_cache
def exact(to_zero):
    x = solved("exp-adams-4", 80)
    if not to_zero:
        return x
    denoiser = fewstep.load("fashion-mnist").denoiser()
    with torch.no_grad():
        return denoiser(torch.from_numpy(x).float(), torch.full((2,), 0.002)).double().numpy()


def rmse(solver, nfe):
    """Mean over the seeds, of solves made here, to the exact solution where the solver ends."""
    setting = fewstep.load("fashion-mnist").card.setting(solver, nfe)
    gap = solved(solver, nfe) - exact(setting.get("end") == "zero")
    return np.mean([np.sqrt(np.mean(one**2)) for one in gap])


EXPECTED = {"auto": ("auto", 5), "ddim": ("ddim", 5), "heun": ("heun", 5)}


def row_of(result, solver):
    return next(row for row in result.rows if row.solver == solver)


@pytest.mark.parametrize("solver", EXPECTED)
def test_errors_are_those_of_solves_made_elsewhere(demo, solver):
    row = row_of(demo[0], solver)
    assert row.nfe == EXPECTED[solver][1]
    # float32 sums may be ordered otherwise in another batch; errors are about 0.1
    assert row.rmse == pytest.approx(rmse(*EXPECTED[solver]), abs=1e-5)


@pytest.mark.parametrize("solver", EXPECTED)
def test_page_and_table_show_these_errors(demo, page, solver):
    result = demo[0]
    figure = f"{rmse(*EXPECTED[solver]):.3f}"
    numbers = page.partition('<table class="numbers">')[2]
    shown = re.search(rf"<b>{solver}</b>.*?<span>([\d.]+)<", numbers, re.DOTALL)
    assert shown is not None
    assert shown[1] == figure
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(demo_table(result))
    line = next(one for one in console.export_text().splitlines() if one.split()[:1] == [solver])
    assert line.split()[1] == str(EXPECTED[solver][1])
    assert figure in line.split()


def test_exact_solution_is_far_more_exact_than_any_row(demo):
    result = demo[0]
    assert result.exact.rmse < 1e-3
    assert result.exact.rmse < result.ode_rows[0].rmse / 50


def test_rows_stand_by_error_and_stochastic_ones_last_without_error(demo):
    result = demo[0]
    errors = [row.rmse for row in result.ode_rows]
    assert errors == sorted(errors)
    assert [row.solver for row in result.rows][-1] == "ddim-eta"
    assert row_of(result, "ddim-eta").rmse is None


def test_solvers_run_at_the_settings_that_the_card_gives_them(demo, page):
    result = demo[0]
    card = fewstep.load("fashion-mnist").card
    assert result.screened
    for solver in ("ddim", "heun", "ddim-eta"):
        setting = card.setting(solver, 5)
        assert row_of(result, solver).settings.startswith(f"{setting['grid']} grid")
        assert ("to 0" in row_of(result, solver).settings) == (setting["end"] == "zero")
    assert "each solver at its best setting on other seeds" in page


def test_a_budget_that_cannot_be_spent_and_a_usual_setting_are_said_so(monkeypatch):
    for name, recipe in (("EXACT", "exp-adams-4"), ("CHECK", "dpm-solver-3")):
        monkeypatch.setattr(f"fewstep.evaluate.demo.{name}", ReferenceSolve(recipe, 9))
    monkeypatch.setattr("fewstep.models.card.Card.setting", lambda *_: {})
    result = run_demo(nfe=1, seeds=[5], solvers=["heun", "ddim"])
    assert not result.screened
    assert row_of(result, "heun").settings == "karras grid, usual setting, cannot spend 1"
    assert row_of(result, "ddim").settings == "karras grid, usual setting"
    page = demo_page(result).decode()
    assert page.count('<span class="off">2 evaluations</span>') == 1
    assert "it has the usual setting, which may not be its best" in page


class Links(HTMLParser):
    """Everything in a page that could make a browser fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        links = [values.get(name) for name in ("src", "href", "srcset", "data", "poster")]
        self.sources += [link for link in links if link]
        self.sources += re.findall(r"url\((.*?)\)", values.get("style") or "")


def test_page_needs_nothing_from_outside(page):
    links = Links(page)
    assert not links.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert links.sources
    addresses = links.sources + re.findall(r"url\(([^)]*)\)", page)
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"https?://|@import", page)


def test_page_holds_the_pictures_themselves(demo, page):
    result = demo[0]
    rows = [row for block in result.blocks for row in block]
    for row, source in zip(rows, Links(page).sources, strict=True):
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        size = row.pictures.shape[2]
        for i, picture in enumerate(row.pictures):
            part = strip[:, i * size : (i + 1) * size]
            np.testing.assert_array_equal(part, picture[..., 0])
    assert "<3,11>" not in page  # what comes from outside is escaped
    assert "&lt;3,11&gt;" in page


def test_picture_is_whole_and_says_how_it_was_made(demo):
    result = demo[0]
    sheet, protocol = read_png(result.files[0])
    assert sheet.shape[1] >= 900
    assert sheet.shape[2] == 3
    assert protocol is not None
    assert protocol == result.protocol
    assert protocol["seeds"] == "3, 11"
    folder = result.files[0].parent
    assert sorted(folder.iterdir()) == sorted(result.files)


def test_progress_rises_to_its_total(demo):
    done = [done for _, done, _ in demo[1]]
    totals = {total for *_, total in demo[1]}
    assert done == sorted(done)
    assert totals == {done[-1]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seeds": ()}, "seeds"),
        ({"solvers": ["dpmp"]}, "nearest"),
        ({"nfe": 0}, "at least 1"),
        ({"model_name": STUDENT}, "is a student of fashion-mnist, and no network for solvers"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_demo(**arguments)


@pytest.fixture(scope="module")
def with_student(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.evaluate.demo.FAMILIES", ("ddim", "ipndm-2"))
        patch.setattr("fewstep.evaluate.demo.STOCHASTIC", ())
        patch.setattr("fewstep.evaluate.demo.CHECK", ReferenceSolve("dpm-solver-3", 12))
        patch.setattr("fewstep.evaluate.demo.ROUNDS", 1)
        return write_demo(run_demo(nfe=3, seeds=SEEDS), tmp_path_factory.mktemp("students"))


def test_a_student_runs_by_its_own_network_at_its_own_budgets(with_student):
    result = with_student
    assert [(row.solver, row.nfe) for row in result.student_rows] == [(STUDENT, 1), (STUDENT, 2)]
    student = fewstep.load(STUDENT)
    with torch.no_grad():
        x_T = student.prior(SEEDS)
        once = student.denoiser()(x_T, torch.full((len(SEEDS),), 80.0)).double().numpy()
    error = np.mean([np.sqrt(np.mean(gap**2)) for gap in once - exact(to_zero=True)])
    assert result.student_rows[0].rmse == pytest.approx(error, abs=1e-5)
    two = fewstep.sample(student, nfe=2, seeds=SEEDS)
    np.testing.assert_array_equal(result.student_rows[1].pictures, two.images)
    assert {row.solver for row in result.ode_rows} == {"auto", "ddim", "ipndm-2"}
    assert [row.nfe for row in result.ode_rows] == [3, 3, 3]


def test_a_student_stands_apart_in_page_and_table(with_student):
    result = with_student
    page = result.files[1].read_text()
    strips = page.partition('<table class="strips">')[2].partition("</table>")[0]
    names = [re.findall(r"<b>([^<]+)</b>", part) for part in strips.split("<tbody>")[2:]]
    assert [set(block) for block in names] == [
        {"exact solution"}, {"auto", "ddim", "ipndm-2"}, {STUDENT},
    ]  # fmt: skip
    assert 'class="off"' not in page
    assert "3 evaluations, 2 solvers" in page
    assert f"Students ({STUDENT}) were trained to end at once where" in page
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(demo_table(result))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [line[1] for line in lines if line and line[0] == STUDENT] == ["1", "2"]


def test_every_family_is_shown():
    def families(solvers):
        return {re.sub(r"(-v|-rho)?-\d(-bh1)?$", "", name) for name in solvers}

    assert families(names()) == families(FAMILIES + STOCHASTIC)
