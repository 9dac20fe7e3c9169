"""Verbs on numbers: schedules, predictions, folding, budgets. No torch, no files."""
