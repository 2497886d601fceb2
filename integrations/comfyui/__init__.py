"""Nodes for ComfyUI that morph between pictures."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
