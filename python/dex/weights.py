"""The same as `dex.model.weights`, under its earlier name."""

from dex.model.weights import LoadReport, load_pretrained, read_state_dict, resize_patch_embed, resize_pos_embed

__all__ = ["LoadReport", "load_pretrained", "read_state_dict", "resize_patch_embed", "resize_pos_embed"]
