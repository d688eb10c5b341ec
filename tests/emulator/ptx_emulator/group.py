"""Warps that run side by side, in one block or several: their registers, and the stack of what they still have to do.

A group executes one instruction at a time for all of its warps. Where lanes, or warps, take different ways at a branch
the ways are done one after the other under a mask and meet again behind them; a warp that must wait leaves the group
with what is its own, so no warp ever waits for another one's wait.
"""

import numpy as np

from .order import Who
from .ptx import PTXError

LANES = 32

LIMIT = 1_000_000
"""Instructions after which a group that neither ends nor waits is given up."""


class Frame:
    """Instructions from ``pc`` up to ``until``, done by the threads of ``mask`` (None: all)."""

    __slots__ = ("pc", "until", "mask")

    def __init__(self, pc, until, mask):
        self.pc, self.until, self.mask = pc, until, mask


class Group:
    def __init__(self, wave, rows: np.ndarray, warps: np.ndarray, kind: int = 0):
        """``rows [n]``, ``warps [n]``: of each warp its block's row in the wave and its number in the block."""
        self.wave, self.program, self.kind = wave, wave.program, kind
        self.rows, self.warps = rows, warps
        self.registers = [None] * wave.program.kernel.num_registers
        self.frames = [Frame(0, len(wave.program.steps), None)]
        self.active = None  # the threads that do the current instruction; None: all
        self.blocked = None
        self.tried = None  # the line of a try_wait that has come back without success
        self.copies, self.open_copies = [], []  # cp.async: committed groups, and what is not committed yet
        self.products, self.open_products = [], []  # wgmma, likewise
        self.accumulators = {}  # registers of sums in flight -> what they hold, float32 [registers, threads]
        self.flying = frozenset()  # registers that nobody may touch
        self._lay_out()

    def _lay_out(self):
        self.size = len(self.rows)
        self.threads = LANES * self.size
        self.lane_rows, self.lane_warps = np.repeat(self.rows, LANES), np.repeat(self.warps, LANES)
        self.lane_blocks = self.wave.blocks[self.lane_rows]
        self.everyone = Who(self.wave.clocks, self.lane_blocks, self.lane_rows, self.lane_warps)
        self.each_warp = Who(self.wave.clocks, self.wave.blocks[self.rows], self.rows, self.warps)
        self.specials = {}

    # --- registers and lanes ------------------------------------------------------------------------------------------

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            self.specials[name] = self.wave.special(name, self).astype(np.uint32)
        return self.specials[name]

    def read(self, register: int) -> np.ndarray:
        value = self.registers[register]
        if value is None:
            value = self.registers[register] = self.poisoned(register)
        return value

    def poisoned(self, register: int) -> np.ndarray:
        bits = self.program.kernel.register_bits[register]
        if bits == 1:
            return np.zeros(self.threads, np.bool_)
        word = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
        return np.full(self.threads, self.wave.poison * 0x0001000100010001 & (2**bits - 1), word)

    def write(self, register: int, value: np.ndarray) -> None:
        """Of the threads that are active; ``value`` has the register's type."""
        if self.active is not None:
            old = self.registers[register]
            value = np.where(self.active, value, self.poisoned(register) if old is None else old)
        self.registers[register] = value

    def write_lanes(self, register: int, lanes, value: np.ndarray) -> None:
        """``value [k]`` of the threads numbered ``lanes [k]`` (None: all)."""
        if lanes is None:
            self.registers[register] = value
            return
        old = self.registers[register]
        new = self.poisoned(register) if old is None else old.copy()
        new[lanes] = value
        self.registers[register] = new

    def lanes(self):
        """The numbers of the active threads (None: all), and who they are."""
        if self.active is None:
            return None, self.everyone
        lanes = np.flatnonzero(self.active)
        return lanes, self.everyone.pick(lanes)

    def whole_warps(self, what: str):
        """The active warps, ``[n]`` of bool (None: all); an error where only part of a warp is active."""
        if self.active is None:
            return None
        lanes = self.active.reshape(-1, LANES)
        some = lanes.any(1)
        if (some != lanes.all(1)).any():
            raise PTXError(f"{what} in a warp of which only some lanes are active")
        return some

    def active_warps(self):
        """Numbers of the warps of which some lane is active."""
        if self.active is None:
            return np.arange(self.size)
        return np.flatnonzero(self.active.reshape(-1, LANES).any(1))

    # --- running ------------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Runs until the warps have to wait; False when they have finished."""
        steps, executed = self.program.steps, self.wave.counters.executed
        end = len(steps)
        for _ in range(LIMIT):
            if not self.frames:
                return False
            frame = self.frames[-1]
            pc = frame.pc
            if pc in (frame.until, end):
                self.frames.pop()
                continue
            step = steps[pc]
            self.active = frame.mask
            try:
                if step.guard is not None:
                    self.active = self._guarded(step.guard, frame.mask)
                    if self.active is not None and not self.active.any():
                        frame.pc = pc + 1
                        continue
                executed[pc] += self.size if self.active is None else len(self.active_warps())
                if step.branch is not None:
                    self._branch(frame, step.branch)
                    continue
                if self.flying and not step.touched.isdisjoint(self.flying):
                    step.run_in_flight(self)
                elif not step.waits:
                    step.run(self)
                else:
                    self.leave_others_behind()
                    if not step.run(self):
                        return True
            except PTXError as error:
                raise self.program.explain(error, pc) from None
            self.frames[-1].pc = pc + 1
        raise self.program.explain(PTXError(f"an endless loop: {LIMIT} instructions without a wait"), pc)

    def _guarded(self, guard, mask):
        wanted = self.read(guard.register)
        wanted = ~wanted if guard.negated else wanted
        if mask is not None:
            return wanted & mask
        return None if wanted.all() else wanted

    def _branch(self, frame, branch):
        if branch.target < 0:
            self._finish(frame)
            return
        active = self.active
        if active is None or (frame.mask is not None and (active == frame.mask).all()):
            frame.pc = branch.target
            return
        rest = ~active if frame.mask is None else frame.mask & ~active
        frame.pc = branch.meet
        for pc, mask in ((branch.after, rest), (branch.target, active)):
            if pc != branch.meet:
                self.frames.append(Frame(pc, branch.meet, mask))
        self.wave.counters.divergences += 1

    def _finish(self, frame):
        """The active threads are done."""
        if self.active is None:
            self._check_end(np.arange(self.size))
            self.frames.clear()
            return
        for other in self.frames:
            other.mask = ~self.active if other.mask is None else other.mask & ~self.active
        frame.pc += 1  # for those that the guard left
        left = np.zeros(self.size, np.bool_)
        for other in self.frames:
            left |= other.mask.reshape(-1, LANES).any(1)
        self._check_end(np.flatnonzero(~left))
        if not left.any():
            self.frames.clear()
        elif not left.all():
            self._become(self.select(np.flatnonzero(left)))
        self._drop_empty()

    def _check_end(self, warps):
        if len(warps) == 0:
            return
        if any(copy.touches(self, warps) for group in (*self.copies, self.open_copies) for copy in group):
            raise PTXError("a warp ends while its cp.async copies are in flight")
        if self.products or self.open_products:
            raise PTXError("a warp ends while its wgmma products are in flight")
        self.wave.end(self.rows[warps], self.warps[warps])

    # --- splitting and joining ----------------------------------------------------------------------------------------

    def leave_others_behind(self):
        """Before the active warps may have to wait: the others become a group of their own."""
        if self.active is None:
            return
        warps = self.active.reshape(-1, LANES).any(1)
        if warps.all():
            return
        self.wave.ready.append(self.select(np.flatnonzero(~warps)))
        active = self.active[np.repeat(warps, LANES)]
        self._become(self.select(np.flatnonzero(warps)))
        self.active = None if active.all() else active

    def select(self, warps: np.ndarray) -> "Group":
        """A group of these warps of this one (numbers ``[m]``), with all that is theirs."""
        other = Group.__new__(Group)
        other.wave, other.program, other.kind = self.wave, self.program, self.kind
        other.rows, other.warps = self.rows[warps], self.warps[warps]
        lanes = (warps[:, None] * LANES + np.arange(LANES)).reshape(-1)
        other.registers = [None if value is None else value[lanes] for value in self.registers]
        other.frames = [Frame(f.pc, f.until, None if f.mask is None else f.mask[lanes]) for f in self.frames]
        other.active, other.blocked, other.tried = None, None, self.tried
        other.copies = [[copy.select(lanes) for copy in group] for group in self.copies]
        other.open_copies = [copy.select(lanes) for copy in self.open_copies]
        other.products = [[product.select(warps) for product in group] for group in self.products]
        other.open_products = [product.select(warps) for product in self.open_products]
        other.accumulators = {registers: sums[:, lanes] for registers, sums in self.accumulators.items()}
        other.flying = self.flying
        other._lay_out()
        other._drop_empty()
        return other

    def _drop_empty(self):
        self.frames = [f for f in self.frames if f.mask is None or f.mask.any()]
        for frame in self.frames:
            if frame.mask is not None and frame.mask.all():
                frame.mask = None

    def _become(self, other: "Group"):
        blocked = self.blocked
        self.__dict__.update(other.__dict__)
        self.blocked = blocked

    def joins(self, other: "Group") -> bool:
        """Whether the two do the same from here on and hold nothing that cannot be put together."""
        for group in (self, other):
            if len(group.frames) != 1 or group.frames[0].mask is not None:
                return False
            if group.copies or group.open_copies or group.products or group.open_products:
                return False
        return self.kind == other.kind and self.frames[0].pc == other.frames[0].pc

    def join(self, other: "Group") -> None:
        for i, (mine, theirs) in enumerate(zip(self.registers, other.registers, strict=True)):
            if mine is None and theirs is None:
                continue
            mine = self.poisoned(i) if mine is None else mine
            theirs = other.poisoned(i) if theirs is None else theirs
            self.registers[i] = np.concatenate((mine, theirs))
        self.rows, self.warps = np.concatenate((self.rows, other.rows)), np.concatenate((self.warps, other.warps))
        self._lay_out()
