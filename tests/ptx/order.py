"""What blocks see of each other's writes: message passing by fences and atomic accesses, as CUDA's memory model has it.

A block's writes are seen by another where each thread that wrote fenced, then one of the block accessed an address
atomically, later one of the other block did so too, and then fenced.
"""

from collections import defaultdict

import numpy as np


class Order:
    """Of the blocks of a launch; ``releases`` counts for each its atomic accesses that show others its writes."""

    def __init__(self, blocks: int) -> None:
        self.releases = np.zeros(blocks, np.int32)
        self._seen: dict[int, dict[int, int]] = defaultdict(dict)  # releases of others, by block
        self._taken: dict[int, dict[int, int]] = defaultdict(dict)  # those that a fence will show
        self._left: dict[int, dict[int, int]] = defaultdict(dict)  # those that an address has, by address

    def access(self, block: int, address: int, fenced: bool) -> None:
        """An atomic one, ``fenced`` where no thread of the block has written since it fenced."""
        left = self._left[address]
        _merge(self._taken[block], left)
        if fenced:
            self.releases[block] += 1
            _merge(left, {**self._seen[block], block: int(self.releases[block])})

    def fence(self, block: int) -> None:
        _merge(self._seen[block], self._taken.pop(block, {}))

    def sees(self, block: int, writer: int, release: int) -> bool:
        """Whether ``block`` sees what ``writer`` wrote after so many releases."""
        return self._seen[block].get(writer, 0) > release


def _merge(into: dict[int, int], more: dict[int, int]) -> None:
    for block, release in more.items():
        into[block] = max(into.get(block, 0), release)
