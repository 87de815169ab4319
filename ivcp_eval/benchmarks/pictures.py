"""Pictures of every mode that Pillow reads, as RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def decoded(source: Any, turned: bool = False) -> Any:
    """A PIL image in RGB from a path, an open file or another PIL image.

    Args:
        turned: turn it as a camera's tag (EXIF) says. Pictures of published benchmarks are asked as they are stored.

    Raises:
        OSError: it cannot be decoded; the message names a path.
    """
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return rgb(source)
    try:
        with Image.open(source) as image:
            return rgb(ImageOps.exif_transpose(image) if turned else image)
    except Exception as error:  # decoders meet damaged bytes with errors of every kind: zlib's, struct's, SyntaxError
        name = f" {source}" if isinstance(source, str | Path) else ""
        raise OSError(f"image{name} cannot be decoded: {error}") from error


def rgb(image: Any) -> Any:
    """A PIL image in RGB with the brightness and colours it shows, whatever its mode.

    16-bit grey counts from 0 to 65535. Modes whose range is not fixed are read by their largest value: floats up to 1
    as shares, numbers up to 255 as bytes, up to 65535 as 16 bits, beyond as shares of the largest; below 0 is black.
    Resampled floats overshoot a little, so up to a tenth more counts as that range, and is white.
    """
    if image.mode.startswith("I;16"):
        return _grey(image, 65535.0)
    if image.mode in ("I", "F"):
        return _grey(image, None)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _grey(image: Any, white: float | None) -> Any:
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if white is None:
        top = float(values.max())
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        slack = 1.1 if image.mode == "F" else 1.0
        white = next((scale for scale in scales if top <= slack * scale), top)
    pixels = np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


# -- unpacking ------------------------------------------------------------------------------------------------------
