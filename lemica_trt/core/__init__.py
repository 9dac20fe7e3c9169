"""What knows nothing of diffusion: errors, values, progress, metrics, files."""
