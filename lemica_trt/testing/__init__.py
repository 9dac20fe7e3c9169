"""What tests of this package and of others need: a null GPU, oracles, builders of small values."""
