"""Open-Sora 1.2, which diffusers does not have: its networks with the published keys, and a diffusers pipeline of them.

    transformer   STDiT3
    vae           the autoencoder in two stages, of images and of time
    pipeline      T5, the loop, guidance
    published     the repositories that its weights are published in → a folder of this pipeline

Source: github.com/hpcaitech/Open-Sora, tag v1.2.0, Apache License 2.0; read for what is computed, nothing is copied.
"""
