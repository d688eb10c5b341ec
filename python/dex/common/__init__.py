"""What every other package may use; nothing here imports another part of `dex`.

``atomic`` files, ``random`` numbers, ``ranks``, ``exits`` (exit codes and signals), ``units`` (durations and bytes);
``formats`` of image files, ``faults`` (what is wrong with one), ``bombs`` (pictures that would take a decoder long).
"""
