"""Blocks of a launch that run together, and the order in which their warps do.

Blocks know nothing of each other, so the same warps of all of them advance side by side. With a seed, the warps of a
block are parted at random, and the parts take turns in an order drawn from it; without one they run as far together as
they do the same. Either way an asynchronous copy lands only when nobody could go on without it.
"""

import numpy as np

from .barriers import Barrier, MBarrier
from .group import LANES, Group
from .order import Clocks
from .ptx import PTXError
from .shared import SharedMemory

PARTS = 3
"""Into how many the warps of a block are parted at most."""

LIMIT = 100_000
"""Turns after which a wave that does not end is given up."""


class Wave:
    def __init__(self, launch, blocks: np.ndarray):
        self.launch, self.blocks = launch, blocks  # numbers of the blocks, one a row
        self.program, self.memory, self.counters = launch.program, launch.memory, launch.counters
        self.warps = -(-launch.threads // LANES)
        self.random = None if launch.seed is None else np.random.default_rng((launch.seed, int(blocks[0])))
        self.poison = launch.poison
        self.clocks = Clocks(len(blocks), self.warps, launch.now)
        program = self.program
        self.shared = SharedMemory(len(blocks), program.shared_size, program.granule, self.warps, self.poison)
        self.barriers, self.mbarriers, self.agents = {}, {}, {}
        self.flights = []  # tensor copies that have not landed
        self.ended = np.zeros((len(blocks), self.warps), np.bool_)
        self.ready, self.blocked = self._groups(), []

    def _groups(self):
        kinds = np.zeros(self.warps, np.int64)
        if self.random is not None:
            kinds = self.random.integers(0, min(PARTS, self.warps), self.warps)
        groups = []
        for kind in np.unique(kinds):
            warps = np.flatnonzero(kinds == kind)
            rows, warps = np.meshgrid(np.arange(len(self.blocks)), warps, indexing="ij")
            groups.append(Group(self, rows.reshape(-1), warps.reshape(-1), int(kind)))
        return groups

    # --- what instructions ask for ------------------------------------------------------------------------------------

    def special(self, name: str, group: Group) -> np.ndarray:
        axis = "xyz".find(name[-1])
        if name.startswith(("tid", "laneid", "warpid")):
            thread = np.tile(np.arange(LANES), group.size) + group.lane_warps * LANES
            if name == "laneid":
                return thread % LANES
            if name == "warpid":
                return thread // LANES
            return thread if axis == 0 else np.zeros_like(thread)
        if name.startswith("ctaid"):
            x, y, _ = self.launch.grid
            number = group.lane_blocks
            return (number % x, number // x % y, number // (x * y))[axis]
        if name.startswith("nctaid"):
            return np.full(group.threads, self.launch.grid[axis])
        if name.startswith("ntid"):
            return np.full(group.threads, (self.launch.threads, 1, 1)[axis])
        raise PTXError(f"special register {name} is not known")

    def load_parameter(self, offsets, width, count):
        parameters = self.launch.parameters
        if (offsets + np.uint64(width * count) > np.uint64(len(parameters))).any():
            raise PTXError("outside of the parameters of the kernel")
        at = offsets.astype(np.int64)[:, None] + np.arange(width * count)
        return parameters[at].view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width])

    def tensor_map(self, offset: int):
        if offset not in self.launch.tensor_maps:
            raise PTXError(f"a tensor copy through something that is no tensor map (parameter byte {offset})")
        return self.launch.tensor_maps[offset]

    def barrier(self, number: int) -> Barrier:
        if number not in self.barriers:
            self.barriers[number] = Barrier(number, self)
        return self.barriers[number]

    def make_mbarrier(self, row, warp, offset, count):
        if (row, offset) in self.mbarriers:
            raise PTXError(f"mbarrier {offset:#x} is initialised twice")
        agent = self.agents.setdefault(offset, self.warps + len(self.agents))
        if agent >= self.warps + Clocks.MBARRIERS:
            raise PTXError(f"more than {Clocks.MBARRIERS} mbarriers")
        self.mbarriers[row, offset] = MBarrier(offset, count, agent, warp, self.clocks.now)

    def drop_mbarrier(self, row, warp, offset):
        for user, when in self.mbarrier(row, offset).used.items():
            if user != warp and self.clocks.seen[row, warp, user] < when:
                raise PTXError(f"race: mbarrier {offset:#x} is invalidated while warp {user} may use it")
        if any(flight.row == row and flight.mbarrier.offset == offset for flight in self.flights):
            raise PTXError(f"mbarrier {offset:#x} is invalidated while a copy that reports to it is in flight")
        del self.mbarriers[row, offset]

    def mbarrier(self, row, offset) -> MBarrier:
        if (row, offset) not in self.mbarriers:
            raise PTXError(f"uninitialised: there is no mbarrier at {offset:#x}")
        return self.mbarriers[row, offset]

    def mbarrier_for(self, row, warp, offset) -> MBarrier:
        """The mbarrier, used by a warp, which must be after its initialisation."""
        one = self.mbarrier(row, offset)
        if warp != one.made_by and self.clocks.seen[row, warp, one.made_by] < one.made_at:
            raise PTXError(f"race: mbarrier {offset:#x} is used without order after its mbarrier.init")
        one.used[warp] = self.clocks.now
        return one

    def end(self, rows, warps):
        self.ended[rows, warps] = True

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for _ in range(LIMIT):
            if not self.ready:
                if not self.blocked:
                    break
                if not (self._wake() or self._wake_some() or self._land()):
                    raise PTXError(self._deadlock())
                continue
            group = self._pick()
            if group.advance():
                self.blocked.append(group)
        else:
            raise PTXError(f"{self.program.kernel.name}: gave up after {LIMIT} turns")
        if self.flights:
            raise PTXError(f"{self.program.kernel.name}: a block ends while {len(self.flights)} copies are in flight")

    def _pick(self) -> Group:
        at = 0 if self.random is None else int(self.random.integers(len(self.ready)))
        return self.ready.pop(at)

    def _wake(self) -> bool:
        """Groups that no longer wait become ready; those that then do the same are put together."""
        waking = [group for group in self.blocked if group.blocked.ready(group).all()]
        self.blocked = [group for group in self.blocked if group not in waking]
        for group in waking:
            into = next((other for other in self.ready if other.joins(group) and _same(other, group)), None)
            if into is None:
                self.ready.append(group)
            else:
                into.join(group)
        return bool(waking)

    def _wake_some(self) -> bool:
        """As `_wake`, of groups in which only some warps may go on: these part from the others."""
        for group in self.blocked:
            ready = group.blocked.ready(group)
            if ready.any():
                self.blocked.remove(group)
                for warps, to in ((np.flatnonzero(ready), self.ready), (np.flatnonzero(~ready), self.blocked)):
                    part = group.select(warps)
                    part.blocked = group.blocked.select(warps)
                    to.append(part)
                return True
        return False

    def _land(self) -> bool:
        """The copies that report to one of the mbarriers somebody waits for."""
        waited = set()
        for group in self.blocked:
            offsets = getattr(group.blocked, "offsets", None)
            if offsets is not None:
                waited |= {(int(row), int(offset)) for row, offset in zip(group.rows, offsets, strict=True)}
        candidates = sorted({f.mbarrier.offset for f in self.flights if (f.row, f.mbarrier.offset) in waited})
        if not candidates:
            return False
        offset = candidates[0 if self.random is None else int(self.random.integers(len(candidates)))]
        landing = [f for f in self.flights if f.mbarrier.offset == offset and (f.row, offset) in waited]
        self.flights = [f for f in self.flights if not (f.mbarrier.offset == offset and (f.row, offset) in waited)]
        for flight in landing:
            flight.land(self)
        return True

    def _deadlock(self) -> str:
        parts = []
        for group in self.blocked:
            step = self.program.kernel.instructions[group.frames[-1].pc]
            who = sorted(
                {(int(self.blocks[row]), int(warp)) for row, warp in zip(group.rows, group.warps, strict=True)}
            )
            named = ", ".join(f"block {block} warp {warp}" for block, warp in who[:4])
            more = f" and {len(who) - 4} more" if len(who) > 4 else ""
            parts.append(f"{named}{more} at line {step.line}: {group.blocked}{self._state(group)}")
        ended = int(self.ended.sum())
        return f"deadlock in {self.program.kernel.name}: {'; '.join(parts)}; {ended} warps have ended"

    def _state(self, group):
        offsets = getattr(group.blocked, "offsets", None)
        if offsets is None:
            return ""
        one = self.mbarrier(int(group.rows[0]), int(offsets[0]))
        return f" (phase {one.phase}: {one.pending} arrivals and {one.bytes} bytes to come)"


def _same(one: Group, other: Group) -> bool:
    """Both have waited at a numbered barrier: what is left of an mbarrier's wait differs from warp to warp."""
    return type(one.blocked) is type(other.blocked) and not hasattr(one.blocked, "offsets")
