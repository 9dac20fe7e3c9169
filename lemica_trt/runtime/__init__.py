"""Runs a step plan on engines: numpy in, numpy out, no torch.

    generation    what a request asks for, and what it gets
    random        initial noise from a seed, the numbers that torch draws
    text          prompt → token ids
    conditions    what text encoders give → what the DiT is given
    denoise       the loop over a plan's rows, written once against `lemica_trt.backends.base`
    lora          LoRA weights put into a bundle when it is loaded
    lora_file     a file of them, read
    single_graph  one graph, run once
    pipeline      prompt → frames: all of the above, for a bundle
    video         frames → .mp4, .gif, .png, .npy
    validation    values of a request, checked: what all servers share

Importing any of them imports numpy and msgspec, nothing heavier; vendors' packages load when an engine does.
"""
