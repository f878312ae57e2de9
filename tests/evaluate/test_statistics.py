"""Distances between sets of features against scipy, closed forms and hand-written loops."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

import fewstep
from fewstep.evaluate.pairs import kid, precision_recall
from fewstep.evaluate.statistics import (
    Rows,
    Statistics,
    bootstrap_frechet,
    frechet_distance,
    own_bias,
    paired_frechet,
    read_statistics,
    write_statistics,
)


def two_sets(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / d**0.5
    x = rng.normal(size=(n, d))
    y = rng.normal(size=(m, d)) @ (np.eye(d) + 0.5 * mix) + 0.1 * rng.normal(size=d)
    return x, y


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.trace(sqrtm(s @ t)).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * cross)


@pytest.mark.parametrize("n, m, d", [(200, 150, 3), (500, 700, 40), (300, 300, 128)])
def test_frechet_distance_is_scipys(n, m, d):
    x, y = two_sets(n, m, d)
    assert frechet_distance(x, y) == pytest.approx(by_scipy(x, y), rel=1e-8)


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b = rng.uniform(0, 4, 12), rng.uniform(0, 4, 12)
    a[:3] = b[2:5] = 0  # singular, with different null spaces
    m, k = rng.normal(size=(2, 12))
    ours = Statistics("f", None, m, turn @ np.diag(a) @ turn.T)
    theirs = Statistics("f", None, k, turn @ np.diag(b) @ turn.T)
    exact = np.square(m - k).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert ours.frechet(theirs) == pytest.approx(exact, rel=1e-12)


def test_frechet_distance_of_fewer_pictures_than_features_keeps_its_digits():
    # Both sets lie in planes, in which the distance is that of small full-rank sets.
    x, y = two_sets(15, 17, 5)
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(60, 5)))
    exact = by_scipy(x, y)
    assert frechet_distance(x @ basis.T, y @ basis.T) == pytest.approx(exact, rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x, _ = two_sets(50, 2, 80)
    assert frechet_distance(x, x) < 1e-10


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_do_not_depend_on_batches_or_their_order(offset):
    x, _ = two_sets(1000, 2, 16)
    x += offset
    whole = Statistics.of(x, "f")
    assert np.abs(whole.mean - x.mean(0)).max() <= 1e-12 * max(offset, 1)
    assert np.abs(whole.covariance - np.cov(x, rowvar=False)).max() < 1e-9
    for sizes in ([1] * 1000, [7] * 142 + [6], [999, 1]):
        parts = np.split(x, np.cumsum(sizes)[:-1])
        for order in (parts, parts[::-1]):
            merged = Statistics.of(order[0], "f")
            for part in order[1:]:
                merged = merged.add(part)
            assert merged.count == 1000
            assert np.abs(merged.mean - whole.mean).max() <= 1e-12 * max(offset, 1)
            assert np.abs(merged.m2 - whole.m2).max() / np.abs(whole.m2).max() < 1e-10


def test_shards_merge_to_the_distance_of_the_whole():
    x, y = two_sets(900, 800, 24)
    reference = Statistics.of(y, "f")
    whole = Statistics.of(x, "f").frechet(reference)
    a, b, c = (Statistics.of(part, "f") for part in np.array_split(x, 3))
    for merged in (a.merge(b).merge(c), c.merge(b.merge(a))):
        assert merged.frechet(reference) == pytest.approx(whole, rel=1e-10)


def test_a_file_gives_back_the_bits_and_is_edms(tmp_path: Path):
    x, _ = two_sets(40, 2, 6)
    stats, rows = Statistics.of(x, "net native"), Rows.of(x, np.arange(100, 140))
    write_statistics(tmp_path / "s.npz", stats, rows)
    back, kept = read_statistics(tmp_path / "s.npz")
    assert (back.extractor, back.count) == ("net native", 40)
    assert np.array_equal(back.mean, stats.mean)
    assert np.array_equal(back.covariance, stats.covariance)
    assert kept is not None
    assert np.array_equal(kept.index, rows.index)
    assert np.array_equal(kept.features, x.astype(np.float32))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:  # as EDM's fid.py reads it
        assert np.allclose(file["mu"], x.mean(0))
        assert np.allclose(file["sigma"], np.cov(x, rowvar=False))
    np.savez(tmp_path / "edm.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    edm = Statistics.load(tmp_path / "edm.npz")
    assert (edm.extractor, edm.count) == ("", None)
    assert edm.frechet(Statistics.of(x)) < 1e-12


def test_no_file_is_unpickled(tmp_path: Path):
    sprung = tmp_path / "sprung"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (sprung,))

    np.savez(tmp_path / "evil.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps({"mu": 1}))
    for name in ("evil.npz", "plain.npz"):
        with pytest.raises(ValueError, match="not statistics of features"):
            Statistics.load(tmp_path / name)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])},
        {"mu": np.array([np.nan, 0]), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "count": np.array(0)},
    ],
    ids=["no sigma", "shapes", "asymmetric", "nan", "count"],
)
def test_files_that_are_not_statistics_are_refused(values, tmp_path: Path):
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    (tmp_path / "s.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not statistics of features"):
        Statistics.load(tmp_path / "s.npz")


def test_statistics_of_different_networks_do_not_compare():
    x, y = two_sets(20, 20, 4)
    ours, theirs = Statistics.of(x, "a native"), Statistics.of(y, "b native")
    for meet in (ours.frechet, ours.merge):
        with pytest.raises(ValueError, match="'a native' and 'b native'"):
            meet(theirs)


@pytest.mark.parametrize(
    "features", [np.zeros(3), np.zeros((0, 3)), np.array([[1.0, np.inf]]), np.array([["a"]])]
)
def test_broken_features_are_refused(features):
    with pytest.raises(ValueError, match="features"):
        Statistics.of(features)


def test_the_distance_is_to_be_had_under_the_packages_name():
    assert fewstep.evaluate.frechet_distance is frechet_distance


def test_one_picture_has_no_distance():
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_rows_are_the_same_choice_whatever_the_shards():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 2)).astype(np.float32)
    whole = Rows.of(x, most=500)
    assert len(whole.index) == 500
    assert np.array_equal(whole.features, x[whole.index])
    parts = [np.arange(3000)[i::7] for i in range(7)]
    merged = Rows.of(x[parts[6]], parts[6], most=500)
    for part in parts[:6]:
        merged = merged.merge(Rows.of(x[part], part, most=500))
    assert np.array_equal(merged.index, whole.index)
    assert np.array_equal(merged.features, whole.features)
    # a fair choice: from each tenth of the pictures about a tenth, within 4 standard errors
    tenths = np.bincount(whole.index // 300, minlength=10)
    assert np.abs(tenths - 50).max() < 4 * math.sqrt(50)


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def mmd_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(kernel(a, b) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def test_kid_and_its_jackknife_are_those_of_plain_loops():
    x, y = two_sets(14, 11, 3)
    found = kid(x.astype(np.float32), y.astype(np.float32))
    x, y = (one.astype(np.float32).astype(np.float64) for one in (x, y))
    assert found.value == pytest.approx(mmd_by_hand(x, y), rel=1e-12)
    variance = 0.0
    for which, count in ((0, 14), (1, 11)):
        left = []
        for i in range(count):
            pair = [x, y]
            pair[which] = np.delete(pair[which], i, axis=0)
            left.append(mmd_by_hand(*pair))
        variance += (count - 1) / count * np.square(np.array(left) - np.mean(left)).sum()
    assert found.error == pytest.approx(variance**0.5, rel=1e-10)


def test_kids_error_is_its_spread_and_it_is_unbiased():
    draws = [kid(*two_sets_of_shift(150, seed)) for seed in range(120)]
    values = np.array([draw.value for draw in draws])
    # k is known in closed form for these sets: see two_sets_of_shift
    assert abs(values.mean() - exact_kid()) < 4 * values.std() / len(values) ** 0.5
    errors = [draw.error or 0.0 for draw in draws]
    assert np.mean(errors) == pytest.approx(values.std(ddof=1), rel=0.25)


def two_sets_of_shift(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal in one dimension, of means 0 and 1/2."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1)), rng.normal(size=(n, 1)) + 0.5


def exact_kid() -> float:
    """E (x y + 1)^3 = 1 + 3 E[x]E[y] + 3 E[x^2]E[y^2] + E[x^3]E[y^3], by moments of N(m, 1)."""
    a, b = ((m, m**2 + 1, m**3 + 3 * m) for m in (0.0, 0.5))

    def mean(u, v):
        return 1 + 3 * u[0] * v[0] + 3 * u[1] * v[1] + u[2] * v[2]

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def inside_by_hand(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    hits = 0
    for point in points:
        for i, centre in enumerate(manifold):
            others = sorted(
                np.linalg.norm(centre - other) for j, other in enumerate(manifold) if j != i
            )
            if np.linalg.norm(point - centre) <= others[k - 1]:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_plain_loops(k):
    x, y = two_sets(40, 30, 3)
    x *= 0.7
    precision, recall = precision_recall(x, y, k)
    assert precision.value == inside_by_hand(x, y, k)
    assert recall.value == inside_by_hand(y, x, k)
    assert 0 < recall.value < precision.value < 1
    assert precision.error == pytest.approx((precision.value * (1 - precision.value) / 40) ** 0.5)


def test_the_bootstrap_is_that_of_gathered_resamples():
    x, y = two_sets(60, 300, 4)
    reference = Statistics.of(y)
    drawn = np.random.default_rng(5).multinomial(60, np.full(60, 1 / 60), size=30)
    by_hand = [by_scipy(np.repeat(x, counts, axis=0), y) for counts in drawn]
    found = bootstrap_frechet(x, reference, resamples=30, seed=5)
    assert found == pytest.approx(np.std(by_hand, ddof=1), rel=1e-9)


def test_the_bootstrap_error_is_the_spread_over_new_samples():
    rng = np.random.default_rng(0)
    reference = Statistics("", None, np.full(5, 0.4), np.eye(5))
    values, errors = [], []
    for i in range(80):
        x = rng.normal(size=(400, 5))
        values.append(Statistics.of(x).frechet(reference))
        errors.append(bootstrap_frechet(x, reference, resamples=40, seed=i))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_a_pair_draws_the_same_seeds_so_what_it_shares_cancels():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(500, 6))
    ours = shared + 0.02 * rng.normal(size=(500, 6)) + 0.05
    reference = Statistics("", None, np.full(6, 0.5), np.eye(6))
    found = paired_frechet(ours, shared, reference, resamples=60, seed=3)
    exact = [Statistics.of(one).frechet(reference) for one in (ours, shared)]
    assert found["value"] == pytest.approx(exact[0], rel=1e-12)
    assert found["excess"] == pytest.approx(exact[0] - exact[1], rel=1e-9)
    assert found["excess_se"] < found["se"] / 5
    drawn = np.random.default_rng(3).multinomial(500, np.full(500, 1 / 500), size=60)
    gaps = []
    for counts in drawn:
        pair = [Statistics.of(np.repeat(one, counts, axis=0)) for one in (ours, shared)]
        gaps.append(pair[0].frechet(reference) - pair[1].frechet(reference))
    assert found["excess_se"] == pytest.approx(np.std(gaps, ddof=1), rel=1e-6)


def test_pairs_must_match():
    reference = Statistics("", None, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="one shape"):
        paired_frechet(np.zeros((5, 3)), np.zeros((6, 3)), reference)


@pytest.mark.parametrize("count, within", [(64, 0.05), (400, 0.03)])
def test_own_bias_is_the_mean_distance_of_perfect_samples(count, within):
    rng = np.random.default_rng(0)
    spread = np.exp(-np.linspace(0, 2, 16))
    reference = Statistics("", None, np.zeros(16), np.diag(spread**2))
    draws = [
        Statistics.of(rng.normal(size=(count, 16)) * spread).frechet(reference) for _ in range(150)
    ]
    assert own_bias(reference, count) == pytest.approx(np.mean(draws), rel=within)


def test_own_bias_counts_the_references_pictures_too():
    known = Statistics("", 100, np.zeros(2), np.eye(2))
    exact = Statistics("", None, np.zeros(2), np.eye(2))
    assert own_bias(known, 50) == pytest.approx(own_bias(exact, 50) * (1 / 50 + 1 / 100) * 50)
