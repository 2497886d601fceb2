"""The bundled model through the whole method: what goes in comes back, and the parts do what the paper says."""

from __future__ import annotations
