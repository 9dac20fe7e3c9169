"""Plans in a diffusers pipeline: one is run by the pipeline's own loop, and one is fitted to it. No export, no bundle.

    scheduler   a step plan as a diffusers scheduler
    branches    the two branches of the guidance by hooks, for plans that weigh them apart
    residuals   cached trunk residuals by hooks, for plans that reuse them
    applied     a plan on a pipeline, and off again
    loop        a pipeline's own loop as what calibration runs: samples that are recorded, and runs that are driven
    fitting     pipeline, budget, prompts → plan

All of it works on what the loop gives to the scheduler's `step`: the guided output, whatever the guidance is; where the
branches of linear guidance can be seen, they are weighed apart.
"""
