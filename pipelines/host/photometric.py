"""Operations on levels: PIL's ImageOps and ImageEnhance, and ImageFilter.GaussianBlur, equal to Pillow to the level.

An image is three planes, (3 * size * size,) uint8. Operations that map a level to a level do not touch the pixels. They
are composed into a table of 256 entries per channel, (768,) uint8, which a later stage applies once. AutoContrast and
Equalize need no extra pass either: the table maps the histogram too.
"""

import math

import numpy as np

from fastdeit.pipelines.host.vector import copy_run, fill_run, transpose
from fastdeit.pipelines.jit import compiled, inlined


@compiled
def reset_table(table):
    """Make every channel of `table` the identity."""
    for channel in range(3):
        for level in range(256):
            table[channel * 256 + level] = level


@compiled
def apply_table(planes, table):
    """Map the pixels through `table`, in place."""
    area = len(planes) // 3
    for channel in range(3):
        levels = table[channel * 256 : (channel + 1) * 256]
        plane = planes[channel * area : (channel + 1) * area]
        for i in range(area):
            plane[i] = levels[plane[i]]


@compiled
def invert(table):
    """`ImageOps.invert`."""
    for i in range(768):
        table[i] = 255 - table[i]


@compiled
def posterize(table, bits):
    """`ImageOps.posterize`, keeping `bits` bits; 0 bits give a black image, as in the Pillow of the paper's time."""
    if bits >= 8:
        return
    mask = 256 - (1 << (8 - bits))
    for i in range(768):
        table[i] = table[i] & mask


@compiled
def solarize(table, threshold):
    """`ImageOps.solarize`: invert levels from `threshold` on."""
    for i in range(768):
        if table[i] >= threshold:
            table[i] = 255 - table[i]


@compiled
def solarize_add(table, amount):
    """timm's solarize_add: add `amount` to levels below 128."""
    for i in range(768):
        if table[i] < 128:
            table[i] = min(255, table[i] + amount)


@compiled
def brightness(table, factor):
    """`ImageEnhance.Brightness`."""
    alpha = np.float32(factor)
    for i in range(768):
        table[i] = _blend(0, table[i], alpha)


@inlined
def _blend(low, high, alpha):
    """`Image.blend` of two levels: float32, clipped, truncated (Pillow, Blend.c)."""
    value = np.float32(low) + alpha * np.float32(np.int32(high) - np.int32(low))
    return np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)))


