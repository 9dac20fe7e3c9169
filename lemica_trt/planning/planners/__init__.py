"""The planners, a file a method: each lists its own in `PLANNERS`; `planner.planners` finds them by listing."""
