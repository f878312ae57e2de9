"""The shape of trajectories: linear algebra against SVD, and what is exact on exact test beds."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from fewstep.data.images import read_png
from fewstep.evaluate.curves import measure, trace
from fewstep.evaluate.geometry import run_geometry
from fewstep.models import Card
from fewstep.models.exact import DataSet, Gaussian
from fewstep.report.geometry import write_geometry
from fewstep.report.terminal import geometry_table
from tests.support.testbed import Counted, Mixture, karras, largest, noise

GRID = karras(40, 80.0, 0.01)
RNG = np.random.default_rng(7)
POINTS = torch.from_numpy(RNG.normal(size=(3, 9, 4, 5)).cumsum(1))  # three random walks


def basis(rows: int, size: int) -> Tensor:
    """Orthonormal rows."""
    return torch.from_numpy(np.linalg.qr(RNG.normal(size=(size, rows)))[0].T.copy())


def curves(denoiser: Any, solver: str = "exp-adams-4", shape: tuple[int, ...] = (3, 4)):
    """(of x, of D) from five starts of standard deviation 80, float64."""
    with torch.no_grad():
        x, denoised = trace(denoiser, noise(5, 80.0, shape=shape), solver, GRID)
    return measure(x), measure(denoised)


# Linear algebra, against numpy on the points themselves.


def centred(points: Tensor) -> list[np.ndarray]:
    return [one.reshape(len(one), -1) - one.reshape(len(one), -1).mean(0) for one in points.numpy()]


def test_shares_are_those_of_the_singular_values():
    for shares, rows in zip(measure(POINTS).shares, centred(POINTS), strict=True):
        square = np.linalg.svd(rows, compute_uv=False) ** 2
        np.testing.assert_allclose(shares, (square / square.sum())[:8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_distances_from_a_span_are_those_of_projections(k):
    for distances, rows in zip(measure(POINTS).from_span[:, k - 1], centred(POINTS), strict=True):
        axes = np.linalg.svd(rows)[2][:k]
        outside = np.linalg.norm(rows - rows @ axes.T @ axes, axis=1)
        np.testing.assert_allclose(distances, outside, rtol=0, atol=1e-12)


def test_coordinates_are_projections_from_the_last_point_that_reach_out_upwards():
    for found, rows in zip(measure(POINTS).coordinates, centred(POINTS), strict=True):
        axes = np.linalg.svd(rows)[2][:3]
        along = (rows - rows[-1]) @ axes.T
        along *= [np.sign(column[np.abs(column).argmax()]) for column in along.T]
        np.testing.assert_allclose(found, along, rtol=0, atol=1e-12)


def test_distances_from_the_straight_line_are_those_of_projections():
    for distances, one in zip(measure(POINTS).from_line, POINTS.flatten(2).numpy(), strict=True):
        way = (one[-1] - one[0]) / np.linalg.norm(one[-1] - one[0])
        from_start = one - one[0]
        outside = from_start - np.outer(from_start @ way, way)
        np.testing.assert_allclose(distances, np.linalg.norm(outside, axis=1), rtol=0, atol=1e-12)


def test_lengths_and_norms():
    rows, found = POINTS.flatten(2).numpy(), measure(POINTS)
    length = np.linalg.norm(np.diff(rows, axis=1), axis=2).sum(1)
    np.testing.assert_allclose(found.length, length, rtol=1e-12)
    np.testing.assert_allclose(found.chord, np.linalg.norm(rows[:, 0] - rows[:, -1], axis=1))
    np.testing.assert_allclose(found.norms, np.linalg.norm(rows, axis=2), rtol=1e-12)
    plane = found.from_span[:, 1] / np.linalg.norm(rows, axis=2)
    np.testing.assert_allclose(found.relative[:, 2], plane, rtol=1e-12)


def test_many_pixels_are_taken_in_parts(monkeypatch):
    whole = measure(POINTS)
    monkeypatch.setattr("fewstep.evaluate.curves.COLUMNS", 3)
    parts = measure(POINTS)
    np.testing.assert_allclose(parts.distances, whole.distances, rtol=0, atol=1e-12)
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=0, atol=1e-12)


def test_shape_does_not_depend_on_place_turn_or_scale():
    turn = torch.from_numpy(np.linalg.qr(RNG.normal(size=(20, 20)))[0])
    moved, found = measure(3 * POINTS.flatten(2) @ turn + 100), measure(POINTS)
    np.testing.assert_allclose(moved.shares, found.shares, rtol=0, atol=1e-11)
    np.testing.assert_allclose(moved.distances, 3 * found.distances, rtol=0, atol=1e-10)


def test_a_curve_that_stays_where_it_is_has_all_in_its_first_component():
    still = measure(torch.ones(2, 6, 4))
    assert (still.cumulative == 1).all()
    assert not still.distances.any()


# Exact test beds. What a solver adds stays in the span of x_T and the D's, so these hold to
# rounding whatever its error: 1e-12 of the variance, 1e-7 of distances of which the largest is 250.

SOLVERS = ("exp-adams-4", "heun", "unipc-2")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("variance", [0.0, 0.3])
def test_trajectories_of_an_isotropic_gaussian_are_straight(solver, variance):
    mean = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    for found in curves(Gaussian(mean, rest=variance), solver):
        assert largest(found.shares[:, 0] - 1) < 1e-12
        assert largest(found.from_line) < 1e-12 * 80
        assert largest(found.from_span) < 1e-12 * 80


def gaussian(variances: list[float]) -> Gaussian:
    """The last of the variances is that of all other directions."""
    own = torch.tensor(variances[:-1], dtype=torch.float64)
    return Gaussian(torch.full((3, 4), 0.2), basis(len(own), 12), own, rest=variances[-1])


@pytest.mark.parametrize("variances", [[4.0, 0.1], [9.0, 1.0, 0.01], [25.0, 2.0, 0.2, 0.001]])
def test_trajectories_of_a_gaussian_have_as_many_components_as_it_has_variances(variances):
    k = len(variances)
    for found in curves(gaussian(variances)):
        assert largest(found.cumulative[:, k - 1] - 1) < 1e-12
        assert (found.shares[:, k - 1] > 1e-11).all()


def test_shares_of_a_gaussian_are_those_of_its_closed_form():
    bed, start = gaussian([4.0, 0.1]), noise(5, 80.0, shape=(3, 4))
    sigmas = np.array(GRID)
    z = (start - 0.2).flatten(1).numpy()
    along = z @ bed.basis.numpy().T @ bed.basis.numpy()
    path = 0.0
    for part, variance in ((along, 4.0), (z - along, 0.1)):
        factor = np.sqrt((variance + sigmas**2) / (variance + 80.0**2))
        path = path + factor[:, None] * part[:, None, :]
    exact, found = measure(torch.from_numpy(np.asarray(path))), curves(bed)[0]
    # the solver's own error, of distances up to 1
    np.testing.assert_allclose(found.from_line, exact.from_line, rtol=0, atol=5e-3)
    np.testing.assert_allclose(found.shares[:, 1], exact.shares[:, 1], rtol=1e-2)


@pytest.mark.parametrize("points", [2, 3, 4])
def test_trajectories_to_a_data_set_have_a_component_per_point_and_denoised_ones_one_less(points):
    data = torch.from_numpy(RNG.normal(size=(points, 3, 4)))
    x, denoised = curves(DataSet(data))
    assert largest(x.cumulative[:, points - 1] - 1) < 1e-12
    assert (x.cumulative[:, 0] < 1 - 1e-9).all()
    assert largest(denoised.cumulative[:, points - 2] - 1) < 1e-12
    assert (denoised.length > 0.1).all()


def test_a_mixture_of_two_is_off_the_line_by_what_its_plane_holds():
    """Two points: off the chord only along the line between them, and D moves on that line."""
    two = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    start = noise(5, 80.0, shape=(3,))
    with torch.no_grad():
        x, denoised = trace(DataSet(two), start, "exp-adams-4", GRID)
    shrunk = start[:, None, 1:] * torch.tensor(GRID, dtype=torch.float64)[:, None] / 80
    torch.testing.assert_close(x[:, :, 1:], shrunk, rtol=0, atol=1e-11)
    assert not denoised[:, :, 1:].any()


# Traces.


@pytest.mark.parametrize("solver", ["exp-adams-3", "ipndm-2", "heun", "dpm-solver-2", "unipc-3"])
def test_a_trace_holds_the_denoised_state_of_every_point(solver):
    mixture, grid = Mixture(), karras(9, 20.0, 0.01)
    x, denoised = trace(mixture, noise(4, 20.0), solver, grid)
    assert x.shape == denoised.shape == (4, 9, 3)
    for i, sigma in enumerate(grid):
        told = torch.full((4,), sigma, dtype=torch.float64)
        assert torch.equal(denoised[:, i], mixture(x[:, i], told))


def test_a_trace_by_eulers_method_is_eulers():
    mixture, grid = Mixture(), karras(9, 20.0, 0.01)
    x = noise(4, 20.0)
    states = [x]
    for cur, nxt in pairwise(grid):
        slope = (x - mixture(x, torch.full((4,), cur, dtype=torch.float64))) / cur
        x = x + (nxt - cur) * slope
        states.append(x)
    found = trace(mixture, noise(4, 20.0), "ddim", grid)[0]
    torch.testing.assert_close(found, torch.stack(states, 1), rtol=0, atol=1e-12)


def test_a_trace_spends_one_evaluation_per_point():
    counted = Counted(Mixture())
    trace(counted, noise(4, 20.0), "exp-adams-4", karras(9, 20.0, 0.01))
    assert counted.calls == 9


# The command.


class Exact:
    """A model of which only what the protocol says is known."""

    dtype, shape = torch.float32, (1, 2, 4)
    card = Card("exact", sigma_min=0.01, weights_sha256="0" * 64)

    def __init__(self, bed: Any) -> None:
        self.bed, self.drawn = bed, []

    def denoiser(
        self, label: Any = None, prompt: Any = None, guidance: Any = None, **more: Any
    ) -> Any:
        return self.bed

    def prior(self, seeds: Any, sigma: Any = None, label: Any = None) -> Tensor:
        self.drawn.append(list(seeds))
        draws = [np.random.default_rng(seed).normal(size=self.shape) for seed in seeds]
        return 80 * torch.tensor(np.stack(draws), dtype=torch.float32)

    def decode(self, x: Tensor) -> np.ndarray:
        raise AssertionError("no picture is made")


def wide(seed: int = 0) -> Gaussian:
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 2)))[0].T.copy()
    variances = torch.tensor([4.0, 0.5], dtype=torch.float64)
    return Gaussian(torch.full((1, 2, 4), -0.5), torch.from_numpy(vectors), variances, 0.01)


def run(out: Path, bed: Any = None, plots: bool = False, **more: Any) -> Any:
    model = Exact(wide() if bed is None else bed)
    result = run_geometry(model, out, **{"seeds": range(3), "points": 12, **more})  # type: ignore[arg-type]
    return write_geometry(result, out) if plots else result, model


def test_numbers_are_written_whole_and_are_those_of_the_curves(tmp_path):
    result, _ = run(tmp_path)
    numbers = json.loads((tmp_path / "geometry.json").read_text())
    assert numbers == json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert numbers["seeds"] == [0, 1, 2]
    assert len(numbers["sigmas"]) == 12
    assert numbers["settings"]["weights"] == "0" * 64
    for name, found in (("x", result.x), ("denoised", result.denoised)):
        plane = numbers[name]["distance"]["2 components"]
        far = (found.from_span[:, 1] / math.sqrt(8)).max(1)
        assert plane["largest"]["mean"] == pytest.approx(far.mean())
        assert plane["largest"]["sd"] == pytest.approx(far.std(ddof=1))
        of_length = found.from_span[:, 1].mean(1) / found.length
        assert plane["mean_over_length"]["mean"] == pytest.approx(of_length.mean())
        share = found.shares[:, :2].sum(1)
        assert numbers[name]["cumulative_share"]["2"]["min"] == pytest.approx(share.min())


def test_the_check_says_how_exact_the_trajectories_are(tmp_path):
    bed = wide()
    result, model = run(tmp_path, bed, solver="exp-adams-2", points=16)
    start = model.prior([0, 1, 2])
    x = trace(bed, start, "exp-adams-2", result.sigmas)[0][:, -1]
    exact = bed.exact(start, 80.0, 0.01).flatten(1)
    error = (x - exact).double().square().mean(1).sqrt().max().item()
    assert 0.5 * error < result.check["end"] < 2 * error


def test_a_second_run_resumes_and_seeds_may_be_added(tmp_path):
    first, _ = run(tmp_path / "a")
    again, model = run(tmp_path / "a", seeds=[5, 2, 0])
    assert model.drawn[0] == [5]
    assert all(len(seeds) == 3 for seeds in model.drawn[1:])  # the check alone
    assert again.seeds == (5, 2, 0)
    np.testing.assert_array_equal(again.x.points[1:], first.x.points[[2, 0]])
    fresh, _ = run(tmp_path / "b", seeds=[5, 2, 0], batch=1)
    np.testing.assert_allclose(
        again.denoised.distances, fresh.denoised.distances, rtol=0, atol=1e-6
    )  # float32


def test_batches_that_are_done_outlast_a_crash(tmp_path):
    class Stops(Exact):
        def prior(self, seeds: Any, sigma: Any = None, label: Any = None) -> Tensor:
            if 2 in seeds:
                raise KeyboardInterrupt
            return super().prior(seeds)

    with pytest.raises(KeyboardInterrupt):
        run_geometry(Stops(wide()), tmp_path, seeds=range(3), points=12, batch=1)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["geometry.safetensors"]
    _, model = run(tmp_path)
    assert model.drawn[0] == [2]


@pytest.mark.parametrize("more, words", [({"solver": "heun"}, "solver=exp-adams-4 (now heun)"),
                                         ({"points": 13}, "another grid")])  # fmt: skip
def test_a_run_with_other_settings_is_left_alone(tmp_path, more, words):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=re.escape(words)):
        run(tmp_path, **more)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "geometry.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"geometry\.safetensors is not a file of fewstep"):
        run(tmp_path)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"seeds": []}, "at least one"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"points": 3}, "at least 4, got 3"),
        ({"solver": "churn"}, "churn is stochastic"),
        ({"grid": [80.0, 9.0, 1.0, 0.1, 0.0]}, "end above 0"),
        ({"grid": [40.0, 9.0, 1.0, 0.1]}, "starts at sigma 40"),
        ({"grid": "karas"}, "karras"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "new", **more)
    assert not (tmp_path / "new").exists()


def test_a_network_that_breaks_is_named_with_level_and_seed(tmp_path):
    bed = wide()

    def breaks(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(sigma.reshape(-1, 1, 1, 1) < 1, math.nan, bed(x, sigma))

    breaks.sigma_min, breaks.sigma_max = 0.01, 80.0  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match=r"at sigma 0\.\d+ for seed 4"):
        run(tmp_path, breaks, seeds=[4])


def test_the_table_shows_these_numbers(tmp_path):
    result, _ = run(tmp_path)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(geometry_table(result))
    line = next(one for one in captured.get().splitlines() if one.startswith("2 components"))
    share = 100 * result.x.shares[:, :2].sum(1).mean()
    shown = float(line.split()[2])
    assert shown == pytest.approx(share, abs=0.1)
    far = (result.x.from_span[:, 1] / math.sqrt(8)).max(1).mean()
    assert f"{far:.2g}" in line.split()


# Plots and page.


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("geometry")
    return run(out, plots=True, command="fewstep geometry <here>")[0]


def test_the_picture_fills_a_slide_and_says_how_it_was_made(drawn):
    picture, protocol = read_png(drawn.files[1])
    assert picture.shape[:2] == (1080, 1920)
    assert protocol == drawn.protocol
    assert ElementTree.fromstring(drawn.files[2].read_text()).tag.endswith("svg")


def test_the_page_needs_nothing_from_outside_and_shows_the_numbers(drawn):
    page = drawn.files[3].read_text()
    sources = re.findall(r'(?:src|srcset)="([^"]*)"', page)
    assert len(sources) == 6  # three plots, each for a wide and a narrow screen
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|https?://|@import", page)
    far = (drawn.x.from_span[:, 1] / math.sqrt(8)).max(1).mean()
    assert f"{far:.2g}</span>" in page
    assert "&lt;here&gt;" in page
    assert "<here>" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "bed",
    [Gaussian(torch.zeros(1, 2, 4), rest=0.2), DataSet(torch.full((1, 1, 2, 4), 0.3))],
    ids=["straight", "D stays"],
)
def test_what_is_degenerate_is_drawn_all_the_same(tmp_path, bed):
    pytest.importorskip("matplotlib")
    result, _ = run(tmp_path, bed, seeds=[7], points=6, plots=True)
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.files) == 4
    assert "1 trajectory" in result.files[3].read_text()
