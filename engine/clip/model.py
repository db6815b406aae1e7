"""The model that trains: the two projections, and the towers before them when layers inside those train too.

The layers are the CLIPModel's own, so training changes the model that is exported.
Dimension key: B batch, H hard negatives of a row, X texts (titles, then negatives), V/T image/text feature width,
E embedding.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from data.batch import Batch, Features, UserError, map_tensors
from data.images.decode import collate_tokens, tokenize
from engine.clip.encoder import CPU_TITLES, BatchedEncoder, LazyEncoder
from engine.clip.facts import ModelRecords
from engine.clip.families import apply_layer
from engine.clip.loading import Clip, load_clip
from engine.clip.towers import ImageTower, TextTower, Towers, describe_trainable, freeze, pick_mode
from engine.device import pick_precision

PROBE_TITLES = ("a red bicycle in the rain", "how to bake bread at home")
MAX_ROUNDING = 16 * torch.finfo(torch.float32).eps  # largest difference between entries of two equal unit vectors
MAX_SCALE = 100.0  # CLIP clamps its learned inverse temperature here (Radford et al. 2021, section 2.5)


class Embeddings(NamedTuple):
    """L2-normalised fp32 embeddings of a batch, and the scale of its similarities.

    `text_XE` holds the titles, then negative 1 of all rows, negative 2 of all rows, …: X is B * (1 + H).
    """

    image_BE: Tensor
    text_XE: Tensor
    scale: Tensor


class _L2Normalize(torch.autograd.Function):
    """x / |x| along the last dimension, with a gradient of three kernels instead of autograd's dozen."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_XE: Tensor) -> Tensor:
        length_X1 = torch.linalg.vector_norm(rows_XE, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit_XE = rows_XE / length_X1
        ctx.save_for_backward(unit_XE, length_X1)
        return unit_XE

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad_XE: Tensor) -> Tensor:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        unit_XE, length_X1 = saved
        along_X1 = torch.linalg.vecdot(unit_XE, grad_XE)[..., None]
        return torch.addcmul(grad_XE, unit_XE, along_X1, value=-1).div_(length_X1)


def l2_normalize(rows_XE: Tensor) -> Tensor:
    """Return the rows at unit length, as `F.normalize` does."""
    return _L2Normalize.apply(rows_XE)


class Head(nn.Module):
    """Features -> Embeddings by the last linear layer of each side: CLIP's projections, or SigLIP's layers."""

    fixed_scale: Tensor

    def __init__(self, clip: Clip, scale: float) -> None:
        super().__init__()
        self.visual_projection, self.text_projection, self.logit_scale = clip.head
        self.register_buffer("fixed_scale", torch.tensor(scale), persistent=False)

    def image(self, features_BV: Tensor) -> Tensor:
        """Return [B, E] of [B, V], unit length, fp32 also under autocast."""
        return l2_normalize(apply_layer(self.visual_projection, features_BV).float())

    def text(self, features_BT: Tensor) -> Tensor:
        """Return [B, E] of [B, T], unit length, fp32 also under autocast."""
        return l2_normalize(apply_layer(self.text_projection, features_BT).float())

    def forward(self, features: Features) -> Embeddings:
        """Return embeddings with the recipe's constant scale, or the model's own `logit_scale` when that trains."""
        text_XT = features.title_BT
        if features.negative_BHT is not None:
            text_XT = torch.cat([text_XT, *features.negative_BHT.unbind(1)])
        image_BE, text_XE = self.image(features.image_BV), self.text(text_XT)
        if not self.logit_scale.requires_grad:
            return Embeddings(image_BE, text_XE, self.fixed_scale)
        return Embeddings(image_BE, text_XE, self.logit_scale.exp().clamp(max=MAX_SCALE).squeeze())


