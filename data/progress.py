"""Progress of a long pass: a line every few seconds with count, rate, remaining time and failures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from data.batch import BadSample

REPORT_EVERY_S = 5.0


class Progress:
    """Progress of a pass over `total` items, written to `log`; a pass shorter than REPORT_EVERY_S writes nothing."""

    shortest_s = REPORT_EVERY_S  # a pass that takes at least this long ends with a line

    def __init__(self, label: str, total: int, log: Callable[[str], None]) -> None:
        self.label, self.total, self.log = label, total, log
        self.done = 0
        self.failed: Counter[str] = Counter()
        self._began = self._reported = time.monotonic()

    def __call__(self, more: int = 1, problem: BadSample | None = None) -> None:
        """Count `more` items as done; `problem` is the reason why one has failed."""
        self.done += more
        if problem is not None:
            self.failed[problem.reason] += 1
        self._report()

    def _report(self) -> None:
        """Write a line if it is the last one or the previous one is REPORT_EVERY_S old."""
        now = time.monotonic()
        is_due = now - self._reported >= REPORT_EVERY_S
        if is_due or (self.done == self.total and now - self._began >= self.shortest_s):
            self._reported = now
            self.log(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        rate = self.done / seconds
        left = (self.total - self.done) / rate
        failures = "".join(f"  {reason} {count:,}" for reason, count in self.failed.most_common())
        return f"{self.label} {self.done:,}/{self.total:,}  {rate:,.0f}/s  eta {left:,.0f} s{failures}"


class DownloadProgress(Progress):
    """Progress of `total` files that are streamed to disk, in bytes; the last line is always written."""

    shortest_s = 0.0

    def __init__(self, label: str, total: int, log: Callable[[str], None]) -> None:
        super().__init__(label, total, log)
        self.bytes = 0
        self.announced: list[int] = []  # sizes of the files begun

    def expect(self, size: int) -> None:
        """Count a file of `size` bytes as begun: the mean of these sizes stands for the files to come."""
        self.announced.append(size)

    def add_bytes(self, size: int) -> None:
        """Count `size` bytes that are on disk."""
        self.bytes += size
        self._report()

    def _line(self, seconds: float) -> str:
        rate = self.bytes / max(seconds, 1e-3)
        mean_size = sum(self.announced) / max(len(self.announced), 1)
        left = max(mean_size * self.total - self.bytes, 0)
        eta = f"  eta {left / rate:,.0f} s" if rate and self.done < self.total else ""
        return (f"{self.label} {self.done:,}/{self.total:,}  {self.bytes / 1e6:,.1f} MB  "
                f"{rate / 1e6:,.1f} MB/s{eta}")
