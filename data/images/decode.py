"""Image bytes to the uint8 pixels CLIP's processor would make, and titles to tokens.

Bytes may be hostile: whatever they hold, the result is pixels or a `BadSample` with a stable reason.
Dimension key: B batch, C colour channels, S crop side in pixels (height, width), L tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, __version__

from data.batch import BadSample, Tokens, UserError
from data.images.augment import Region

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIXELS_VERSION = 2  # part of every image fingerprint: raise it whenever the pixels of some input change
TOKENS_VERSION = 1  # part of every title fingerprint: raise it whenever the tokens of some title change
MAX_PIXELS = 25_000_000
# Compressed texts of a PNG. Pillow inflates each to 1 MiB at most, but any number of them.
MAX_TEXT_CHUNKS = 16
# Scans of a progressive JPEG. Each costs a pass over the whole image, and a file needs no more than about fifteen.
MAX_SCANS = 100
# Raster formats decoded inside this process. By default Pillow tries every format: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM")
# Called by `interpolate`; these take a scale and a size, so that pixels behind the crop need not be computed.
_TORCH_FILTER = {int(Image.Resampling.BILINEAR): torch.ops.aten._upsample_bilinear2d_aa,
                 int(Image.Resampling.BICUBIC): torch.ops.aten._upsample_bicubic2d_aa}
# torch resizes with SIMD where the CPU has AVX; elsewhere Pillow is the faster of the two.
_SIMD = torch.backends.cpu.get_cpu_capability().startswith("AVX")
# `tokenize` changes the truncation of a tokenizer that threads share.
_TOKENIZING = threading.Lock()
CHARACTERS_PER_TOKEN = 16  # of a long title that are encoded at first
ENCODED_AT_ONCE = 1 << 20  # characters
TURNS = {  # EXIF orientation -> transposition that turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}

# Pillow warns about odd metadata and big sizes, which BadSample reports where it matters; torch about read-only pixels,
# which are only read here. Set once: `warnings.catch_warnings` around each image would race between decoding threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class ImageSpec:
    """The settings of a model's image processor; sizes in pixels, (height, width)."""

    resize: int | tuple[int, int]  # of the shortest edge, or of both
    crop: tuple[int, int]
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, image_processor: Any) -> ImageSpec:
        """Read an image processor of transformers, such as CLIPImageProcessor; UserError names an unsupported setting.

        One that resizes to an exact height and width need not crop, and one that says nothing of RGB was given RGB.
        """
        switches = ("do_resize", "do_rescale", "do_normalize")
        others = ("do_center_crop", "do_convert_rgb", "do_pad", "size", "crop_size", "resample", "rescale_factor",
                  "image_mean", "image_std")
        has: dict[str, Any] = {name: getattr(image_processor, name, None) for name in switches + others}
        size = dict(has["size"] or {})
        squashes = set(size) == {"height", "width"} and not has["do_center_crop"]
        crop = size if squashes else dict(has["crop_size"] or {})
        fits = {name: has[name] is True for name in switches} | {
            "do_center_crop": squashes or has["do_center_crop"] is True,
            "do_convert_rgb": has["do_convert_rgb"] is True or (squashes and has["do_convert_rgb"] is None),
            "do_pad": not has["do_pad"],
            "size": set(size) in ({"shortest_edge"}, {"height", "width"}),
            "crop_size": set(crop) == {"height", "width"},
            "resample": has["resample"] in _TORCH_FILTER,
        } | {name: np.size(has[name]) == 3 for name in ("image_mean", "image_std")}
        for name in (name for name, fine in fits.items() if not fine):
            raise UserError(f"the model's image processor has {name}={has[name]}, which is not how CLIP decodes; "
                            f"mend {name} in its preprocessor_config.json or choose another --model")
        resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        return cls(resize, (crop["height"], crop["width"]), int(has["resample"]), float(has["rescale_factor"]),
                   tuple(map(float, has["image_mean"])), tuple(map(float, has["image_std"])))

    @classmethod
    def clip(cls, side: int = 224) -> ImageSpec:
        """Return CLIP's own preprocessing, for work without a model."""
        return cls(side, (side, side), int(Image.Resampling.BICUBIC), 1 / 255, (0.0,) * 3, (1.0,) * 3)

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of everything that decides the pixels of given image bytes."""
        return hashlib.sha256(json.dumps([PIXELS_VERSION, asdict(self)]).encode()).hexdigest()


def decode_image(data: bytes, spec: ImageSpec, max_pixels: int = MAX_PIXELS,
                 region: Callable[[int, int], Region] | None = None) -> np.ndarray:
    """Decode the first frame, turned upright, as the transformers PIL processor would, to 2/255: uint8 [3, H, W].

    `region`, given the upright width and height, returns the part (left, top, right, bottom) that is resized to
    the whole crop instead. Raises BadSample: empty, not-image, too-many-pixels (by the header, before decoding;
    Pillow's own limit of 179 million holds too), truncated, undecodable.
    """
    with _as_bad_sample(data):
        image, has_alpha = _load(data, max_pixels)
        if region is not None:
            image, spec = image.crop(region(*image.size)), replace(spec, resize=spec.crop)
        return _fit(image, has_alpha, spec)


def decode_whole(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the first frame, turned upright, whole and in proportion: uint8 [3, H, W], the longer at most `side`.

    Raises BadSample as `decode_image`.
    """
    with _as_bad_sample(data):
        image, has_alpha = _load(data, max_pixels)
        shrink = min(1.0, side / max(image.size))
        size = max(1, round(image.height * shrink)), max(1, round(image.width * shrink))
        return _fit(image, has_alpha, replace(ImageSpec.clip(), resize=size, crop=size))


@contextmanager
def _as_bad_sample(data: bytes) -> Iterator[None]:
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadSample("not-image", f"starts with {data[:16]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("too-many-pixels", str(error)) from None
    except Exception as error:  # hostile bytes reach nearly every exception class through Pillow's plugins
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadSample(reason, f"{type(error).__name__}: {error}") from None


def _load(data: bytes, max_pixels: int) -> tuple[Image.Image, bool]:
    """Return the upright first frame, and whether parts of it may be transparent."""
    if not data:
        raise BadSample("empty", "zero bytes")
    image = _open(data, max_pixels)
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    image.load()
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn), has_alpha


def _orientation(image: Image.Image) -> int:
    """Return the EXIF (or XMP) orientation of a loaded image, as `ImageOps.exif_transpose` reads it; 1 is upright.

    Pillow turns a TIFF when it loads it. A picture with damaged EXIF is shown as it is stored, as viewers do.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # hostile bytes, as above
        return 1
    return orientation if isinstance(orientation, int) else 1


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header only, and refuse files whose decoding would take far more memory or time than their pixels."""
    if data.startswith(b"\x89PNG") and data.count(b"zTXt") + data.count(b"iTXt") > MAX_TEXT_CHUNKS:
        raise BadSample("undecodable", f"more than {MAX_TEXT_CHUNKS} compressed text chunks")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    # A TIFF is decoded in whole tiles, and a tile (tags 322, 323: width, length) may be far larger than the image.
    tile = [int(getattr(image, "tag_v2", {}).get(tag, 1)) for tag in (322, 323)]
    if (pixels := max(math.prod(image.size), math.prod(tile))) > max_pixels:
        raise BadSample("too-many-pixels", f"{pixels:,} where {max_pixels:,} are allowed")
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadSample("undecodable", f"more than {MAX_SCANS} scans")
    return image


class _Axis(NamedTuple):
    """One side of an image: resized from `before` to `after` pixels, of which the crop keeps `start` to `stop`."""

    before: int
    after: int
    start: int
    stop: int
    pad: int  # zeros before them, where the crop is larger

    @classmethod
    def of(cls, before: int, after: int, crop: int) -> _Axis:
        offset = (after - crop) // 2
        return cls(before, after, max(0, offset), min(after, offset + crop), max(0, -offset))

    def source(self) -> tuple[float, float]:
        """Return the bounds of the kept part in the original, in fractional pixels."""
        return self.start * self.before / self.after, self.stop * self.before / self.after

    def cut(self) -> tuple[int, int]:
        """Return the bounds of all original pixels that it depends on: a bicubic filter reaches two (scaled) pixels."""
        first, last = self.source()
        reach = 2 * max(self.before / self.after, 1) + 1
        return max(0, math.floor(first - reach)), min(self.before, math.ceil(last + reach))


def _fit(image: Image.Image, has_alpha: bool, spec: ImageSpec) -> np.ndarray:
    """Resize and centre-crop, zeros where the crop is larger than the resized image: uint8 [3, H, W]."""
    if isinstance(spec.resize, int):  # the long edge is rounded down, as transformers does
        short = min(image.size)
        width, height = (int(spec.resize * side / short) for side in image.size)
    else:
        height, width = spec.resize
    x, y = _Axis.of(image.width, width, spec.crop[1]), _Axis.of(image.height, height, spec.crop[0])
    # torch computes all pixels up to the crop's end. Of a long image most would be thrown away.
    mostly_kept = x.after * y.after <= 4 * math.prod(spec.crop)
    if _SIMD and mostly_kept and not _height_first(x, y):
        pixels_HWC = _resize_then_crop(_rgb(image, has_alpha), x, y, spec.resample)
    else:
        pixels_HWC = _resize_cropped(image, has_alpha, x, y, spec.resample)
    out_CHW = np.zeros((3, *spec.crop), np.uint8)
    out_CHW[:, y.pad:y.pad + y.stop - y.start, x.pad:x.pad + x.stop - x.start] = pixels_HWC.transpose(2, 0, 1)
    return out_CHW


def _height_first(x: _Axis, y: _Axis) -> bool:
    """Return whether Pillow shrinks the height first (13 and later may): the 8-bit values in between depend on it."""
    return int(__version__.split(".")[0]) >= 13 and y.before - y.after > max(0, 2 * (x.before - x.after))


def _rgb(image: Image.Image, has_alpha: bool) -> Image.Image:
    """Convert to RGB as transformers does, transparent parts composited on white."""
    if has_alpha:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize_then_crop(image: Image.Image, x: _Axis, y: _Axis, resample: int) -> np.ndarray:
    """Resize up to the crop's end with torch's SIMD port of Pillow's filter, width first: off by at most 2/255.

    Both round to 8 bits after each of two passes; torch's weights have 15 bits, Pillow's 22, so a pass may differ by 1.
    """
    import pyarrow
    try:
        # Through Arrow's C interface, which Pillow has: RGBX without a copy, where numpy would make one.
        pixels_HWC = pyarrow.array(image).flatten().to_numpy().reshape(image.height, image.width, 4)
    except ValueError:  # beyond 4 megapixels Pillow keeps an image in several blocks
        pixels_HWC = np.asarray(image)
    pixels_1CHW = torch.from_numpy(pixels_HWC[: y.cut()[1]]).permute(2, 0, 1)[None]
    kept_1CHW = _TORCH_FILTER[resample](pixels_1CHW, [y.stop, x.stop], False, y.after / y.before, x.after / x.before)
    return kept_1CHW[0, :3, y.start:y.stop, x.start:x.stop].permute(1, 2, 0).numpy()


def _resize_cropped(image: Image.Image, has_alpha: bool, x: _Axis, y: _Axis, resample: int) -> np.ndarray:
    """Compute the crop alone, in Pillow's order of passes: memory stays small however long the image is.

    Pillow keeps boxes in 32-bit floats, hence the cut to the part that matters first: coordinates stay small and exact.
    """
    (left, right), (top, bottom), (x0, x1), (y0, y1) = x.cut(), y.cut(), x.source(), y.source()

    def across(part: Image.Image) -> Image.Image:
        return part.resize((x.stop - x.start, part.height), resample, (x0 - left, 0, x1 - left, part.height))

    def down(part: Image.Image) -> Image.Image:
        return part.resize((part.width, y.stop - y.start), resample, (0, y0 - top, part.width, y1 - top))

    part = _rgb(image.crop((left, top, right, bottom)), has_alpha)
    return np.asarray(across(down(part)) if _height_first(x, y) else down(across(part)))


class FastTokenizer(Protocol):
    """A tokenizer that is backed by the tokenizers library: transformers' own, or a ModelTokenizer."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizers object."""


class PaddingTokenizer(FastTokenizer, Protocol):
    """A FastTokenizer that knows the id of its padding token."""

    @property
    def pad_token_id(self) -> int:
        """The id that fills batches of titles."""


class ModelTokenizer(NamedTuple):
    """A model's tokenizer without transformers."""

    backend_tokenizer: Tokenizer
    pad_token_id: int


def tokenize(tokenizer: FastTokenizer, titles: Sequence[str], max_length: int) -> list[list[int]]:
    """Encode titles with BOS and EOS, cut on the right to `max_length` tokens with EOS kept, without padding.

    Truncation and padding stored with the tokenizer are switched off meanwhile. Halves of surrogate pairs, which UTF-8
    cannot hold, become "?". Of a long title only as many words are encoded as give more than `max_length` tokens: a
    word's tokens do not depend on those behind it. Memory is that of ENCODED_AT_ONCE characters, some 60 bytes each.
    """
    backend = tokenizer.backend_tokenizer
    with _TOKENIZING:
        truncation, padding = backend.truncation, backend.padding
        try:
            backend.enable_truncation(max_length)
            backend.no_padding()
            return _encode_beginnings(backend, titles, max_length)
        finally:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()


def _encode_beginnings(backend: Tokenizer, titles: Sequence[str], max_length: int) -> list[list[int]]:
    """Encode as much of each title as is needed: a beginning that gives too few tokens is doubled."""
    ids: list[list[int]] = [[] for _ in titles]
    length, todo = CHARACTERS_PER_TOKEN * max_length, [*range(len(titles))]
    while todo:
        longer = []
        for places in _sized_batches(titles, todo, length):
            ends = [_end_of_words(titles[place], length) for place in places]
            texts = []
            for place, end in zip(places, ends, strict=True):
                texts.append(titles[place][:end].encode("utf-8", "replace").decode("utf-8"))
            for place, end, encoding in zip(places, ends, backend.encode_batch(texts), strict=True):
                if end < len(titles[place]) and not encoding.overflowing:
                    longer.append(place)
                else:
                    ids[place] = encoding.ids
        length, todo = 2 * length, longer
    return ids


def _sized_batches(titles: Sequence[str], places: Sequence[int], length: int) -> Iterator[list[int]]:
    """Yield the places in batches whose titles, each counted up to `length`, have ENCODED_AT_ONCE characters."""
    batch, size = list[int](), 0
    for place in places:
        batch.append(place)
        size += min(len(titles[place]), length)
        if size >= ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _end_of_words(title: str, length: int) -> int:
    """Return where the last word ends that lies within the first `length` characters; of a longer word, its end."""
    if len(title) <= length:
        return len(title)
    end = title.rfind(" ", 0, length + 1)
    if not title[: max(end, 0)].strip():
        end = title.find(" ", length)
    return end if end >= 0 else len(title)


def collate_tokens(ids: Sequence[Sequence[int]], pad_id: int) -> Tokens:
    """Pad on the right to the longest of the batch; return ids and mask, int64 [B, L]."""
    lengths_B = np.array([len(row) for row in ids], np.int64)
    mask_BL = np.arange(max(lengths_B, default=0)) < lengths_B[:, None]
    ids_BL = np.full(mask_BL.shape, pad_id, np.int64)
    ids_BL[mask_BL] = np.fromiter(chain.from_iterable(ids), np.int64)
    return Tokens(torch.from_numpy(ids_BL), torch.from_numpy(mask_BL.astype(np.int64)))


def tokenizer_fingerprint(tokenizer: FastTokenizer, max_length: int) -> str:
    """Return the SHA-256 in hex of everything that decides a title's tokens; stored truncation and padding do not."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": max_length, "padding": None}
    return hashlib.sha256(json.dumps([TOKENS_VERSION, state], sort_keys=True).encode()).hexdigest()
