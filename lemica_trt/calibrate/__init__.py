"""Model, sampler and prompts → `ErrorGraph`: what caching each segment costs, measured end to end.

    prompts   the prompt files
    replay    one sample: the uncached run, and every segment replayed on its saved states (LeMiCa eq. 4)
    journal   finished work on disk, so that a killed measurement goes on where it was
    measure   all samples, resumable, into one error graph; what it will cost

Knows nothing of schedules' search, plans on disk, export or engines.
"""

from lemica_trt.calibrate.measure import Cost, cost, measure, measurement_digest
from lemica_trt.calibrate.prompts import prompts_digest, read_prompts

__all__ = ["Cost", "cost", "measure", "measurement_digest", "prompts_digest", "read_prompts"]
