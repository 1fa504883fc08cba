"""Which beginnings of prompts are kept, block by block: an index from tokens to blocks of the prefix store. Pure.

A block's key is the hash of its tokens and of the key of the block in front of it, so that a block is found only
behind its own beginning. The first key's seed tells apart what the same tokens mean under another adapter or with
other images. Blocks are kept as long as there is room, and those that were used least recently leave first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

_KEY_BYTES = 16


def chain(tokens: Sequence[int], block_tokens: int, seed: bytes = b"") -> list[bytes]:
    """Return the keys of all full blocks of some tokens."""
    keys = []
    key = blake2b(seed, digest_size=_KEY_BYTES).digest()
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = array("i", tokens[end - block_tokens : end]).tobytes()
        key = blake2b(key + block, digest_size=_KEY_BYTES).digest()
        keys.append(key)
    return keys


class PrefixIndex:
    """Keys to block numbers.

    Attributes:
        blocks: most blocks that are kept.
        block_tokens: tokens of a block.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        """Keep nothing yet."""
        self.blocks = blocks
        self.block_tokens = block_tokens
        #: Least recently used first.
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(reversed(range(blocks)))
        self._held: set[bytes] = set()

    def __len__(self) -> int:
        """Return how many blocks are kept."""
        return len(self._kept)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest kept beginning."""
        found = []
        for key in keys:
            block = self._kept.get(key)
            if block is None:
                break
            found.append(block)
        # The last one first: a block is of no use without those in front of it, so it must leave before them.
        for key in reversed(keys[: len(found)]):
            self._kept.move_to_end(key)
        return found

    def keep(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Make room for those blocks of a beginning that are not kept yet.

        Returns:
            (which of the keys, the block to be filled with its tokens), in the order of the keys; only the first ones
            where there is no room for all beside what is held.
        """
        keys = keys[: self.blocks]
        known = len(self.find(keys))
        # All that is there behind a missing one would be found by `find` after this; it need not be filled again.
        missing = [number for number in range(known, len(keys)) if keys[number] not in self._kept]
        fresh = []
        for number in missing:
            block = self._free.pop() if self._free else self._evict(self._held.union(keys))
            if block is None:
                break
            self._kept[keys[number]] = block
            fresh.append((number, block))
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)
        return fresh

    def hold(self, keys: Sequence[bytes]) -> None:
        """Keep these blocks, which were found, until `release`: somebody is about to read them."""
        self._held.update(keys)

    def release(self) -> None:
        """Let go of all that is held."""
        self._held.clear()

    def forget(self, keys: Sequence[bytes]) -> None:
        """Drop these blocks, such as those of a row whose values turned out to be broken."""
        for key in keys:
            block = self._kept.pop(key, None)
            if block is not None:
                self._free.append(block)

    def clear(self) -> None:
        """Drop everything."""
        self.release()
        self.forget(list(self._kept))

    def _evict(self, spared: set[bytes]) -> int | None:
        key = next((key for key in self._kept if key not in spared), None)
        return None if key is None else self._kept.pop(key)
