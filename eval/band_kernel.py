"""The scan of a tile of scores as one Triton kernel that never writes the scores to memory; see eval/banded.py.

Dimension key: R x C one tile of scores, E embedding, M scores in the band.
"""

# No `from __future__ import annotations`: Triton reads the types of a kernel's parameters.

import torch
import triton
import triton.language as tl
from torch import Tensor

from eval.banded import Limits, Scan

BLOCK, DEPTH, GROUP = 128, 64, 8  # a program's rows and columns, what it multiplies at once, rows that share the cache


def scan_by_kernel(image_RE: Tensor, title_CE: Tensor, limit_R: Limits, limit_C: Limits, capacity: int) -> Scan:
    """Return the scan of a tile, as `scan_by_torch` does; the band comes in any order."""
    (rows, width), cols, device = image_RE.shape, len(title_CE), image_RE.device
    sure_R, sure_C = (torch.zeros(count, dtype=torch.int32, device=device) for count in (rows, cols))
    code_M, found = torch.empty(capacity, dtype=torch.int64, device=device), torch.zeros_like(sure_R[:1])
    grid = (triton.cdiv(rows, BLOCK) * triton.cdiv(cols, BLOCK),)
    _scan[grid](image_RE, title_CE, *limit_R, *limit_C, sure_R, sure_C, code_M, found, rows, cols, width, capacity,
                BLOCK, DEPTH, GROUP, num_warps=8, num_stages=3)
    count = int(found)
    return Scan(sure_R, sure_C, code_M[:count] if count <= capacity else None)


# More than six parameters: Triton passes pointers and sizes to a kernel, and no object that could hold them.
@triton.jit
def _scan(image_ptr, title_ptr, low_row_ptr, high_row_ptr, low_col_ptr, high_col_ptr, sure_row_ptr, sure_col_ptr,
          code_ptr, found_ptr, rows, cols, width, capacity, block: tl.constexpr, depth: tl.constexpr,
          group: tl.constexpr):
    """Multiply one block of images and titles, count the scores above the limits, list those in the band."""
    down, across = tl.cdiv(rows, block), tl.cdiv(cols, block)
    number = tl.program_id(0)
    block_row, block_col = tl.swizzle2d(number // across, number % across, down, across, group)
    row, col = block_row * block + tl.arange(0, block), block_col * block + tl.arange(0, block)
    in_rows, in_cols = row < rows, col < cols
    score = tl.zeros((block, block), tl.float32)
    for start in range(0, width, depth):
        place = start + tl.arange(0, depth)
        inside = place < width
        image = tl.load(image_ptr + row[:, None] * width + place, mask=in_rows[:, None] & inside, other=0.0)
        title = tl.load(title_ptr + col * width + place[:, None], mask=in_cols & inside[:, None], other=0.0)
        score = tl.dot(image, title, score)

    # Beyond the edge of the tile, limits are infinite: no score is above them or in their band.
    low_row = tl.load(low_row_ptr + row, mask=in_rows, other=float("inf"))[:, None]
    high_row = tl.load(high_row_ptr + row, mask=in_rows, other=float("inf"))[:, None]
    low_col = tl.load(low_col_ptr + col, mask=in_cols, other=float("inf"))
    high_col = tl.load(high_col_ptr + col, mask=in_cols, other=float("inf"))
    in_tile = in_rows[:, None] & in_cols
    sure_row = tl.sum((in_tile & (score > high_row)).to(tl.int32), 1)
    sure_col = tl.sum((in_tile & (score > high_col)).to(tl.int32), 0)
    tl.atomic_add(sure_row_ptr + row, sure_row, mask=in_rows & (sure_row > 0))
    tl.atomic_add(sure_col_ptr + col, sure_col, mask=in_cols & (sure_col > 0))

    in_row_band = in_tile & (score >= low_row) & (score <= high_row)
    in_col_band = in_tile & (score >= low_col) & (score <= high_col)
    in_band = in_row_band | in_col_band
    code = 4 * (row.to(tl.int64)[:, None] * cols + col) + in_row_band.to(tl.int64) + 2 * in_col_band.to(tl.int64)
    # Each score in the band takes the next free slot. The count goes on beyond `capacity`, which shows an overflow.
    slot = tl.atomic_add(found_ptr + tl.zeros((block, block), tl.int32), 1, mask=in_band)
    tl.store(code_ptr + slot, code, mask=in_band & (slot < capacity))
