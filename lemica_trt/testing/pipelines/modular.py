"""Tiny modular pipelines, of the parts that tiny pipelines of the other kind have."""

from __future__ import annotations

from typing import Any

import diffusers

from lemica_trt.models.modular import called
from lemica_trt.testing.pipelines import images, videos
from lemica_trt.testing.pipelines.parts import Case


def z_image(guider: Any = None) -> Any:
    pipeline = diffusers.ZImageAutoBlocks().init_pipeline()
    pipeline.update_components(
        **images.z_image().components, guider=guider or diffusers.ClassifierFreeGuidance(guidance_scale=5.0)
    )
    return called(pipeline)


def z_image_with_momentum() -> Any:
    """Of a guider that keeps what it did in the step before."""
    return z_image(diffusers.AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5))


def wan() -> Any:
    pipeline = diffusers.WanBlocks().init_pipeline()
    given = videos.wan().components
    pipeline.update_components(**{name: given[name] for name in pipeline.component_names if name in given})
    return called(pipeline)


CASES = {
    "wan-modular": Case(wan, videos.VIDEO, needs="ftfy"),
    "z-image-modular": Case(z_image, images.IMAGE),
    "z-image-momentum": Case(z_image_with_momentum, images.IMAGE, refusal="a state that the loop carries"),
}