class StreamingModel(nn.Module):
    """Batch -> Embeddings through the towers, for when a layer inside them trains; frozen layers build no graph."""

    def __init__(self, towers: Towers, head: Head) -> None:
        super().__init__()
        self.towers = towers
        self.head = head

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of the tower inputs of one step.

        An empty rank runs one dummy row and cuts it off: its gradient is 0 but reaches every parameter, so that DDP
        can all-reduce.
        """
        if len(batch.image_id_B):
            with record_function("towers"):
                features = self.towers(batch)
            return self.head(features)
        titles_only = batch._replace(negative=None, negative_id_BH=None)
        dummy = map_tensors(titles_only, lambda part: part.new_ones(1, *(max(1, size) for size in part.shape[1:])))
        image_BE, text_XE, scale = self.head(self.towers(dummy))
        return Embeddings(image_BE[:0], text_XE[:0], scale)


class MicroBatched(nn.Module):
    """Computes embeddings `rows` at a time without keeping activations; backward runs each part again.

    GradCache (Gao et al. 2021, arXiv 2101.06983): the loss sees the embeddings of the whole batch, so every negative
    counts, while memory holds the activations of one part. One more forward pass is the price.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of the tower inputs of one step."""
        count = len(batch.pixels_BCSS)
        texts = 1 if batch.negative_id_BH is None else 1 + batch.negative_id_BH.shape[1]
        images, titles_then_negatives = [], []
        for low in range(0, max(1, count), self.rows):
            part = checkpoint(self.model, batch.take(slice(low, low + self.rows)), use_reentrant=False)
            images.append(part.image_BE)
            titles_then_negatives.append(part.text_XE.unflatten(0, (texts, len(part.image_BE))))
        return Embeddings(torch.cat(images), torch.cat(titles_then_negatives, 1).flatten(0, 1), part.scale)


@dataclass(frozen=True)
class ModelOptions:
    """The settings of a run that decide how its model is opened."""

    trainable: Sequence[str] = ("projection",)
    mode: str = "auto"
    scale: float = 20.0
    precision: str = "auto"
    augment: bool = False  # images differ in every epoch, so no features are cached
    recompute: bool = False  # the layers of the towers keep no activations for backward


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train and to encode: its head as a module, its towers on first use, its trainable parameters."""

    clip: Clip
    head: Head
    trainable: dict[str, nn.Parameter]
    cached: bool
    stored: bool  # the towers are frozen: evaluation uses stored features even where training streams
    precision: torch.dtype
    device: torch.device
    recompute: bool  # as in ModelOptions

    @cached_property
    def towers(self) -> Towers:
        """Both towers on the device."""
        towers = Towers(self.clip).to(self.device)
        if self.recompute:
            towers.recompute()
        return towers

    def encoders(self, compiled: str = "off") -> tuple[LazyEncoder, LazyEncoder]:
        """Return the image and the text tower as encoders, each of which loads its tower on first use."""
        def image() -> BatchedEncoder:
            tower = ImageTower(self.clip).to(self.device) if self.cached else self.towers.image
            return BatchedEncoder(tower, self.device, self.precision, compiled)

        def text() -> BatchedEncoder:
            tower = TextTower(self.clip).to(self.device) if self.cached else self.towers.text
            return BatchedEncoder(tower, self.device, self.precision, cpu_batch=CPU_TITLES)

        return LazyEncoder(image), LazyEncoder(text)

    def describe(self) -> str:
        """Return one line: trainable parameters, mode, precision and, where a record has named it, the commit."""
        mode = "cached features" if self.cached else "streaming through the towers"
        known = f"; {self.clip.name} as recorded at commit {self.clip.commit[:12]}" if (
            self.clip.record and self.clip.commit) else ""
        return f"{describe_trainable(self.clip, self.trainable)}; {mode}, {str(self.precision)[6:]}{known}"

    def trained_model(self, micro_batch: int = 0) -> nn.Module:
        """Return the module to train: it takes Features if cached, a Batch if streaming, `micro_batch` rows at once.

        Raises UserError for micro-batches of cached features, where no tower runs.
        """
        if self.cached:
            if micro_batch:
                raise UserError("--micro-batch saves the activations of towers, and with cached features none run; "
                                "leave it out or use --mode streaming")
            return self.head
        streamed = StreamingModel(self.towers, self.head)
        return MicroBatched(streamed, micro_batch) if micro_batch else streamed


def open_model(name: str, options: ModelOptions, device: torch.device,
               records: ModelRecords | None = None) -> LoadedModel:
    """Open a CLIPModel, freeze it by name, put it on the device. Raises UserError for options that exclude each other.

    A model that is loaded whole is checked for collapse; one with a record passed that check in an earlier run.
    """
    model = build_model(load_clip(name, records=records), options, device)
    if model.clip.record is None:
        refuse_collapse(model, device)
    return model


def build_model(clip: Clip, options: ModelOptions, device: torch.device) -> LoadedModel:
    """Freeze a CLIPModel by name and put its head on the device.

    Raises UserError for options that exclude each other.
    """
    if options.augment and options.mode == "cached":
        raise UserError("--augment shows other pixels in every epoch, --mode cached the same; leave one out")
    tuned = freeze(clip, options.trainable)
    is_frozen = pick_mode(options.mode, tuned)
    return LoadedModel(clip, Head(clip, options.scale).to(device), tuned, cached=is_frozen and not options.augment,
                       stored=is_frozen, precision=pick_precision(options.precision, device), device=device,
                       recompute=options.recompute)


def draw_ramps(height: int, width: int) -> Tensor:
    """Return two probe pictures as uint8 [2, 3, height, width]: black to white from the top, and the same flipped."""
    ramp_HW = torch.linspace(0, 255, height).byte()[:, None].expand(height, width)
    return torch.stack([ramp_HW, ramp_HW.flip(0)])[:, None].expand(2, 3, height, width).contiguous()


def refuse_collapse(model: LoadedModel, device: torch.device) -> None:
    """Raise UserError where the embeddings of two titles, or of two drawn pictures, are equal or NaN (in fp32)."""
    clip = model.clip
    pixels_BCSS = draw_ramps(*clip.spec.crop)
    tokens = collate_tokens(tokenize(clip.tokenizer, PROBE_TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    tokens = map_tensors(tokens, lambda part: part.to(device))
    with torch.no_grad():
        image_BV, text_BT = model.towers.probe(pixels_BCSS.to(device), tokens)
        pictures_BE, titles_BE = model.head.image(image_BV), model.head.text(text_BT)
    for kind, embeddings_BE in (("titles", titles_BE), ("pictures", pictures_BE)):
        difference = float((embeddings_BE[0] - embeddings_BE[1]).abs().max())
        if not difference > MAX_ROUNDING:  # this way round for NaN, which is not above anything
            problem = "as NaN" if math.isnan(difference) else "alike"
            raise UserError(f"--model {clip.name} embeds all {kind} {problem}: its weights are damaged or its training "
                            "has collapsed; give another checkpoint")


def distribute(model: nn.Module, size: int) -> nn.Module:
    """Wrap in DistributedDataParallel, which averages gradients over ranks; the loop makes that a sum."""
    if size == 1:
        return model
    # All buffers are constants (pixel mean and deviation, scale), so nothing is to be broadcast in each step.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch renames broadcast_buffers, older has no other name
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
