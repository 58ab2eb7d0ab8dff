"""Measures a network, and predicts what half precision and rounding to 8 bits do to it."""

from typing import TYPE_CHECKING

from nmlightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from nmlightning.probe.directions import probe_int8 as probe_int8
    from nmlightning.probe.inference import probe_inference as probe_inference
    from nmlightning.probe.probe import probe_norms as probe_norms

__getattr__, __dir__, __all__ = lazy_exports(__name__)
