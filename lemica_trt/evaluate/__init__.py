"""Runs plans and scores what they make: trials, timing, verification.

samples         which prompt and which seed a plan is run on
runs            a plan run whole on one sample, and its scores
engine_model    a bundle's engines as a model that calibration, fits and trials run on
step_inputs     what full steps are given, for quantisation
evaluator       plans on numbered samples: the one place that scores them
baselines       other ways of spending the same number of full steps
quality         held-out quality of a bundle's plans, beside the baselines
kept            which clips are kept to be looked at
agreement       engines against PyTorch, graph by graph and in whole runs
compared        plans of bundles side by side on the same clips, without the model
bench           latency of whole requests, plans in turns
timing          what plans and their steps take on the engines of this machine
step_timer      step times that are kept; which engines run here
torch_runtime   the deployed loop on a model's PyTorch modules
verify          agreement, quality and timing of a bundle as one report
estimate        what a model costs here, before anything is run
"""
