"""A pipeline of diffusers with fewstep's own loop in place of its scheduler's.

    fast = FewstepPipeline(pipe, "my-solver")
    pictures = fast("a lighthouse", guidance_scale=7.5, generator=generator).images

For solvers that look at the network's features (AMED as published): what they do after a call
depends on what they saw in it, picture by picture, so a scheduler, whose times are listed before
the first call, cannot run them. The components are the pipeline's own, and so are safety checker,
watermark and output types; the latents are those of `fewstep.sample`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, per_sample
from fewstep.extras import needs
from fewstep.integrations.given import Embedded, check_start, clean_states
from fewstep.models.components import told_guidance
from fewstep.models.formats.diffusers import from_pipe
from fewstep.models.pipeline import PipelineModel
from fewstep.models.students import phased
from fewstep.plan import Program
from fewstep.sampling.choose import check_weights
from fewstep.solver import Solver
from fewstep.solving import Runnable, find, iterate

with needs("diffusers", __name__):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor

__all__ = ["FewstepPipeline"]

OUTPUTS = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, eq=False)
class FewstepPipeline:
    """Text to image by a learned solver, called as pipelines of diffusers are.

    pipe: a StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline. Its
        parts are shared, and what is changed on it (adapters, device, slicing) holds here.
    solver: a learned solver, its folder, or a plan

    Raises:
        ValueError: for a solver by name, which needs no pipeline of its own, and for a pipeline
            that fewstep does not run, or that takes no text.
    """

    pipe: Any
    solver: str | Path | Runnable

    def __post_init__(self) -> None:
        found = find(self.solver) if isinstance(self.solver, str | Path) else self.solver
        if isinstance(found, Solver):
            raise ValueError(
                f"{found.name} has no grid of its own and fits a scheduler: set pipe.scheduler = "
                f"FewstepScheduler.from_config(pipe.scheduler.config, solver={found.name!r})"
            )
        if from_pipe(self.pipe).family.encode is None:
            raise ValueError(
                f"a {type(self.pipe).__name__} takes no text; load its folder with fewstep.load "
                "and call fewstep.sample"
            )
        object.__setattr__(self, "solver", found)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        seeds: Sequence[int] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sizes: tuple[int, int],
    ) -> Any:
        """Pictures, as an object with `images`, or in a tuple.

        Args:
            num_inference_steps: fixed by the solver; what is passed has to be its number of
                intervals
            guidance_scale: the pipeline's own default where left out; 1 and less is none
            generator, seeds, latents: the start, one of them at most. A generator draws what
                diffusers draws from it, seeds what `fewstep.sample` does, one per picture; latents
                are noise of variance 1, [n, c, h, w].
            image: start from pictures, at the first level of the solver's grid: a file, uint8
                [h, w, c] or a PIL picture, or one per picture
            strength: of image; has to be that of the solver's first level, which it names
            prompt_embeds, negative_prompt_embeds, clip_skip: as in diffusers' call
            pooled_prompt_embeds, negative_pooled_prompt_embeds: the same
            output_type: "pil", "np", "pt", or "latent", which is the clean latents that are decoded
            callback_on_step_end: called as callback(pipe, i, t, {"latents": x_t}) after each
                accepted state; the latents that it returns are gone on from, and `pipe._interrupt =
                True` ends the run there. t is one per picture where the solver chose it.
            sizes: original_size, crops_coords_top_left and target_size, of Stable Diffusion XL

        Raises:
            ValueError: for what does not fit, before the first network call.
        """
        model = self._model(height, width)
        program = self.solver.program()  # type: ignore[union-attr]
        model, intervals = phased(model, program.evaluations), len(program.sigmas) - 1
        if num_inference_steps not in (None, intervals):
            raise ValueError(
                f"{program.name} goes its own {intervals} intervals; leave num_inference_steps "
                f"out, got {num_inference_steps}"
            )
        check_start(model, program, image, strength)
        if output_type not in OUTPUTS:
            raise ValueError(
                f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}"
            )
        callback = callback_on_step_end
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback.tensor_inputs
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(
                "callback_on_step_end_tensor_inputs can hold latents alone, got "
                f"{list(callback_on_step_end_tensor_inputs)}"
            )
        embedded = Embedded(
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            clip_skip,
        )
        embedded.check(model, prompt, negative_prompt)
        scale = _default(self.pipe, "guidance_scale") if guidance_scale is None else guidance_scale
        asked = prompt, negative_prompt, num_images_per_prompt, scale
        denoiser, count = _denoiser(model, embedded, *asked, sizes)
        check_weights(model, program)
        x = _start(model, program, count, generator, seeds, latents, image)
        x = self._run(model, denoiser, x, program, callback)
        return self._output(model, x, output_type, return_dict)

    def _model(self, height: int | None, width: int | None) -> PipelineModel:
        if (height is None) != (width is None):
            raise ValueError(f"give height and width, or neither, got {height} and {width}")
        size = None if height is None or width is None else (height, width)
        return from_pipe(self.pipe, size=size)

    def _run(
        self,
        model: PipelineModel,
        denoiser: Denoiser,
        x: Tensor,
        program: Program,
        callback: Callable[..., dict[str, Tensor] | None] | None,
    ) -> Tensor:
        schedule, scale = model.process.schedule, model.process.time_scale
        self.pipe._interrupt = False
        run, sent, index = iterate(denoiser, x, program), None, 0
        level: Any = program.sigmas[0]  # then [b], where the solver chose it
        with self.pipe.progress_bar(total=program.evaluations) as bar:
            while not self.pipe._interrupt:
                try:
                    state = run.send(sent)
                except StopIteration:
                    break
                bar.update(state.nfe - bar.n)
                x, sent, sigma = state.x, None, state.sigma
                if callback is not None:
                    t = torch.as_tensor(schedule.t(level) * scale)
                    alpha = per_sample(schedule.alpha(sigma), x)  # type: ignore[type-var]
                    out = callback(self.pipe, index, t, {"latents": x * alpha})
                    if out and "latents" in out:
                        x = out["latents"].to(x) / alpha
                        sent = replace(state, x=x)
                level, index = sigma, index + 1
        return x

    def _output(self, model: PipelineModel, x: Tensor, output_type: str, return_dict: bool) -> Any:
        images: Any = x.to(model.dtype)
        if output_type != "latent":
            images, flagged = model.pictures(x), None
            if getattr(self.pipe, "safety_checker", None) is not None:
                images, flagged = self.pipe.run_safety_checker(images, x.device, model.dtype)
            if getattr(self.pipe, "watermark", None) is not None:
                images = self.pipe.watermark.apply_watermark(images)
            # a flagged picture comes back black in [0, 1]
            inside = [not flag for flag in flagged] if flagged else None
            images = self.pipe.image_processor.postprocess(images, output_type, inside)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _default(pipe: Any, name: str) -> Any:
    """What the pipeline's own call takes where an argument is left out."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def _denoiser(
    model: PipelineModel,
    embedded: Embedded,
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    copies: int,
    scale: float,
    sizes: dict[str, tuple[int, int]],
) -> tuple[Denoiser, int]:
    """D under the conditions, and how many pictures they are for."""
    guided = scale > 1
    negative = negative if guided else None  # as diffusers has it
    prompts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
    if embedded.given():
        plain = {"original_size": model.size, "target_size": model.size}
        wanted = {"crops_coords_top_left": (0, 0), **plain, **sizes}
        if told_guidance(model.net):
            raise ValueError("this network is told its guidance and takes prompts alone")
        pair = embedded.conditions(model, prompts, negative, copies, guided, wanted)
        strength = torch.tensor(float(scale)) if guided else None
        return model.under(*pair, strength), len(pair[0]["encoder_hidden_states"])
    assert prompts is not None
    prompts = [text for text in prompts for _ in range(copies)]
    if negative is not None and not isinstance(negative, str):
        negative = [text for text in negative for _ in range(copies)]
    guidance = scale if guided else None
    found = model.denoiser(prompt=prompts, guidance=guidance, negative=negative, **sizes)  # type: ignore[arg-type]
    return found, len(prompts)


def _start(
    model: PipelineModel,
    program: Program,
    count: int,
    generator: Generators,
    seeds: Sequence[int] | None,
    latents: Tensor | None,
    image: Any = None,
) -> Tensor:
    """The state at the start of the grid, float32 [n, c, h, w]."""
    given = {"generator": generator, "seeds": seeds, "latents": latents}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"the start is given once, got {' and '.join(named)}")
    if seeds is not None:
        if len(seeds) != count:
            raise ValueError(f"seeds must be one per picture, got {len(seeds)} for {count}")
        if image is None:
            return model.prior(seeds)
        latents = model.prior(seeds) * model.process.schedule.alpha(model.process.sigma_max)
    shape = (count, *model.shape)
    if latents is None:
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"generator must be one, or one per picture, got {len(generator)} for {count}"
            )
        many: Any = list(generator) if isinstance(generator, Sequence) else generator
        latents = randn_tensor(shape, generator=many, device=model.device, dtype=model.dtype)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must be {list(shape)}, got {list(latents.shape)}")
    z, first = latents.to(model.device).float(), program.sigmas[0]
    if image is not None:
        return clean_states(model, image, count) + first * z
    return z / model.process.schedule.alpha(first)
