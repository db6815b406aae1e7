"""Decoding equals transformers' own processor, whatever the bytes; titles equal its tokenizer, whatever the title."""

from __future__ import annotations

import dataclasses
import gc
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import full, tiny_tokenizer
from PIL import Image, ImageOps, PngImagePlugin, features
from tokenizers import Encoding, Tokenizer

from data.batch import BadSample, UserError
from data.images import decode
from data.images.decode import (
    ImageSpec,
    ModelTokenizer,
    collate_tokens,
    decode_image,
    decode_whole,
    tokenize,
    tokenizer_fingerprint,
)

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter for Pillow's


@cache
def processor(size: int | tuple[int, int], crop: tuple[int, int]) -> tuple[Any, ImageSpec]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
    theirs = CLIPImageProcessorPil(size=sizes, crop_size={"height": crop[0], "width": crop[1]})
    return theirs, ImageSpec.from_processor(theirs)


SPEC = processor(48, (48, 48))[1]


def distance(data: bytes, size: int | tuple[int, int] = 48, crop: tuple[int, int] = (48, 48)) -> int:
    """Largest difference to what transformers makes of the same bytes, of 255."""
    theirs, spec = processor(size, crop)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    pixels = theirs(upright, do_rescale=False, do_normalize=False)["pixel_values"][0]
    ours = decode_image(data, spec)
    assert ours.dtype == np.uint8 and ours.shape == (3, *crop) and ours.flags.c_contiguous
    return int(np.abs(ours.astype(int) - pixels).max())


def reason(data: bytes) -> str | None:
    try:
        decode_image(data, SPEC)
    except BadSample as problem:
        return problem.reason
    return None


# ---- images of every kind -------------------------------------------------------------------------------------------

