"""The reference solve: where the probability-flow ODE ends from a start, nearly exactly.

Errors of samplers are distances to it: in `fewstep.evaluate`, in the demo, and at the validation of
a learned solver. Importing this module imports no torch, for commands read options off the record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fewstep.records import Int, Text, record

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.denoiser import Denoiser

__all__ = ["ReferenceSolve"]


@record
class ReferenceSolve:
    """How a reference is solved, and the solve itself.

    The defaults are within 4e-4 root mean square, in pixel units of [-1, 1], of a solve four times
    as fine on the built-in model (a step of uint8 is 8e-3).

    Attributes:
        solver: A deterministic solver's name.
        nfe: Evaluations of a reference solve, at most 1000.
        grid: A grid's name, or sigmas, which decide the evaluations in place of nfe.
    """

    solver: Text = "deis-4"
    nfe: Annotated[Int, Field(ge=8, le=1000)] = 40
    grid: Text | tuple[float, ...] = "karras"

    def ends(
        self,
        denoiser: Denoiser,
        x_T: Tensor,
        report: Callable[[int], None] = lambda evaluations: None,
    ) -> Tensor:
        """Both ends at which samplers stop: x at sigma_min, and D there.

        D there is x at 0 up to O(sigma_min^2).

        Args:
            denoiser: D(x [b, ...], sigma [b]) -> [b, ...].
            x_T: the start [b, ...], at the grid's first sigma.
            report: called with the evaluations spent so far, after each step.

        Returns:
            float [b, 2, ...], without gradients.

        Raises:
            ValueError: as `fewstep.solve`.
            FloatingPointError: an end is NaN or infinite.
        """
        import torch

        from fewstep.solving import iterate

        with torch.no_grad():
            state: Any = None
            for state in iterate(denoiser, x_T, self.solver, self.nfe, grid=self.grid):
                report(state.nfe)
            x = state.x
            clean = denoiser(x, x.new_full((len(x),), state.sigma))
        both = torch.stack((x, clean), dim=1)
        if not torch.isfinite(both).all():
            raise FloatingPointError("the denoiser returned NaN or infinity in a reference solve")
        return both
