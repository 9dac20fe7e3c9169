"""Verbs on numbers: schedules, plans, folding, budgets. No torch, and no files but the published schedules.

planner          Problem, Planner, the registry; candidates for a budget, and the best of them by trial
planners/        the methods, a file each
minimax          LeMiCa's search through the error graph
prediction_path  the search for plans that predict outputs
schedules        equal distances, given, published
threshold        the schedule of a cache that decides by a threshold, for a number of full steps
solvers          the first-order solver on the steps of a schedule
step_plan        schedule, sampler → rows
extrapolation    outputs of skipped steps extrapolated linearly
fold             rows that run nothing are taken out
elimination      a row of a linear recurrence over a shorter window
transfer         what a calibration may be carried over to
layout           the interface of the graphs that a sampler and the planners may need
search           plans of any number of budgets, and what came of them
budget           times and qualities → full steps; the Pareto front
"""
