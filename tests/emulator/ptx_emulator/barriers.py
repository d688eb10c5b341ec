"""Barriers of the warps of a block, mbarriers, and the fences that order the two proxies."""

import numpy as np

from .access import address_operand
from .group import LANES
from .program import instruction
from .ptx import Immediate, PTXError, Sink

# --- bar.sync, bar.arrive ---------------------------------------------------------------------------------------------


class Barrier:
    """One of the numbered barriers, in every block of a wave."""

    def __init__(self, number, wave):
        self.number, self.wave = number, wave
        rows = len(wave.blocks)
        self.arrived = np.zeros((rows, wave.warps), np.bool_)
        self.phase = np.zeros(rows, np.int64)

    def arrive(self, rows, warps, needed: int) -> None:
        if self.arrived[rows, warps].any():
            raise PTXError(f"a warp arrives twice at barrier {self.number}")
        self.arrived[rows, warps] = True
        touched = np.unique(rows)
        counts = self.arrived[touched].sum(1)
        if (counts > needed).any():
            raise PTXError(f"barrier {self.number} expects {needed} warps, more came")
        done = touched[counts == needed]
        if len(done) == 0:
            return
        if needed == self.wave.warps:
            self.wave.clocks.synchronize_blocks(done)
        else:
            for row in done:
                self.wave.clocks.synchronize(row, np.flatnonzero(self.arrived[row]))
        self.arrived[done] = False
        self.phase[done] += 1


class BarrierWait:
    def __init__(self, barrier, phases):
        self.barrier, self.phases = barrier, phases

    def ready(self, group) -> np.ndarray:
        return self.barrier.phase[group.rows] > self.phases

    def select(self, warps) -> "BarrierWait":
        return BarrierWait(self.barrier, self.phases[warps])

    def __str__(self):
        return f"bar.sync {self.barrier.number}"


def _waits(ins):
    return "arrive" not in ins.parts


@instruction("bar", "barrier", waits=_waits)
def barrier(ins, program):
    mode = next((part for part in ins.parts[1:] if part not in ("cta", "aligned")), "sync")
    if mode == "warp":
        return lambda g: True  # lanes of a warp are taken to be in order
    if mode not in ("sync", "arrive"):
        raise PTXError("unknown opcode")
    operands = [program.source(operand, "u32") for operand in ins.operands]
    if not operands:
        operands = [program.source(Immediate(0), "u32")]

    def run(g):
        if isinstance(g.blocked, BarrierWait):
            g.blocked = None  # it has waited
            return True
        g.whole_warps("bar.sync")
        number = uniform(operands[0](g), g, "the number of a barrier")
        needed = g.wave.warps
        if len(operands) > 1:
            threads = uniform(operands[1](g), g, "the threads of a barrier")
            if threads % LANES:
                raise PTXError(f"barrier {number}: expected a multiple of 32 threads, got {threads}")
            needed = threads // LANES
        one = g.wave.barrier(number)
        phases = one.phase[g.rows].copy()
        warps = g.active_warps()
        one.arrive(g.rows[warps], g.warps[warps], needed)
        if mode == "arrive" or (one.phase[g.rows] > phases).all():
            return True
        g.blocked = BarrierWait(one, phases)
        return False

    return run


def uniform(value, g, what) -> int:
    """The one value that all active threads have."""
    if value.ndim:
        value = value if g.active is None else value[g.active]
        if (value != value[0]).any():
            raise PTXError(f"{what} differs between threads that run side by side")
        value = value[0]
    return int(value)


# --- mbarriers --------------------------------------------------------------------------------------------------------


class MBarrier:
    """One mbarrier object of one block. Its agent stands for the asynchronous copies that report to it."""

    def __init__(self, offset, count, agent, who_made, made_at):
        self.offset, self.count, self.agent = offset, count, agent
        self.made_by, self.made_at = who_made, made_at
        self.pending, self.bytes, self.phase = count, 0, 0
        self.coming, self.known = None, None  # what arrivals of this phase, and of the last, knew
        self.used = {}  # warp -> when it last arrived or waited

    def learn(self, known):
        self.coming = known if self.coming is None else np.maximum(self.coming, known)

    def check(self, clocks):
        """Completes the phase when everything has come."""
        if self.pending < 0:
            raise PTXError(f"mbarrier {self.offset:#x}: more arrivals than the {self.count} of its phase")
        if self.pending or self.bytes:
            return
        self.known = np.zeros((2, clocks.seen.shape[2]), np.int32) if self.coming is None else self.coming
        self.known[0, self.agent] = clocks.mark()
        self.coming, self.pending = None, self.count
        self.phase += 1


class MBarrierWait:
    def __init__(self, offsets, parities):
        self.offsets, self.parities = offsets, parities

    def ready(self, group) -> np.ndarray:
        found = zip(group.rows, self.offsets, self.parities, strict=True)
        return np.array([group.wave.mbarrier(row, at).phase % 2 != parity for row, at, parity in found])

    def select(self, warps) -> "MBarrierWait":
        return MBarrierWait(self.offsets[warps], self.parities[warps])

    def __str__(self):
        return f"mbarriers {', '.join(sorted({hex(at) for at in self.offsets}))}"


def _mbarrier_waits(ins):
    return ins.parts[1] in ("try_wait",)


