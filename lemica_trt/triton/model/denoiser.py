"""Conditions → latents: the whole denoising loop, in process. Serves `denoiser` and `denoiser_stream`.

Written by `lemica-trt triton`; needs tritonserver 2.51 or newer, and in its python interpreter lemica-trt (without
PyTorch) with the engine library of the bundle. All parameters are explained in config.pbtxt.
"""

import time

import numpy as np
import triton_python_backend_utils as pb_utils

from lemica_trt.core.errors import LemicaError
from lemica_trt.runtime import validation
from lemica_trt.runtime.denoise import Cancelled
from lemica_trt.triton.interface import conditions_from_inputs, interfaces
from lemica_trt.triton.server import batching, cancel, errors, load, metrics, requests

PARAMETERS = ("plan", "steps", "quality", "seed", "guidance_scale", "caller")


class TritonPythonModel:
    def initialize(self, args):
        """Check everything, load the engines, run a step of every plan."""
        try:
            pipeline, parameters = load.load_pipeline(pb_utils, args)
            self.batches = batching.Batches(pipeline, parameters["batching"])
            self.batches.warm_up()
        except LemicaError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        self.streams = "stream" in parameters
        self.default = pipeline.default_plan
        manifest = pipeline.bundle.manifest
        self.layout, self.inputs = manifest.graphs.layout, interfaces(manifest)[args["model_name"]].inputs
        self.metrics = metrics.Metrics(pb_utils, args["model_name"], pipeline.bundle.plans)
        self.metrics.loaded(pipeline, parameters["backend"], self.layout.step_graphs, self.batches.size)
        pb_utils.Logger.log_info(
            f"{args['model_name']}: batches up to {self.batches.size} give the bits of single runs"
        )

    def execute(self, arrived):
        """Answer each request as soon as its batch is done; nothing is returned."""
        jobs = []
        for request in arrived:
            sender = request.get_response_sender()
            try:
                jobs.append(self.job(request, sender))
            except Exception as error:  # whatever it was, the request gets an answer
                errors.send_error(pb_utils, sender, error, to_model=cancel.is_called(request))
        for group in self.batches.groups(jobs):
            self.run(group)
        self.metrics.resident()

    def job(self, request, sender):
        """What one request asks for."""
        parameters = requests.read_parameters(request, PARAMETERS)
        plan = validation.choose_plan(parameters, self.batches.plans, self.default)
        inputs = {port.name: requests.tensor_from(pb_utils, request, port) for port in self.inputs}
        conditions = conditions_from_inputs(self.layout, inputs)
        guidance = validation.guidance_from(parameters, plan, guided=self.layout.guided)
        cancellation = cancel.Cancellation(request, parameters.get("caller"))
        return requests.DenoiseJob(conditions, plan, validation.seed_from(parameters), guidance, sender, cancellation)

    def run(self, jobs):
        """Denoise jobs of one plan; one that ends early is answered at once, the last one stops the loop."""
        plan = jobs[0].plan

        def on_step(row):
            if not row.full and row.step < plan.num_steps:  # a skipped step takes less time than asking does
                self.metrics.row(plan.name, row.full, sum(job.stopped is None for job in jobs))
                return
            self.stop_ended(jobs, f"after step {min(row.step + 1, plan.num_steps)} of {plan.num_steps}")
            running = [job for job in jobs if job.stopped is None]
            if not running:
                raise Cancelled
            if row.step < plan.num_steps:
                self.metrics.row(plan.name, row.full, len(running))
            if self.streams and row.full:
                for job in running:
                    job.sender.send(self.response(plan, row.step + 1))

        start = time.perf_counter()
        self.stop_ended(jobs, "before the first step")
        jobs = [job for job in jobs if job.stopped is None]
        try:
            latents = self.batches.run(jobs, on_step) if jobs else []
        except Cancelled:
            return
        except Exception as error:  # whatever it was, every request gets an answer
            for job in jobs:
                if job.stopped is None:
                    self.metrics.request(plan.name, "error")
                    errors.send_error(pb_utils, job.sender, error, to_model=job.cancellation.called)
            return
        for job, result in zip(jobs, latents):
            if job.stopped is None:
                self.metrics.request(plan.name, "ok", time.perf_counter() - start)
                final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                job.sender.send(self.response(plan, plan.num_steps, result), flags=final)

    def stop_ended(self, jobs, where):
        """Answer jobs that were cancelled or are out of time."""
        for job in jobs:
            if job.stopped is None:
                job.stopped = job.cancellation.ended(where)
                if job.stopped is not None:
                    self.metrics.request(job.plan.name, job.stopped.code.lower())
                    errors.send_error(pb_utils, job.sender, job.stopped, to_model=job.cancellation.called)

    def response(self, plan, step, latents=None):
        """Progress, or with latents the result."""
        tensors = []
        if self.streams:
            tensors.append(pb_utils.Tensor("step", np.array([[step]], np.int32)))
            tensors.append(pb_utils.Tensor("num_steps", np.array([[plan.num_steps]], np.int32)))
        if latents is not None:
            tensors.append(pb_utils.Tensor("latents", latents[None]))
        return pb_utils.InferenceResponse(output_tensors=tensors)
