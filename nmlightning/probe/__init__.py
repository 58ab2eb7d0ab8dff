"""Measures the norm layers of a network, and predicts what half precision does to them."""

from typing import TYPE_CHECKING

from nmlightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from nmlightning.probe.probe import probe_norms as probe_norms

__getattr__, __dir__, __all__ = lazy_exports(__name__)
