"""``dexkernels.verify`` proves that the kernels are correct on the user's GPU and measures which backend is fastest.

``run.verify`` sends one step after another to a separate process, ``worker``: ``cases`` compares an operator with
float64, ``timing`` times it. The result is a ``record.Record`` in a file for this ``identity`` of GPU and software.
``choice`` reads it to tell ``dexkernels.ops.backends`` the default backends.
"""
