"""fewstep's solvers as one scheduler of diffusers.

    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="dpmpp-2m")
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="my-solver")

A plan evaluates the network at states x in EDM units; a pipeline holds x_t and calls the network
itself. So each evaluation of the plan is one of the scheduler's timesteps, the stages inside an
interval included, and between two of them the pipeline holds

    x_t = alpha(s) x        s: the level that the network is told at the coming evaluation

which is what its network expects. After the last one it is alpha(end) x.

What needs the network's features has no plan and cannot be a scheduler; `FewstepPipeline` runs it.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.arguments import either, whole
from fewstep.denoiser import PREDICTIONS
from fewstep.extras import needs
from fewstep.grid import check_grid, make_grid
from fewstep.loop import Stepper, starts_at
from fewstep.models.process import FLOWS, Process, Shifted, read_process
from fewstep.plan import Combine, Plan, Program
from fewstep.solver import Solver, end_at, get

with needs("diffusers", __name__):
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor

from fewstep.integrations.configs import AUTO, SPACINGS, check_class, chosen, spaced, translated
from fewstep.integrations.pipeline import FewstepPipeline
from fewstep.integrations.staging import Staged

__all__ = ["FewstepPipeline", "FewstepScheduler", "FewstepSchedulerOutput"]

TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
KNOWN = tuple(kind.name for kind in KarrasDiffusionSchedulers)


@dataclass
class FewstepSchedulerOutput(BaseOutput):
    """prev_sample: what the network is to be given next; pred_original_sample: D."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """Any static solver of fewstep as a scheduler, for pipelines of VP and flow models.

    solver: a name of `fewstep.solvers()`, with options if need be ("ddim-eta:eta=0.5"), or "auto",
        dpmpp-2m
    grid: a name; uniform in the network's own time as "trailing" is, unless given
    afs: "none", or "zero" for the analytic first step, which saves the first evaluation
    final, end: as in `fewstep.solve`; a named grid ends at 0 unless end="sigma_min"
    plan: a plan as a JSON object, in place of the five; `from_config` makes it
    use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas, use_beta_sigmas: in place of a grid,
        as diffusers' DPMSolverMultistepScheduler has them: n levels of the table, then 0

    The others are the process, named as in diffusers: prediction_type is "epsilon",
    "v_prediction", "sample" or "flow_prediction", of which the last has no betas but a shift.
    thresholding is for pixels: latents are not within [-1, 1], and a scheduler cannot tell.

    `set_timesteps(n)` makes n *intervals*, as diffusers does; solvers with stages inside an
    interval have `order` timesteps for each, and so many network calls. Stochastic solvers draw
    from the pipeline's generator; per-seed generators keep each picture to its own.
    """

    # whose configurations may come here, with fields that have no effect here
    _compatibles = [*KNOWN, *FLOWS]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        sample_max_value: float = 1.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        solver: str = "dpmpp-2m",
        grid: str = "trailing",
        afs: str = "none",
        final: bool = False,
        end: str | None = None,
        plan: Mapping[str, Any] | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
    ) -> None:
        either("thresholding", thresholding)
        flow = prediction_type == "flow_prediction"
        self.betas: Tensor | None = None
        if not flow:
            whole("num_train_timesteps", num_train_timesteps, 1)
            try:
                table = DDPMScheduler(**{name: self.config[name] for name in TABLE})
            except NotImplementedError as error:
                raise ValueError(f"beta_schedule: {error}") from None
            self.betas = table.betas
            self.alphas_cumprod = torch.cumprod(1 - table.betas.double(), 0).float()
        # a dynamic shift comes with set_timesteps(mu=...)
        config = {**self.config, "use_dynamic_shifting": False}
        self.process: Process = read_process(type(self).__name__, config, self.betas)
        self._fixed = None if plan is None else Staged.cut(Plan.from_json(json.dumps(dict(plan))))
        self._spacing = None if self._fixed else self._named_spacing(flow)
        if self._fixed is None and self._solver.adapts:
            raise ValueError(
                f"{solver} adapts to the network's features, so it cannot be a scheduler; use "
                "fewstep.load and fewstep.sample"
            )
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        probe = self._fixed or self._staged(self._probe())
        self._arm(probe, None)
        self.num_inference_steps = None

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the configuration of another scheduler, its process kept: betas, prediction, clip,
        shift; `kwargs` are this class's own arguments.

        solver: a name; or a learned solver, its folder, or a plan, whose budget is fixed then:
            num_inference_steps has to be its number of intervals

        use_karras_sigmas and its like hold, in `config` and in `kwargs`, unless the caller names a
        grid. Timesteps and solver of `config` are replaced.

        Raises:
            ValueError: for a learned solver that reads the network's features, for names that there
                are not, and for settings that would change a picture and are not honoured.
        """
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(f"config must be a scheduler's configuration, got {config!r:.80}")
        fields = dict(config or {})
        check_class(str(fields.get("_class_name", "")), KNOWN)
        if "solver" in kwargs:
            kwargs |= chosen(kwargs["solver"])
        own = inspect.signature(cls.__init__).parameters.keys() - {"self"}
        fields, kwargs = translated(fields, kwargs, own, strict=not return_unused_kwargs)
        return super().from_config(fields, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_plan(cls, config: Any, plan: Plan) -> FewstepScheduler:
        """The same as `from_config(config, solver=plan)`."""
        return cls.from_config(config, solver=plan)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Make the grid, and forget any run so far.

        Args:
            num_inference_steps: intervals of the grid
            timesteps: the network's own times at the grid's points, in place of a named grid
            sigmas: the same as noise levels, those of k-diffusion for VP; for flows the times in
                (0, 1] before the shift, as diffusers has them. The end is added where it is
                missing.
            mu: the dynamic shift of a flow, from the pipeline

        Raises:
            ValueError: for both of them, for neither, and where a plan has fixed its own.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both")
        if self._fixed is not None:
            own = len(self._fixed.plan.sigmas) - 1
            if (
                timesteps is not None
                or sigmas is not None
                or num_inference_steps not in (None, own)
            ):
                raise ValueError(
                    f"the scheduler runs a plan of {own} intervals with its own levels; pass "
                    f"num_inference_steps={own} and no timesteps or sigmas"
                )
            self._arm(self._fixed, device)
            return
        schedule = self._grid_schedule(mu)
        given = timesteps if sigmas is None else sigmas
        if given is None:
            num_inference_steps = whole("num_inference_steps", num_inference_steps, 1)
            levels = self._grid(num_inference_steps, schedule)
        else:
            numbers = [float(value) for value in given]
            if num_inference_steps is not None and num_inference_steps != len(numbers):
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}, but {len(numbers)} were given"
                )
            levels = self._custom(numbers, schedule, sigmas is not None)
        self._arm(self._staged(levels), device)

    def _grid_schedule(self, mu: float | None) -> Any:
        if not self.config["use_dynamic_shifting"]:
            return self.process.grid_schedule
        if mu is None:
            raise ValueError("use_dynamic_shifting needs mu; pipelines pass it to set_timesteps")
        exponential = self.config["time_shift_type"] == "exponential"
        flow: Any = self.process.schedule
        return Shifted(flow, math.exp(mu) if exponential else mu)

    @property
    def _solver(self) -> Solver:
        name = self.config["solver"]
        if not isinstance(name, str):
            raise ValueError(
                f"solver must be a name here, got {name!r:.80}; a plan, a learned solver or its "
                "folder goes into from_config or from_plan"
            )
        return get(AUTO if name == "auto" else name)

    def _named_spacing(self, flow: bool) -> str | None:
        """The grid that a flag asks for. Errors: ValueError where it does not go with the rest."""
        flags = [name for name in SPACINGS if self.config[name]]
        if not flags:
            return None
        if len(flags) > 1:
            raise ValueError(f"{' and '.join(flags)} exclude each other; take one")
        if flow:
            raise ValueError(
                f"{flags[0]} goes with tables of betas, not with flows; pass sigmas to "
                "set_timesteps"
            )
        if self.config["grid"] != "trailing" or self._end != "zero":
            raise ValueError(
                f"{flags[0]} has levels of its own, down to sigma_min and then 0; leave out grid, "
                "final and end"
            )
        return SPACINGS[flags[0]]

    def _grid(self, intervals: int, schedule: Any) -> tuple[float, ...]:
        ends = schedule.sigma_max, schedule.sigma_min
        if self._spacing is not None:
            return (*spaced(self._spacing, intervals, *ends), 0.0)
        return end_at(make_grid(self.config["grid"], intervals + 1, *ends, schedule), self._end)

    def _probe(self) -> tuple[float, ...]:
        """Levels that any table has room for; raises for a grid that is not available."""
        schedule = self.process.grid_schedule
        self._grid(1, schedule)
        levels = make_grid("log-snr", 9, schedule.sigma_max, schedule.sigma_min)
        return end_at(levels, self._end)

    @property
    def _end(self) -> str:
        if self.config["end"] is not None:
            return self.config["end"]
        return "sigma_min" if self.config["final"] else "zero"

    def _custom(self, numbers: list[float], schedule: Any, are_sigmas: bool) -> tuple[float, ...]:
        """The levels of a list of the caller's, the end added."""
        network, flow = self.process.schedule, self.process.prediction == "flow"
        if are_sigmas and flow:
            levels = [schedule.sigma(u) if u > 0 else 0.0 for u in numbers]
        elif are_sigmas:
            levels = numbers
        else:
            levels = [network.sigma(t / self.process.time_scale) for t in numbers]
        low = 0.0 if self._end == "zero" else schedule.sigma_min
        return check_grid([*levels, low] if levels[-1] > low else levels)

    def _staged(self, levels: Sequence[float]) -> Staged:
        afs, final = self.config["afs"], self.config["final"]
        return Staged.cut(self._solver.plan(tuple(levels), afs, final))

    def _arm(self, staged: Staged, device: str | torch.device | None) -> None:
        """Be ready to run it from the start."""
        if staged.moves and self.process.prediction == "flow":
            raise ValueError(
                "pipelines of flow models give the network their noise as it is, with no room for "
                "an analytic first step or another level; take afs='none'"
            )
        schedule, scale = self.process.schedule, self.process.time_scale
        start, most = staged.plan.sigmas[0], schedule.sigma_max
        if start > most and not starts_at(start, most):
            raise ValueError(
                f"this starts at sigma {start:.10g}, and the pipeline's noise ends at {most:.10g}; "
                "take a solver that was trained for it, or another grid"
            )
        times = [schedule.t(stage.told) * scale for stage in staged.stages]
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        levels = [*(stage.sigma for stage in staged.stages), staged.end]
        if self.process.prediction == "flow":
            levels = [sigma / (1 + sigma) for sigma in levels]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.num_inference_steps = len(staged.plan.sigmas) - 1
        self.order = staged.order
        self._times = self.timesteps.tolist()  # on the host: no step has to wait for the device
        self._full = staged
        self._stepper: Stepper | None = None
        self._step_index: int = -1  # before the first step
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The timestep that comes next; None before the first."""
        return None if self._stepper is None else self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run begins, as the pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at that timestep; image-to-image pipelines do."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The place of a timestep; one where an interval begins, where it comes twice."""
        places = [i for i, t in enumerate(self._times) if t == float(timestep)]
        if not places:
            raise ValueError(f"{float(timestep)} is none of the timesteps {self._times}")
        stages = self._full.stages
        return next((i for i in places if i == 0 or stages[i].rested), places[0])

    def _start_index(self, timestep: float | Tensor) -> int:
        """Where the pipeline wants the run to start."""
        if self.num_inference_steps is None:
            raise ValueError("run set_timesteps before the first step")
        begin = self._begin_index
        return self.index_for_timestep(timestep) if begin is None else begin

    def _from_stage(self, index: int) -> Program:
        """The plan from there on; or the solver anew on the rest of the grid, where the plan needs
        outputs that this run does not have."""
        full = self._full
        if index == 0 or (self._fixed is not None and full.begins_at(index)):
            return full.program(index)
        if self._fixed is not None:
            raise ValueError(
                f"the plan of {full.plan.solver} cannot start at its evaluation {index}: it "
                "uses what came before. Take strength=1, or a solver by name, which starts anew"
            )
        solver, levels, stage = self._solver, full.plan.sigmas, full.stages[index]
        rest = levels[levels.index(stage.sigma) :] if stage.sigma in levels else ()
        if len(rest) > 1:
            staged = Staged.cut(solver.plan(rest, "none", self.config["final"]))
            if [s.told for s in staged.stages] == [s.told for s in full.stages[index:]]:
                return staged.program()
        if full.begins_at(index):  # where the first step adds noise, at the level with that noise
            return full.program(index)
        can = [i for i, stage in enumerate(full.stages) if stage.rested and stage.sigma in levels]
        raise ValueError(
            f"{solver.name} cannot start at timestep {index} of {len(self._times)}, inside an "
            f"interval; intervals begin at {', '.join(map(str, can))}"
        )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the sample as it is, but after an analytic first step."""
        if not self._full.moves or (self.step_index or self._begin_index or 0) > 0:
            return sample
        stepper = Stepper(self._full.program(), self._to_x(sample, self._full.start))
        stepper.ask()
        return self._from_x(stepper.x, self._full.stages[0].told, sample)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> FewstepSchedulerOutput | tuple[Tensor, Tensor]:
        """Take in one output of the network; returns what the network is to be given next.

        Args:
            model_output: what it returned, guidance included
            timestep: the one that it was told
            sample: what the pipeline holds. Changes made to it since the last step count, unless it
                is a trial stage, whose anchor stays.
            generator: one for all pictures or one per picture, for stochastic solvers
            return_dict: whether to return an object in place of a tuple
            eta, use_clipped_model_output: what pipelines pass that were made for DDIM alone. The
                first is an option of the solver here; the second is always so.
        """
        if eta:
            raise ValueError(f"eta is an option of the solver: solver='ddim-eta:eta={eta}'")
        stepper = self._stepper
        if stepper is None:
            self._step_index = self._start_index(timestep)
            x = self._to_x(sample, self._held(self._step_index))
            stepper = self._stepper = Stepper(self._from_stage(self._step_index), x)
            stepper.ask()
        elif self._step_index == len(self._times):
            raise ValueError("the run is over; call set_timesteps for another")
        else:
            stepper.put(self._to_x(sample, self._held(self._step_index)))
        index = self._step_index
        stage = self._full.stages[index]
        denoised = self._denoised(model_output.to(stepper.x), stepper.x, stage.told)
        stepper.tell(denoised)
        stepper.draw = partial(_drawn, generator)
        stepper.ask()
        self._step_index = index + 1
        left = self._full.stages[index + 1 :]
        out = self._from_x(stepper.x, left[0].told if left else self._full.end, sample)
        denoised = denoised.to(sample.dtype)
        return FewstepSchedulerOutput(out, denoised) if return_dict else (out, denoised)

    def _denoised(self, output: Tensor, x: Tensor, told: float) -> Tensor:
        level = torch.full([len(x)] + [1] * (x.ndim - 1), told, dtype=x.dtype, device=x.device)
        denoised = PREDICTIONS[self.process.prediction](output[:, : x.shape[1]], x, level)
        limit = self.config["clip_sample_range"] if self.config["clip_sample"] else None
        if self.config["thresholding"]:
            limit = 1.0  # as read_process has it
        return denoised if limit is None else denoised.clamp(-limit, limit)

    def _to_x(self, sample: Tensor, level: float) -> Tensor:
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return sample.to(dtype) / self.process.schedule.alpha(level)

    def _from_x(self, x: Tensor, level: float, like: Tensor) -> Tensor:
        return (x * self.process.schedule.alpha(level)).to(like.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t at the network's own times, [b] or [1]: alpha (x_0 + sigma noise)."""
        x = original_samples.to(torch.promote_types(original_samples.dtype, torch.float32))
        times = torch.as_tensor(timesteps).reshape(-1).tolist()
        if not times:
            raise ValueError(
                "no timestep is left to start from; raise strength (image-to-image pipelines count "
                "wrongly where timesteps or sigmas of your own meet a solver with stages)"
            )
        levels = torch.tensor([self._levels_at(t) for t in times], dtype=torch.float64)
        sigma, held = levels.unbind(1)
        alpha = self.process.schedule.alpha(held)
        shape = (-1, *[1] * (x.ndim - 1))
        noisy = alpha.to(x).reshape(shape) * x + (alpha * sigma).to(x).reshape(shape) * noise.to(x)
        return noisy.to(original_samples.dtype)

    def _levels_at(self, time: float) -> tuple[float, float]:
        """The level of the state at a timestep, and the one whose alpha the sample has."""
        if self.num_inference_steps is None or time not in self._times:
            level = self.process.schedule.sigma(time / self.process.time_scale)
            return level, level
        index = self.index_for_timestep(time)
        return self._full.stages[index].sigma if index else self._full.start, self._held(index)

    def _held(self, index: int) -> float:
        """The level whose alpha the sample has before evaluation `index`."""
        return self._full.stages[index].told if index else self._full.start

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _drawn(generator: Any, op: Combine, number: int, x: Tensor) -> Tensor:
    """Noise from a pipeline's generator."""
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
