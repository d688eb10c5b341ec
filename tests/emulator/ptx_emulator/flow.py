"""What control flow alone shows: wgmma without a fence, and registers that nothing can have written.

Neither depends on data, so both are found once a kernel; the instruction complains when it is executed.
"""

from . import ptx


def _forward(kernel, entering, step):
    """The state before every instruction: the union over all ways to it, from ``entering`` at the kernel's start."""
    starts, after = ptx.blocks(kernel.instructions)
    states = [0] * len(starts)
    states[0] = entering
    before = {}
    waiting, seen = [0], set()
    while waiting:
        block = waiting.pop()
        state = states[block]
        for i in range(starts[block], starts[block + 1]):
            before[i] = state
            state = step(i, state)
        for successor in after[block]:
            if successor < len(starts) - 1 and (
                state | states[successor] != states[successor] or successor not in seen
            ):
                seen.add(successor)
                states[successor] |= state
                waiting.append(successor)
    return before


def missing_fences(kernel: ptx.Kernel) -> dict[int, str]:
    """Number of every wgmma without its ``wgmma.fence`` -> a register that was touched since the last one.

    Between a wgmma and any other instruction that touches its sums, or its A in registers, there must be a fence on
    every way, and one before the first wgmma. Products that add to the same sums need none between them.
    """
    instructions = kernel.instructions
    products = {i: _used(ins) for i, ins in enumerate(instructions) if ins.parts[:2] == ("wgmma", "mma_async")}
    if not products:
        return {}
    watched = set().union(*products.values())
    touches = [_bits(set(ptx.registers(ins.operands)) & watched) for ins in instructions]

    def step(i, state):
        if instructions[i].parts[:2] == ("wgmma", "fence"):
            return 0
        return state if instructions[i].parts[0] == "wgmma" else state | touches[i]

    found = {}
    for i, state in _forward(kernel, _bits(watched), step).items():
        bad = state & touches[i] if i in products else 0
        if bad:
            found[i] = kernel.register_names[bad.bit_length() - 1]
    return found


def never_written(kernel: ptx.Kernel) -> dict[int, str]:
    """Number of every instruction that reads a register no instruction before it can have written -> the register.

    Lanes that a guard left out hold poison instead: compilers read those, and drop what comes of it.
    """
    instructions = kernel.instructions
    written = [_bits(_results(ins)) for ins in instructions]
    found = {}
    for i, state in _forward(kernel, 0, lambda i, state: state | written[i]).items():
        ins = instructions[i]
        read = set(ptx.registers(ins.operands[_num_results(ins) :])) | ({ins.guard.register} if ins.guard else set())
        bad = _bits(read) & ~state
        if bad:
            found[i] = kernel.register_names[bad.bit_length() - 1]
    return found


NO_RESULT = {
    "st",
    "bra",
    "ret",
    "exit",
    "bar",
    "barrier",
    "fence",
    "membar",
    "cp",
    "stmatrix",
    "red",
    "trap",
    "prefetch",
}
NO_RESULT |= {"setmaxnreg", "griddepcontrol", "nanosleep"}


def _num_results(ins):
    if ins.parts[0] in NO_RESULT or (ins.parts[0] == "mbarrier" and ins.parts[1] in ("init", "inval", "expect_tx")):
        return 0
    return 0 if ins.parts[:2] == ("wgmma", "fence") else 1


def _results(ins):
    return set(ptx.registers(ins.operands[: _num_results(ins)]))


def _used(ins):
    sums, left = ins.operands[:2]
    return set(ptx.registers((sums, left) if isinstance(left, ptx.Vector) else (sums,)))


def _bits(registers):
    bits = 0
    for register in registers:
        bits |= 1 << register
    return bits
