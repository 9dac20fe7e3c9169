"""Runs plans and scores what they make: trials, timing, verification."""
