"""The study of how a student is sampled."""

import numpy as np
import pytest

import fewstep
from studies import student_samplers
from tests.support.students import in_one_segment


def test_rows_of_every_sampler(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(student_samplers, "own_features", lambda name: ())
    monkeypatch.setattr(
        student_samplers,
        "References",
        lambda teacher: Exact(teacher),  # the reference solves take minutes
    )
    names = ["consistency", "consistency-ode", "consistency-pca"]
    names += ["consistency-kappa:c=0", "consistency-kappa:c=0.12"]
    student = in_one_segment(tmp_path / "student")
    rows = student_samplers.main(
        [str(student), "--budgets", "2", "--samplers", *names, "--seeds", "3"]
    )
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == names
    noise, chord, pca, zero, kappa = (row["error"] for row in rows)
    assert chord == pytest.approx(zero, rel=1e-3)  # c = 0 is the chord
    assert max(kappa, chord, pca) < noise
    assert len({kappa, chord, pca}) == 3


class Exact:
    """Solutions by a good solver in place of the exact ones."""

    def __init__(self, teacher) -> None:
        self.teacher = teacher

    def endpoints(self, seeds) -> np.ndarray:
        x = fewstep.solve(self.teacher.denoiser(), self.teacher.prior(seeds), "dpmpp-2m", 16)
        return x.numpy()[:, None]


def test_a_model_that_is_no_student_is_refused() -> None:
    with pytest.raises(SystemExit, match="fashion-mnist is not distilled"):
        student_samplers.main(["fashion-mnist"])
