"""Few-step schedules as SIGMAS."""

import torch
from comfy_api.latest import io

from ..fewstep_sr.methods import METHODS
from ..fewstep_sr.methods.schedule import parse_timesteps
from .checks import require_stable_diffusion
from .page import require_choice, require_text

SCHEDULES = {method.title: method.schedule for method in sorted(METHODS.values(), key=lambda method: method.title) if method.schedule}


class FewStepScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepScheduler",
            display_name="Few-Step Scheduler",
            category="FewStepSR",
            description="The published few-step schedules of InvSR (one to five steps) and OSEDiff (one step) as SIGMAS for any sampler.",
            search_aliases=["invsr", "osediff", "sigmas", "timesteps", "few-step"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample; it determines the sigma of each timestep."),
                io.Combo.Input(
                    "method",
                    options=list(SCHEDULES),
                    default="InvSR",
                    tooltip="Which method's schedule: InvSR starts at timestep 200 or 250 of 1000, OSEDiff at 999.",
                ),
                io.Int.Input(
                    "steps",
                    default=1,
                    min=1,
                    max=250,
                    tooltip="Number of model calls. InvSR: 1 for noisy pictures, up to 5 for more detail. OSEDiff: 1.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    tooltip="Your own timesteps instead of the published ones, such as '250, 150, 50'; steps is then ignored. "
                    "InvSR counts from 1 and starts at 250 at most; OSEDiff counts from 0 and starts at 999.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="Noise levels, ending in 0. Wire them into the start state and the sampler.")],
        )

    @classmethod
    def execute(cls, model, method="InvSR", steps=1, timesteps="") -> io.NodeOutput:
        require_stable_diffusion(model)
        require_choice(method, "method", SCHEDULES)
        require_text(timesteps, "timesteps")
        indices = SCHEDULES[method].indices(steps, parse_timesteps(timesteps))
        sigmas = model.get_model_object("model_sampling").sigma(torch.tensor(indices))
        return io.NodeOutput(torch.cat([sigmas.float().cpu(), torch.zeros(1)]))
