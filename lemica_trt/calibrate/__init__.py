"""Model, sampler and prompts → what calibration measures, and solvers fitted to it.

    prompts   the prompt files
    replay    one sample: the uncached run, and every segment replayed on its saved states (LeMiCa eq. 4)
    inner_products   of what runs computed
    trajectories   uncached runs, made once and used by all
    journal   finished work on disk, so that a killed measurement goes on where it was
    workers   who does the work: this process, or others
    cluster   workers on a Ray cluster
    cost      what a calibration costs, before anything is measured
    exact     every edge of the error graph replayed
    estimate  the same graph from about two samplings a sample, with trajectory Grams
    calibration   a whole calibration by the method of a profile; whether one made elsewhere fits
    fit       a multistep solver of a plan's own, fitted while the plan runs

What runs the model is an `ir.step_model.StepModel`: PyTorch, or engines. Nothing here imports PyTorch, except `cluster`
when it is used. Knows nothing of how schedules are searched, or of export.
"""
