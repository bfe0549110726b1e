"""How long faults took."""

_SUB_BITS = 4
_SUB = 1 << _SUB_BITS


class LatencyHistogram:
    """Durations in nanoseconds; each power of two is divided into 16 buckets, so quantiles are 6 % off at the most."""

    def __init__(self) -> None:
        """No durations yet."""
        self.count = 0
        self.longest = 0
        self._buckets = [0] * (_SUB * 64)

    def add(self, duration: int) -> None:
        """Count one duration, below 2**63 ns."""
        self.count += 1
        if duration > self.longest:
            self.longest = duration
        shift = max(duration.bit_length() - _SUB_BITS - 1, 0)
        self._buckets[(shift << _SUB_BITS) + (duration >> shift)] += 1

    def quantile(self, part: float) -> int:
        """The duration that this part of all does not exceed; 0 when there are none."""
        rank = part * self.count
        seen = 0
        for bucket, count in enumerate(self._buckets):
            seen += count
            if count and seen >= rank:
                shift = max((bucket >> _SUB_BITS) - 1, 0)
                return min((bucket - (shift << _SUB_BITS) + 1 << shift) - 1, self.longest)
        return self.longest
