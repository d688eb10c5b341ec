"""Modules for all other packages; nothing here imports another part of ``dex``.

``atomic`` files, ``csv_lines``, ``random`` numbers, ``ranks``, ``exits`` (exit codes and signals), ``units`` (durations
and bytes), ``fields`` (dataclasses from YAML), ``shapes`` (image sizes), ``formats`` of image files, ``faults`` (errors
of image files), ``bombs`` (pictures that are too slow to decode).
"""
