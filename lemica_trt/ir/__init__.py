"""Nouns: the frozen values that flow between stages. Every on-disk format has its version here.

profile       what is built: everything about a model that is not its weights
resources     profiles, prompts, schedules and models that ship with the package
trace         what tracing finds in a pipeline: loop body, slots, samplers, trunk
graphs        exported graphs, and the interface that all step graphs share
sampler       a sampler as a table of coefficients
calibration   error graph, trajectory Grams, sensitivities, and what they were measured on
schedule      which steps run in full
plan          the static step plan
timeline      a plan on one line
step_model    what calibration asks of a model, in PyTorch or on engines
budget        budgets in any unit, times of steps, quality by budget
trials        how candidates did when they ran whole
engine        which engine it is, and what it was built from
measured      what was measured of plans without the model: quality, latency, two plans side by side
report        what verification, timing and `doctor` find
kept          the clips that verification keeps to be looked at
"""
