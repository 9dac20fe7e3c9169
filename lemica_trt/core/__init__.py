"""What knows nothing of diffusion: errors, values, pictures, progress, metrics, files.

errors          the exception tree, and the exit code of each
values          base of all values: frozen, strict, JSON in and out
pictures        files and bytes → pixels; pixels as networks take them
text            prompts before they are tokenised; what may be shown on a terminal
landlock        a process gives up the right to write
threads         how many of them a process may use
files           digests in threads, memory maps
atomic_folder   a folder in the place of another, whole or not at all
progress        a live bar, plain lines, or nothing
metrics         how alike two clips are: PSNR, SSIM, LPIPS
"""
