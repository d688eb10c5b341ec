"""`dexkernels.verify`: proof, on the user's own GPU, that the kernels are right, and which backend is fastest there.

`run.verify` asks a process of its own (`worker`) for one step after the other: `cases` compares an operator with
float64, `timing` times it. What it learns is a `record.Record`, kept by the `identity` of GPU and software; from it
`choice` tells `dexkernels.ops.backends` what to use when no backend is asked for.
"""
