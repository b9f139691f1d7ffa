"""Small smooth images, and the files that PIL makes of them."""

import io

import numpy as np
from PIL import Image, ImageFilter

# Of chroma in a JPEG, and options that PIL writes one with.
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1", "gray")
KINDS = ({}, {"progressive": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}, {"optimize": True})


def picture(seed=0, size=(48, 40), mode="RGB", blur=2):
    """Blurred noise of (width, height) pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(blur)).convert(mode)


def encoded(image, kind, **options):
    """The bytes of the file that PIL writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image, **options):
    return encoded(image, "JPEG", **{"quality": 92, **options})


def plain_file(kind):
    """A JPEG file out of the ordinary that decoders read all the same, and the (width, height) of its image."""
    image = picture(3, (61, 47))
    made = {
        "rotated": lambda: jpeg(image, exif=exif(6)),  # as it is stored: the converter turns it
        "exif": lambda: jpeg(image, exif=b"Exif\0\0" + bytes(300)),
        "cmyk": lambda: jpeg(image.convert("CMYK")),
        "keep_rgb": lambda: jpeg(image, keep_rgb=True),
        "mpo": lambda: jpeg(image) + jpeg(picture(4, image.size)),
        "trailing": lambda: jpeg(image) + bytes(100),
    }
    return made[kind](), image.size


def refused_jpegs():
    """Files of 40 x 30 pixels that decoders may refuse, and PIL reads; the first is a plain one, which none may."""
    plain = jpeg(picture(2, (40, 30)))
    return [
        plain,
        jpeg(picture(1, (40, 30)).convert("CMYK")),
        plain[:20] + bytes(3) + plain[20:],  # stray bytes between the headers
        plain[:-200] + b"\xfe" * 100 + plain[-100:],  # no such Huffman codes: libjpeg warns, and reads on
    ]


def random_jpegs(sampled_jpeg, rng, sampling, *, times, quality):
    """`times` JPEG files of every kind in one sampling of chroma, each with its size; the range of their quality."""
    files = []
    for i, options in enumerate(KINDS * times):
        size = int(rng.integers(1, 140)), int(rng.integers(1, 140))
        files.append(sampled_jpeg(i, size, sampling, quality=int(rng.integers(*quality)), **options))
    return files


def decoded(data):
    """PIL's RGB pixels of a file, (height, width, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoded_or_none(data):
    """PIL's RGB pixels of a file, or None where PIL refuses it."""
    try:
        return decoded(data)
    except Exception:  # PIL's plugins raise almost anything on damaged data
        return None


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags
