"""What every other package may use; nothing here imports another part of `dex`.

``atomic`` files, ``random`` numbers, ``ranks``, ``exits`` (exit codes and signals), ``units`` (durations and bytes).
"""
