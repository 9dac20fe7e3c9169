"""Model, sampler and prompts → `ErrorGraph`: what caching each segment costs, end to end, measured or estimated.

    prompts   the prompt files
    replay    one sample: the uncached run, and every segment replayed on its saved states (LeMiCa eq. 4)
    inner_products   of what runs computed
    journal   finished work on disk, so that a killed measurement goes on where it was
    workers   who does the work: this process, or others
    cluster   workers on a Ray cluster
    measure   all samples, resumable, into one error graph; what it will cost
    adjoint   how the result moves with each latent: one backward sweep through the uncached run
    trials    whole plans against the uncached run: which of several is best
    fitted    a multistep solver of a plan's own, fitted while the plan runs
    cheap     the same graph from a few samplings a sample, with Gram matrices and adjoint products

Knows nothing of how schedules are searched, of export or engines.
"""

from lemica_trt.calibrate.adjoint import checkpoints
from lemica_trt.calibrate.cheap import Calibrated, CheapMethod, calibrate_cheaply, cheap_cost, cheap_measurement
from lemica_trt.calibrate.fitted import Fitter, fit_measurement
from lemica_trt.calibrate.measure import Cost, cost, exact_edges, measure, measurement_digest
from lemica_trt.calibrate.prompts import prompts_digest, read_prompts
from lemica_trt.calibrate.trials import Trials, trials_digest
from lemica_trt.calibrate.workers import InProcess, Workers

__all__ = [
    "Calibrated",
    "CheapMethod",
    "Cost",
    "Fitter",
    "InProcess",
    "Trials",
    "Workers",
    "calibrate_cheaply",
    "cheap_cost",
    "cheap_measurement",
    "checkpoints",
    "cost",
    "exact_edges",
    "fit_measurement",
    "measure",
    "measurement_digest",
    "prompts_digest",
    "read_prompts",
    "trials_digest",
]