@compiled
def _histogram(planes, table, histogram):
    """Counts of the levels behind `table`, (768,) int64."""
    area = len(planes) // 3
    # Four counters per level: neighboring pixels are alike, and repeated increments of one counter are slow.
    counts = np.empty(1024, np.int64)
    fill_run(histogram, 0, 0, 768)
    for channel in range(3):
        fill_run(counts, 0, 0, 1024)
        plane = planes[channel * area : (channel + 1) * area]
        for i in range(area // 4):
            counts[np.int64(plane[4 * i])] += 1
            counts[np.int64(plane[4 * i + 1]) + 256] += 1
            counts[np.int64(plane[4 * i + 2]) + 512] += 1
            counts[np.int64(plane[4 * i + 3]) + 768] += 1
        for i in range(area // 4 * 4, area):
            counts[plane[i]] += 1
        for level in range(256):
            count = counts[level] + counts[level + 256] + counts[level + 512] + counts[level + 768]
            histogram[channel * 256 + table[channel * 256 + level]] += count


@compiled
def auto_contrast(planes, table, histogram):
    """`ImageOps.autocontrast` without a cut-off. histogram: (768,) int64 work memory."""
    _histogram(planes, table, histogram)
    for channel in range(3):
        counts = histogram[channel * 256 : (channel + 1) * 256]
        low, high = 0, 255
        while low < 255 and counts[low] == 0:
            low += 1
        while high > 0 and counts[high] == 0:
            high -= 1
        if high <= low:
            continue
        scale = 255.0 / (high - low)
        offset = -low * scale
        for i in range(channel * 256, (channel + 1) * 256):
            table[i] = min(255, max(0, int(table[i] * scale + offset)))


@compiled
def equalize(planes, table, histogram):
    """`ImageOps.equalize`. histogram: (768,) int64 work memory."""
    _histogram(planes, table, histogram)
    levels = np.empty(256, np.uint8)
    for channel in range(3):
        counts = histogram[channel * 256 : (channel + 1) * 256]
        last, used, total = 0, 0, 0
        for level in range(256):
            if counts[level]:
                last, used = counts[level], used + 1
                total += counts[level]
        step = (total - last) // 255
        if used <= 1 or step == 0:
            continue
        below = step // 2
        for level in range(256):
            levels[level] = min(255, below // step)
            below += counts[level]
        for i in range(channel * 256, (channel + 1) * 256):
            table[i] = levels[table[i]]


@inlined
def _luma(red, green, blue):
    """PIL's conversion to "L" (Pillow, Convert.c)."""
    return (np.int32(red) * 19595 + np.int32(green) * 38470 + np.int32(blue) * 7471 + 0x8000) >> 16


@compiled
def contrast(planes, table, factor):
    """`ImageEnhance.Contrast`; `table` must be the identity."""
    area = len(planes) // 3
    red, green, blue = planes[:area], planes[area : 2 * area], planes[2 * area :]
    total = 0
    for i in range(area):
        total += _luma(red[i], green[i], blue[i])
    mean, alpha = int(total / area + 0.5), np.float32(factor)
    for i in range(768):
        table[i] = _blend(mean, table[i], alpha)


@compiled
def color(planes, factor):
    """`ImageEnhance.Color`, in place."""
    area, alpha = len(planes) // 3, np.float32(factor)
    red, green, blue = planes[:area], planes[area : 2 * area], planes[2 * area :]
    for i in range(area):
        gray = _luma(red[i], green[i], blue[i])
        red[i] = _blend(gray, red[i], alpha)
        green[i] = _blend(gray, green[i], alpha)
        blue[i] = _blend(gray, blue[i], alpha)


@compiled
def sharpness(planes, size, factor, copy):
    """`ImageEnhance.Sharpness`, in place. copy: uint8 work memory of the length of `planes`."""
    if size < 3:  # PIL does not filter images smaller than the kernel
        return
    alpha = np.float32(factor)
    copy_run(copy, 0, planes, 0, len(planes))
    for channel in range(3):
        for row in range(1, size - 1):
            at = (channel * size + row) * size
            above, here, below = copy[at - size : at], copy[at : at + size], copy[at + size : at + 2 * size]
            out = planes[at : at + size]
            for x in range(1, size - 1):
                around = (
                    np.uint16(above[x - 1]) + np.uint16(above[x]) + np.uint16(above[x + 1])
                    + np.uint16(here[x - 1]) + np.uint16(here[x + 1])
                    + np.uint16(below[x - 1]) + np.uint16(below[x]) + np.uint16(below[x + 1])
                )  # fmt: skip
                # PIL rounds a float sum of thirteenths; no sum lies half-way, so integers give the same.
                smooth = np.uint32(around + 5 * np.uint16(here[x]) + 6) // np.uint32(13)
                out[x] = _blend(smooth, here[x], alpha)


@compiled
def _box_radius(sigma):
    """Radius of the box whose three passes approximate a Gaussian (Pillow, BoxBlur.c, in its float32 arithmetic)."""
    one, three, six = np.float32(1.0), np.float32(3.0), np.float32(6.0)
    sigma = np.float32(sigma)
    variance = sigma * sigma / three
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(math.floor((np.float64(length) - 1.0) / 2.0))
    part = (np.float32(2.0) * whole + one) * (whole * (whole + one) - three * variance)
    part = part / (six * (variance - (whole + one) * (whole + one)))
    return whole + part


@compiled
def gaussian_blur(planes, size, sigma, plane, line):
    """`ImageFilter.GaussianBlur(sigma)`, in place. plane: (size * size,) uint8, line: (size,) uint32 work memory."""
    box = _box_radius(sigma)
    if sigma == 0.0 or box == 0.0:
        return
    area = size * size
    for channel in range(3):
        here = planes[channel * area : (channel + 1) * area]
        transpose(plane, 0, size, here, 0, size, size, size)
        for _ in range(3):
            _box_columns(plane, here, size, box, line)
            copy_run(plane, 0, here, 0, area)
        transpose(here, 0, size, plane, 0, size, size, size)
        for _ in range(3):
            copy_run(plane, 0, here, 0, area)
            _box_columns(plane, here, size, box, line)


@compiled
def _box_columns(source, out, size, box, line):
    """Box of radius `box` along the columns; the edge row repeats beyond the edge."""
    radius, one = int(box), np.float32(1 << 24)
    weight = np.uint32(one / (box * np.float32(2.0) + np.float32(1.0)))
    rest = np.uint32((np.uint32(1 << 24) - np.uint32(radius * 2 + 1) * weight) // np.uint32(2))
    for row in range(size):
        fill_run(line, 0, 0, size)
        for reach in range(-radius, radius + 1):
            at = min(max(row + reach, 0), size - 1) * size
            near = source[at : at + size]
            for x in range(size):
                line[x] += np.uint32(near[x])
        first, last = max(row - radius - 1, 0) * size, min(row + radius + 1, size - 1) * size
        above, below = source[first : first + size], source[last : last + size]
        to = out[row * size : (row + 1) * size]
        for x in range(size):
            far = np.uint32(above[x]) + np.uint32(below[x])
            to[x] = np.uint32(line[x] * weight + far * rest + np.uint32(1 << 23)) >> np.uint32(24)
