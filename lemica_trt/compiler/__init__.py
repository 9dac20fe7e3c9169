"""The stages of a build, the one loop that runs them, and what commands do with it.

requests          what is asked for, and what comes of it
context           what a stage is given
preflight         what can be refused before a build begins
stage             a stage, and the loop
artifacts         what stages leave for each other
graph_stages      lower, layout, export, engine, time
draft_stage       draft
early_stage       early
plan_stages       calibrate, plan
bundle_stages     bundle, verify
stages            the list
estimates         what each would take: `--dry-run`
work_commands     build, calibrate, export, engine, plan: the loop, up to one stage
bundle_plans      more plans for a finished bundle
bundle_engines    other engines for it
bundle_verify     it verified again
quantized         engines of a finished bundle with quantised linear layers
shapes            further shapes of a finished bundle, and which of its plans hold there
shape_stages      what makes their graphs and engines
shape_commands    shape, and build with further shapes
refit             a finished bundle calibrated and planned again, on its own engines
measure_commands  bench and compare: plans of finished bundles
plan_quality      how good a bundle's plans are on its own engines
inspection        what lies behind a path, as values that `report` shows
doctor            what is on this machine
"""
