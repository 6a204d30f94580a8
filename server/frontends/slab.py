"""Who has which part of a piece of shared memory: a buddy allocator (Knowlton, 1965) of its owner's process.

Parts are powers of two and lie at multiples of their size. What is freed is taken again first, while it is warm; free
halves are put together only when nothing large enough is left, so that the usual allocation is a pop.
"""

from __future__ import annotations

LEAST = 4096


class Slab:
    """capacity: bytes in all, LEAST times a power of two."""

    def __init__(self, capacity: int) -> None:
        self.top = order_of(capacity)
        if LEAST << self.top != capacity:
            raise ValueError(f"a slab of {capacity} bytes; it must be {LEAST} times a power of two")
        # By order: the places of free parts of LEAST << order bytes.
        self.free: list[list[int]] = [[] for _ in range(self.top + 1)]
        self.free[self.top].append(0)

    def allocate(self, size: int) -> int | None:
        """The place of a part of at least `size` bytes; None where there is none."""
        order = order_of(size)
        found = self._take(order)
        if found is None and order <= self.top:
            self._join()
            found = self._take(order)
        return found

    def release(self, place: int, size: int) -> None:
        """Give a part back; size: what was asked for."""
        self.free[order_of(size)].append(place)

    def _take(self, order: int) -> int | None:
        for larger in range(order, self.top + 1):
            if self.free[larger]:
                place = self.free[larger].pop()
                for half in range(larger - 1, order - 1, -1):
                    self.free[half].append(place + (LEAST << half))
                return place
        return None

    def _join(self) -> None:
        for order in range(self.top):
            size, places = LEAST << order, set(self.free[order])
            halves = {place for place in places if place & size == 0 and place + size in places}
            self.free[order + 1].extend(sorted(halves, reverse=True))
            self.free[order] = sorted(places - halves - {place + size for place in halves}, reverse=True)


def order_of(size: int) -> int:
    """Of the smallest part that holds so many bytes."""
    return max(0, (max(size, 1) - 1).bit_length() - (LEAST.bit_length() - 1))
