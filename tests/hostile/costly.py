"""Small files that ask for much memory or time, in every format. Built from bytes, since no library would write them.

`files(full)` gives name -> (bytes, outcomes that are right): reasons of refusal, and "images" where it may be read. Of
a format that keeps its data in a file of their own it gives the bytes of both; BESIDE says what the other is called.
"""

import functools

from costly_arrays import avis, mp4s, npys, npzs
from costly_dicom import dicoms
from costly_pictures import bmps, jpgs, others, pngs, tifs
from costly_volumes import mhas, mhds, nhdrs, niftis, nrrds, packed_pairs, pairs, unpacked_niftis

BESIDE = {".mhd": "x.raw", ".nhdr": "x.raw", ".hdr": "x.img", ".hdr.gz": "x.img.gz"}

MAKERS = {
    ".dcm": ("pydicom", dicoms),
    ".nii.gz": ("nibabel", niftis),
    ".nii": ("nibabel", unpacked_niftis),
    ".mha": ("SimpleITK", mhas),
    ".nrrd": ("SimpleITK", nrrds),
    ".mhd": ("SimpleITK", mhds),
    ".nhdr": ("SimpleITK", nhdrs),
    ".hdr": ("nibabel", pairs),
    ".hdr.gz": ("nibabel", packed_pairs),
    ".png": ("PIL", pngs),
    ".jpg": ("PIL", jpgs),
    ".tif": ("PIL", tifs),
    ".bmp": ("PIL", bmps),
    ".jpeg": ("PIL", others),
    ".npy": ("numpy", npys),
    ".npz": ("numpy", npzs),
    ".avi": ("cv2", avis),
    ".mp4": ("cv2", mp4s),
}


@functools.cache
def files(full: bool) -> dict[tuple[str, str], tuple[bytes | tuple[bytes, bytes], tuple[str, ...]]]:
    """(suffix, name) -> bytes and right outcomes, of the formats whose libraries are installed."""
    found = {}
    for suffix, (module, make) in MAKERS.items():
        try:
            __import__(module)
        except ImportError:
            continue
        found |= {(suffix, name): (data, outcomes) for name, data, outcomes in make(full)}
    return found
