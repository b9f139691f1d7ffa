"""Random damage to images, archives and data sets, for the fuzz campaign and the fuzz tests."""

import contextlib
import faulthandler
import json
import zlib

LENGTHS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
MARKERS = (0, 1, 0xFF, 0xFFC0, 0xFFC4, 0xFFD0, 0xFFD9, 0xFFDA)  # of a JPEG file
BLOCK = 512  # of a tar archive
SECONDS = 60  # that a case of a fuzz test may take


@contextlib.contextmanager
def guarded(name, data):
    """An error within names the case and shows its data; one that takes too long ends the process with a traceback."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield
    except Exception as error:
        error.add_note(f"{name}: {data.hex()}")
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def mutate(data, rng, block=64, *, start=0, place=None, lengths=LENGTHS):
    """`data` with up to four damages.

    Bits flip; pieces are overwritten, cut out, doubled, swapped or spliced in from elsewhere; lengths become extreme;
    blocks of `block` bytes are zeroed or repeated; the end is cut off.

    start    only bytes from here on are damaged
    place    function that draws where, given the random generator and a size; by default often among the first 64
             bytes, because headers matter more than the bytes they announce
    lengths  the extreme values
    """
    head, out = data[:start], bytearray(data[start:])
    for _ in range(min(4, int(rng.geometric(0.6)))):
        if not out:
            return bytes(head) or bytes(data[:1])
        if place is None:
            at = int(rng.integers(min(len(out), 64) if rng.random() < 0.4 else len(out)))
        else:
            at = place(rng, len(out))
        length = int(rng.choice([1, 2, 4, 8, 37, 200]))
        match int(rng.integers(9)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at : at + length] = rng.bytes(len(out[at : at + length]))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                other = int(rng.integers(len(out)))
                one, two = out[at : at + length], out[other : other + length]
                out[at : at + len(two)], out[other : other + len(one)] = two, one
            case 5:
                values = [*lengths, len(out)]
                value = values[int(rng.integers(len(values)))]
                size = 2 if value < 1 << 16 else 4 if value < 1 << 32 else 8
                out[at : at + size] = value.to_bytes(size, "big" if rng.random() < 0.5 else "little")
            case 6:
                first = at // block * block
                out[first : first + block] = bytes(block) if rng.random() < 0.5 else out[:block]
            case 7:
                other = int(rng.integers(len(data)))
                out[at:] = data[other:]
            case 8:
                del out[max(1, at) :]
    return bytes(head + out) or bytes(data[:1])


def with_png_checksums(file):
    """A PNG file whose chunks, as far as they go, have the right checksums, so a decoder reads on."""
    out = bytearray(file)
    at = 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 <= len(out):
            out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def tar_headers(data):
    """Where the headers of a ustar archive start, bytes."""
    return [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def edit_tar_header(data, rng):
    """`data`, a ustar archive, with one field of a header changed and its checksum fitted."""
    out = bytearray(data)
    at = int(rng.choice(tar_headers(data)))
    # Name, mode, size, type, link's name, prefix.
    begin, end = [(0, 100), (100, 108), (124, 136), (156, 157), (157, 257), (345, 500)][int(rng.integers(6))]
    values = [b"/", b"../", b"\x80", b"7" * 11, b"\xff", b"1", b"x", b"L", b"S", b"0" * 8 + b"777", b"\0", b"..", b"g"]
    value = values[int(rng.integers(len(values)))][: end - begin]
    out[at + begin : at + begin + len(value)] = value
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])
    return bytes(out)


def same_json(one, other):
    """Whether two texts hold the same JSON: white space says nothing."""
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


def uniform(rng, size):
    """A `place` for `mutate`: anywhere."""
    return int(rng.integers(size))