@instruction("mbarrier", waits=_mbarrier_waits)
def mbarrier(ins, program):
    build = {"init": _init, "inval": _invalidate, "arrive": _arrive, "try_wait": _wait, "test_wait": _wait}
    build |= {"expect_tx": _expect}
    if ins.parts[1] not in build:
        raise PTXError("unknown opcode")
    return build[ins.parts[1]](ins, program)


def _init(ins, program):
    address, count = address_operand(ins.operands[0], program, "u32"), program.source(ins.operands[1], "u32")

    def run(g):
        lanes, who = g.lanes()
        at, counts = _per_lane(g, address(g), lanes), _per_lane(g, count(g), lanes)
        _own(g, at, who)
        for row, warp, offset, n in zip(who.row, who.warp, at, counts, strict=True):
            g.wave.make_mbarrier(int(row), int(warp), int(offset), int(n))

    return run


def _invalidate(ins, program):
    address = address_operand(ins.operands[0], program, "u32")

    def run(g):
        lanes, who = g.lanes()
        at = _per_lane(g, address(g), lanes)
        _own(g, at, who)
        for row, warp, offset in zip(who.row, who.warp, at, strict=True):
            g.wave.drop_mbarrier(int(row), int(warp), int(offset))

    return run


def _own(g, at, who):
    """Making and ending an mbarrier writes its eight bytes."""
    shared = g.wave.shared
    shared.check_bounds(at, 8)
    granules = shared.granules(who.row, at, 8)
    shared.check_write(granules, who)
    shared.note_write(granules, who)


def _arrive(ins, program):
    _no_state(ins)
    address = address_operand(ins.operands[1], program, "u32")
    expects = "expect_tx" in ins.parts
    number = program.source(ins.operands[2], "u32") if len(ins.operands) > 2 else None

    def run(g):
        lanes, who = g.lanes()
        at = _per_lane(g, address(g), lanes)
        more = np.ones(len(at), np.int64) if number is None else _per_lane(g, number(g), lanes)
        known = {}
        for row, warp, offset, n in zip(who.row, who.warp, at, more, strict=True):
            one = g.wave.mbarrier_for(int(row), int(warp), int(offset))
            if (row, warp) not in known:
                known[row, warp] = g.wave.clocks.release(row, warp)
            one.learn(known[row, warp])
            one.pending -= 1 if expects else int(n)
            one.bytes += int(n) if expects else 0
            one.check(g.wave.clocks)

    return run


def _expect(ins, program):
    address, number = address_operand(ins.operands[0], program, "u32"), program.source(ins.operands[1], "u32")

    def run(g):
        lanes, who = g.lanes()
        at, more = _per_lane(g, address(g), lanes), _per_lane(g, number(g), lanes)
        for row, warp, offset, n in zip(who.row, who.warp, at, more, strict=True):
            g.wave.mbarrier_for(int(row), int(warp), int(offset)).bytes += int(n)

    return run


def _no_state(ins):
    if not isinstance(ins.operands[0], Sink):
        raise PTXError("the state that mbarrier.arrive returns is not known")


def _wait(ins, program):
    if "parity" not in ins.parts:
        raise PTXError("only waits by parity are known")
    put = program.destination(ins.operands[0], "pred")
    address, parity = address_operand(ins.operands[1], program, "u32"), program.source(ins.operands[2], "u32")
    may_wait = ins.parts[1] == "try_wait"

    def run(g):
        warps = g.active_warps()
        offsets, parities = _per_warp(g, address(g), warps), _per_warp(g, parity(g), warps) & 1
        done, found = np.zeros(g.size, np.bool_), []
        for i, warp in enumerate(warps):
            one = g.wave.mbarrier_for(int(g.rows[warp]), int(g.warps[warp]), int(offsets[i]))
            done[warp] = one.phase % 2 != parities[i]
            found.append(one)
        if may_wait and not done[warps].all() and g.tried != ins.line:
            # It may give up early, which the loop around it has to bear.
            g.tried, done[:] = ins.line, False
        elif may_wait and not done[warps].all():
            whole_offsets, whole_parities = np.zeros(g.size, np.int64), np.zeros(g.size, np.int64)
            whole_offsets[warps], whole_parities[warps] = offsets, parities
            g.blocked = MBarrierWait(whole_offsets, whole_parities)
            return False
        else:
            g.blocked, g.tried = None, None
        for warp, one in zip(warps, found, strict=True):
            if done[warp] and one.known is not None:
                g.wave.clocks.acquire(int(g.rows[warp]), int(g.warps[warp]), one.known)
        put(g, np.repeat(done, LANES))
        return True

    return run


def _per_lane(g, value, lanes):
    value = np.broadcast_to(value, g.threads).astype(np.int64)
    return value if lanes is None else value[lanes]


def _per_warp(g, value, warps):
    """The value of the first active lane of each of these warps; the others must have the same."""
    value = np.broadcast_to(value, g.threads).astype(np.int64).reshape(-1, LANES)[warps]
    active = np.ones_like(value, np.bool_) if g.active is None else g.active.reshape(-1, LANES)[warps]
    first = np.take_along_axis(value, active.argmax(1)[:, None], 1)
    if ((value != first) & active).any():
        raise PTXError("lanes of one warp wait for different mbarriers or phases")
    return first[:, 0]


# --- fences -----------------------------------------------------------------------------------------------------------


@instruction("fence")
def fence(ins, program):
    if "proxy" not in ins.parts:
        return lambda g: None

    def run(g):
        warps = g.active_warps()
        g.wave.clocks.fence_proxy(g.rows[warps], g.warps[warps])

    return run