def picture(mode: str = "RGB", width: int = 90, height: int = 64, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    channels = {"1": 1, "L": 1, "P": 1, "I": 1, "I;16": 1, "F": 1, "LA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    coarse = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    planes = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height))) for c in range(channels)]
    noisy = np.clip(np.stack(planes, -1) + rng.normal(0, 9, (height, width, channels)), 0, 255)
    if mode in ("I", "I;16", "F"):  # values beyond 255 as well, which transformers clips
        return Image.fromarray((noisy[..., 0] * 3).astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    if mode in ("1", "P"):
        return Image.fromarray(noisy[..., 0].astype(np.uint8)).convert(mode)
    return Image.frombytes(mode, (width, height), noisy.astype(np.uint8).tobytes())


def saved(image: Image.Image | str, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture(image) if isinstance(image, str) else image).save(buffer, fmt, **options)
    return buffer.getvalue()


def oriented(orientation: int, fmt: str = "JPEG") -> bytes:
    """A picture stored with an EXIF orientation; 0 stands for none. Two frames where the format is MPO."""
    if fmt == "TIFF":
        return saved("RGB", fmt, **({"tiffinfo": {0x0112: orientation}} if orientation else {}))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif} if orientation else {}
    return animated(fmt, **options) if fmt == "MPO" else saved("RGB", fmt, **options)


def animated(fmt: str, mode: str = "RGB", **options: Any) -> bytes:
    frames = [picture(mode, seed=seed) for seed in range(3)]
    return saved(frames[0], fmt, save_all=True, append_images=frames[1:], **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, extra: bytes = b"", rows: int | None = None) -> bytes:
    """A grey PNG: all rows (or `rows` of them) zero, `extra` chunks ahead of the data."""
    squeeze = zlib.compressobj(1)
    body = b"".join(squeeze.compress(bytes(width + 1)) for _ in range(height if rows is None else rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body + squeeze.flush()) + chunk(b"IEND", b"")


def tiled_tiff(side: int, tile: int) -> bytes:
    """A black RGB TIFF of side x side stored in one deflated tile x tile."""
    squeeze = zlib.compressobj(1)
    body = b"".join(squeeze.compress(bytes(tile * 3)) for _ in range(tile)) + squeeze.flush()
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 2, 277: 3, 284: 1, 322: tile, 323: tile, 324: 0, 325: len(body)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + body


def text_bomb(kind: bytes, chunks: int, characters: int) -> bytes:
    """`chunks` text chunks of `characters`; in iTXt one of them is an emoji, so that Python spends 4 bytes on each."""
    text = bytes(characters) if kind == b"zTXt" else "\U0001f600".encode() + bytes(characters - 4)
    lead = b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0"
    packed = zlib.compress(text, 1)
    return png(4, 4, b"".join(chunk(kind, b"k%d" % n + lead + packed) for n in range(chunks)))


def scan_bomb(scans: int) -> bytes:
    data = saved("RGB", "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def palette_alpha(width: int, height: int) -> bytes:
    return saved(picture("P", width, height), "PNG", transparency=bytes(range(256)))


def several_texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("title", "x" * 2000, zip=True)
    info.add_itxt("title", "\U0001f600" * 99, zip=True)
    return info


@cache
def valid_images() -> dict[str, bytes]:
    kinds = {
        "jpeg": saved("RGB", "JPEG"), "jpeg-grey": saved("L", "JPEG"), "jpeg-cmyk": saved("CMYK", "JPEG"),
        "jpeg-progressive": saved("RGB", "JPEG", progressive=True), "jpeg-444": saved("RGB", "JPEG", subsampling=0),
        "jpeg-then-junk": saved("RGB", "JPEG") + b"junk" * 99, "mpo": animated("MPO"),
        **{f"jpeg-exif-{n}": oriented(n) for n in range(1, 9)},
        **{f"png-{mode}": saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
        "png-palette-one-transparent": saved("P", "PNG", transparency=40), "png-palette-alpha": palette_alpha(90, 64),
        "png-rgb-transparent": saved("RGB", "PNG", transparency=(120, 120, 120)),
        "png-grey-transparent": saved("L", "PNG", transparency=120), "apng": animated("PNG", "RGBA"),
        "png-text": saved("RGB", "PNG", pnginfo=several_texts()), "png-fewer-rows": png(50, 50, rows=20),
        "gif": saved("P", "GIF"), "gif-transparent": saved("P", "GIF", transparency=40), "gif-grey": saved("L", "GIF"),
        "gif-animated": animated("GIF"), "webp": saved("RGB", "WEBP"), "webp-alpha": saved("RGBA", "WEBP"),
        "webp-lossless": saved("RGB", "WEBP", lossless=True), "webp-animated": animated("WEBP", "RGBA"),
        **{f"bmp-{mode}": saved(mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
        **{f"tiff-{mode}": saved(mode, "TIFF") for mode in ("1", "L", "LA", "RGB", "CMYK", "I", "I;16", "F", "LAB")},
        "tiff-lzw": saved("RGB", "TIFF", compression="tiff_lzw"), "tiff-jpeg": saved("RGB", "TIFF", compression="jpeg"),
        "tiff-turned": saved("RGB", "TIFF", tiffinfo={274: 6}), "tiff-tiled": tiled_tiff(70, 128),
        "ppm": saved("RGB", "PPM"), "pgm": saved("L", "PPM"), "pbm": saved("1", "PPM"),
        "1x1": saved(picture("RGB", 1, 1), "PNG"), "1x5000": saved(picture("RGB", 1, 5000), "PNG"),
        "5000x1": saved(picture("RGB", 5000, 1), "PNG"), "tall-palette-alpha": palette_alpha(40, 900),
        "wide-alpha": saved(picture("RGBA", 900, 30), "PNG"), "tall-grey-alpha": saved(picture("LA", 60, 700), "PNG"),
    }
    if features.check("avif"):
        kinds |= {"avif": saved("RGB", "AVIF"), "avif-alpha": saved("RGBA", "AVIF"), "avif-animated": animated("AVIF")}
    return kinds


@cache
def broken_images() -> dict[str, tuple[bytes, str]]:
    jpeg, gif, webp, flat = saved("RGB", "JPEG"), saved("P", "GIF"), saved("RGB", "WEBP"), saved("RGB", "PNG")
    page, svg = b"<!DOCTYPE html><title>404</title>", b"<svg xmlns='http://www.w3.org/2000/svg' width='9'/>"
    return {
        "nothing": (b"", "empty"), "zeros": (bytes(999), "not-image"), "one-byte": (b"\xff", "not-image"),
        "html": (page, "not-image"), "svg": (svg, "not-image"), "text": ("Grüße".encode(), "not-image"),
        "json": (b'{"error": 404}', "not-image"), "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not-image"),
        "eps": (saved("RGB", "EPS"), "not-image"), "ico": (saved("RGB", "ICO"), "not-image"),
        "icns": (b"icns" + bytes(99), "not-image"), "random": (np.random.default_rng(0).bytes(999), "not-image"),
        "jpeg-half": (jpeg[:len(jpeg) // 2], "truncated"), "png-half": (flat[:len(flat) // 2], "truncated"),
        "bmp-half": (saved("RGB", "BMP")[:9000], "truncated"), "gif-half": (gif[:len(gif) // 2], "truncated"),
        "webp-half": (webp[:len(webp) // 2], "undecodable"), "ppm-half": (saved("RGB", "PPM")[:999], "truncated"),
        "jpeg-magic-only": (jpeg[:4], "not-image"), "png-checksum": (flat[:30] + b"!" + flat[31:], "not-image"),
        "scans": (scan_bomb(200), "undecodable"), "text-chunks": (text_bomb(b"iTXt", 20, 99), "undecodable"),
        "png-25M": (png(5001, 5001, rows=1), "too-many-pixels"), "gif-25M": (wide_gif(5001, 5001), "too-many-pixels"),
        "tiff-tile": (tiled_tiff(9, 5008), "too-many-pixels"),
    }


def wide_gif(width: int, height: int) -> bytes:
    data = saved("P", "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


BOTH_WAYS = pytest.mark.parametrize("simd", [True, False], ids=["simd", "pillow"])


@BOTH_WAYS
def test_valid_images_equal_the_processor(simd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_SIMD", simd)
    differences = {name: distance(data) for name, data in valid_images().items()}
    assert len(differences) >= 40 and max(differences.values()) <= 2, differences


ORIENTATIONS = range(10)  # none, 1 to 8, invalid


def test_embeddings_of_turned_pictures_equal_sentence_transformers(tmp_path: Path, tiny_model: Path) -> None:
    """A telephone's pictures would be embedded lying on their side, unlike anything that later uses the model."""
    import datasets
    from sentence_transformers import SentenceTransformer

    from engine.clip.model import ModelOptions, open_model
    from engine.commands.common import make_encoders

    cases = {}
    for fmt in ("JPEG", "PNG", "WEBP", "TIFF", "MPO"):
        for orientation in ORIENTATIONS:
            path = tmp_path / f"{orientation}.{fmt.lower()}"
            path.write_bytes(oriented(orientation, fmt))
            cases[f"{fmt} {orientation}"] = path
    column = datasets.Dataset.from_dict({"image": [str(path) for path in cases.values()]})
    decoded = list(column.cast_column("image", datasets.Image())["image"])
    theirs = SentenceTransformer(str(tiny_model), device="cpu").encode(
        [image.convert("RGB") for image in decoded], normalize_embeddings=True, convert_to_tensor=True)
    parts = open_model(str(tiny_model), ModelOptions(precision="fp32"), torch.device("cpu"))
    spec = parts.clip.spec
    towers = make_encoders(parts)
    pixels = torch.from_numpy(np.stack([decode_image(path.read_bytes(), spec) for path in cases.values()]))
    with torch.no_grad():
        ours = parts.head.image(towers.image(pixels))
    apart = dict(zip(cases, (ours - theirs).abs().amax(1).tolist(), strict=True))
    assert (ours[0] - ours[6]).abs().max() > 10 * 4e-4 and max(apart.values()) < 4e-4, apart


@pytest.mark.parametrize("damage", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff"])
def test_a_picture_with_damaged_exif_is_shown_as_it_is_stored(damage: bytes) -> None:
    assert np.array_equal(decode_image(saved("RGB", "JPEG", exif=b"Exif\0\0" + damage), SPEC),
                          decode_image(saved("RGB", "JPEG"), SPEC))


def test_small_pictures_are_upright_and_whole() -> None:
    """The report page would show a telephone's picture squeezed or lying on its side."""
    for fmt in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in ORIENTATIONS:
            data = oriented(orientation, fmt)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            small = decode_whole(data, 45).transpose(1, 2, 0).astype(int)
            expected = np.asarray(upright.resize((upright.width // 2, upright.height // 2), Image.Resampling.BICUBIC))
            assert small.shape == expected.shape and np.abs(small - expected).max() <= 2, (fmt, orientation)


def test_broken_images_have_their_reasons() -> None:
    assert {name: reason(data) for name, (data, _) in broken_images().items()} == {
        name: expected for name, (_, expected) in broken_images().items()}


@BOTH_WAYS
@pytest.mark.parametrize(("size", "crop"), [(32, (32, 32)), (96, (96, 96)), (64, (81, 47)), ((40, 56), (33, 70))])
def test_any_size_equals_resize_then_crop(size: int | tuple[int, int], crop: tuple[int, int], simd: bool,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Pure noise, the worst case for every shortcut; up and down, odd sizes, tall and wide, both orders of passes."""
    monkeypatch.setattr(decode, "_SIMD", simd)
    rng = np.random.default_rng(7)
    widths = [31, 32, 33, 96, 97, 1, 300, *rng.integers(2, 400, 25)]
    for width in widths:
        height = int(np.clip(width * np.exp(rng.uniform(-1.8, 1.8)), 1, 900))
        noise = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
        assert distance(saved(Image.fromarray(noise), "PPM"), size, crop) <= 2, f"{width}x{height}"


def test_a_photo_at_the_usual_sizes_is_within_one() -> None:
    for width, height in ((1280, 720), (480, 360), (720, 1280), (1280, 200), (300, 1400)):
        assert distance(saved(picture("RGB", width, height), "JPEG"), 224, (224, 224)) <= 1


def test_an_image_in_several_blocks_of_memory() -> None:
    assert distance(saved(picture("RGB", 2200, 2000), "PPM")) <= 2


@pytest.mark.parametrize("turn", [False, True])
def test_a_line_too_long_for_the_processor(turn: bool) -> None:
    """For 20 million to 1 transformers needs terabytes. The crop shows the middle, as it is in a shorter line."""
    line = np.random.default_rng(3).integers(0, 256, (1, 20_000_000), dtype=np.uint8)
    long, short = (decode_image(saved(Image.fromarray(part.T if turn else part), "PPM"), SPEC).astype(int)
                   for part in (line, line[:, 10_000_000 - 50:10_000_000 + 50]))
    assert np.abs(long - short).max() <= 2
    assert short.std() > 10


def test_decoding_in_threads_changes_nothing() -> None:
    jobs = list(valid_images().values()) * 2
    alone = [decode_image(data, SPEC) for data in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, SPEC), jobs))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_not_the_images_fault_is_raised(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(error):
        decode_image(valid_images()["jpeg"], SPEC)


# ---- bombs and mutations --------------------------------------------------------------------------------------------

BOMB_SCRIPT = """
import io, sys
from pathlib import Path
from PIL import Image
from data.batch import BadSample
from data.images.decode import ImageSpec, decode_image
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
spec = ImageSpec(48, (48, 48), 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)
Image.init()
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    try:
        decode_image(data, spec)
        print(path, "decoded")
    except BadSample as problem:
        print(problem.reason, round(status("VmHWM") - before))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of peak memory")
def test_bombs_are_refused_before_they_cost_memory(tmp_path: Path) -> None:
    bombs = {
        "88MP": png(9400, 9400), "169MP": png(13000, 13000), "2.5GP": png(50000, 50000, rows=1),
        "zTXt": text_bomb(b"zTXt", 1, 300_000_000), "64-zTXt": text_bomb(b"zTXt", 64, 1_000_000),
        "64-iTXt": text_bomb(b"iTXt", 64, 1_000_000), "16-iTXt": text_bomb(b"iTXt", 16, 1_500_000),
        "gif": wide_gif(50000, 50000), "tiff": tiled_tiff(64, 9000), "webp": b"RIFF\xff\0\0\0WEBPVP8X\n" + bytes(7) +
        b"\xfe\x3f\0\xfe\x3f\0" + saved("RGB", "WEBP")[12:], "tiff-2.5GP": tiled_tiff(50000, 16),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    script = subprocess.run([sys.executable, "-c", BOMB_SCRIPT, *(str(tmp_path / name) for name in bombs)],
                            cwd=ROOT, text=True, capture_output=True, timeout=120, check=True)
    verdicts = dict(zip(bombs, (line.split() for line in script.stdout.splitlines()), strict=True))
    assert {name for name, (why, _) in verdicts.items() if why == "too-many-pixels"} >= {"88MP", "169MP", "2.5GP"}
    assert all(why in ("too-many-pixels", "undecodable") for why, _ in verdicts.values()), verdicts
    assert all(int(mib) <= 64 for _, mib in verdicts.values()), verdicts
    assert script.stderr == ""


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped anywhere or in the header, a range zeroed, repeated or cut out, the end missing."""
    raw = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        start, length = int(rng.integers(0, max(1, len(raw)))), int(rng.integers(1, 64))
        match int(rng.integers(6)):
            case 0:
                raw[start:start + 1] = rng.bytes(1)
            case 1:
                raw[start % 64:start % 64 + 1] = rng.bytes(1)
            case 2:
                raw[start:start + length] = bytes(length)
            case 3:
                raw[start:start] = raw[start:start + length] * 3
            case 4:
                del raw[start:start + length]
            case _:
                raw[start:start + 4] = struct.pack(">I", int(rng.integers(1 << 32)))
    return bytes(raw if rng.random() < .8 else raw[:int(rng.integers(len(raw) + 1))])


def resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_mutated_images_are_pixels_or_bad_samples() -> None:
    rng, verdicts = np.random.default_rng(11), Counter[str]()
    images = list(valid_images().values())
    count = full(500, 5000)
    for number in range(count):
        if number == count // 5:  # by then every decoder has made its tables
            before = resident()
        data = mutated(images[number % len(images)], rng)
        try:
            pixels = decode_image(data, SPEC)
            assert pixels.shape == (3, 48, 48) and pixels.dtype == np.uint8
            verdicts["pixels"] += 1
        except BadSample as problem:
            verdicts[problem.reason] += 1
    assert verdicts.total() == count and len(verdicts) >= 4, verdicts
    assert resident() - before < 20


# ---- the model's own settings ---------------------------------------------------------------------------------------

def test_spec_is_read_from_the_model(tiny_model: Path) -> None:
    from transformers import CLIPImageProcessorPil

    spec = ImageSpec.from_processor(CLIPImageProcessorPil.from_pretrained(tiny_model))
    assert (spec.resize, spec.crop, spec.resample) == (32, (32, 32), Image.Resampling.BICUBIC)
    assert spec.mean[0] == pytest.approx(0.48145466) and spec.rescale == pytest.approx(1 / 255)


@pytest.mark.parametrize(("setting", "value"), [
    ("do_resize", False), ("do_center_crop", False), ("do_rescale", False), ("do_normalize", False), ("do_pad", True),
    ("do_convert_rgb", False), ("resample", 0), ("size", {"shortest_edge": 32, "longest_edge": 99}),
    ("size", {"max_height": 32, "max_width": 32}), ("image_std", (1.0,)), ("image_mean", 0.5),
])
def test_setting_that_cannot_be_is_named(setting: str, value: Any) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with pytest.raises(UserError, match=f"{setting}=.*mend {setting}"):
        ImageSpec.from_processor(CLIPImageProcessorPil(**{setting: value}))


def test_fingerprint_follows_every_field() -> None:
    changed = {"resize": 49, "crop": (48, 47), "resample": 2, "rescale": .5, "mean": (0., 0., 1.), "std": (1., 1., 2.)}
    assert set(changed) == {field.name for field in dataclasses.fields(ImageSpec)}
    prints = {dataclasses.replace(SPEC, **{name: value}).fingerprint() for name, value in changed.items()}  # type: ignore
    assert len(prints | {SPEC.fingerprint()}) == len(changed) + 1
    assert dataclasses.replace(SPEC).fingerprint() == SPEC.fingerprint()


def test_bilinear_models_decode_too() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(resample=2)
    image = picture("RGB", 500, 333)
    pixels = theirs(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    ours = decode_image(saved(image, "PNG"), ImageSpec.from_processor(theirs))
    assert np.abs(ours.astype(int) - pixels).max() <= 2


# ---- titles ---------------------------------------------------------------------------------------------------------

def tokenizers(tiny_model: Path) -> list[Any]:
    from transformers import CLIPTokenizer

    real = SHARED / "clip-tokenizer"
    found = [CLIPTokenizer.from_pretrained(tiny_model)]
    if real.is_dir():
        found.append(CLIPTokenizer(str(real / "vocab.json"), str(real / "merges.txt"), model_max_length=77))
    return found


TITLES: Sequence[str] = [
    *("red tiles " * n for n in range(41)), *("a" * n for n in range(201)), "", " ", "NA", "007", "x" * 5000,
    "\U0001f600\U0001f469\u200d\U0001f680" * 30, "\u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0639\u0627\u0644\u0645 " * 12,
    "Ｆｕｌｌ\u3000width", "<|endoftext|> inside", "tab\tnew\nline\0nul", "Ünïcödé é e\u0301",
]


@pytest.mark.parametrize("max_length", [2, 3, 40, 77])
def test_tokens_equal_transformers_padded_and_truncated(tiny_model: Path, max_length: int) -> None:
    for tokenizer in tokenizers(tiny_model):
        theirs = tokenizer(list(TITLES), padding="max_length", truncation=True, max_length=max_length)
        ours = tokenize(tokenizer, TITLES, max_length)
        assert ours == [[token for token, real in zip(ids, mask, strict=True) if real]
                        for ids, mask in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)]
        assert all(len(ids) <= max_length and ids[-1] == tokenizer.eos_token_id for ids in ours)
        assert max(map(len, ours)) == max_length
        padded = tokenizer(list(TITLES), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        tokens = collate_tokens(ours, tokenizer.pad_token_id)
        assert torch.equal(tokens.ids_BL, padded["input_ids"])
        assert torch.equal(tokens.mask_BL, padded["attention_mask"])


def test_settings_stored_with_a_tokenizer_neither_win_nor_change(tiny_model: Path) -> None:
    tokenizer = tokenizers(tiny_model)[0]
    plain, print_plain = tokenize(tokenizer, TITLES, 77), tokenizer_fingerprint(tokenizer, 77)
    backend = tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
    backend.enable_truncation(40, stride=3, direction="left")
    backend.enable_padding(length=50, pad_id=9, direction="left")
    stored = backend.to_str()
    with ThreadPoolExecutor(8) as pool:
        assert all(ids == plain for ids in pool.map(lambda _: tokenize(tokenizer, TITLES, 77), range(16)))
    assert backend.to_str() == stored
    assert tokenizer_fingerprint(tokenizer, 77) == print_plain != tokenizer_fingerprint(tokenizer, 76)


def test_fingerprint_follows_the_vocabulary(tiny_model: Path) -> None:
    tokenizer = tokenizers(tiny_model)[0]
    before = tokenizer_fingerprint(tokenizer, 77)
    tokenizer.add_tokens(["brandnew"])
    assert tokenizer_fingerprint(tokenizer, 77) != before


def test_half_a_surrogate_pair_is_a_question_mark(tiny_model: Path) -> None:
    tokenizer = tokenizers(tiny_model)[0]
    assert tokenize(tokenizer, ["half \ud83d emoji"], 77) == tokenize(tokenizer, ["half ? emoji"], 77)


def test_collating_nothing_and_empty_rows() -> None:
    assert collate_tokens([], 7).ids_BL.shape == (0, 0)
    tokens = collate_tokens([[], [4, 5], [6]], 7)
    assert tokens.ids_BL.tolist() == [[7, 7], [4, 5], [6, 7]] and tokens.mask_BL.tolist() == [[0, 0], [1, 1], [1, 0]]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.sizes = tokenizer, list[int]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        self.sizes.append(sum(map(len, texts)))
        return self._tokenizer.encode_batch(texts)


def test_of_a_long_title_only_what_the_model_reads_is_encoded() -> None:
    """4,000 articles as titles would take 5 GB: all their tokens, to keep 77 of each."""
    backend, draw = tiny_tokenizer().backend_tokenizer, random.Random(0)
    words = ["a", "the", "é", "日本語", "x" * 40, "...", " ", "\n", "'s", "2024", "😀"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 3000))) for _ in range(60)]
    texts += ["x" * 3000, " " * 3000, " " * 3000 + "a b", "x" * 3000 + " y", "\u3000".join("ab" * 2000), ""]
    counting: Any = Counting(backend)
    for length in (3, 16, 77):
        backend.enable_truncation(length)
        whole = [encoding.ids for encoding in backend.encode_batch(texts)]
        backend.no_truncation()
        assert tokenize(ModelTokenizer(counting, 0), texts, length) == whole
    counting.sizes.clear()
    tokenize(ModelTokenizer(counting, 0), ["word " * 4000] * 200, 77)
    assert sum(counting.sizes) <= 200 * 77 * 16 and max(counting.sizes) <= (1 << 20) + 77 * 16
