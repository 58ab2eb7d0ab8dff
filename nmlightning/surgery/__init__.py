"""Swaps the norms of a model that exists, notes that as a recipe, and fuses what follows them."""

from typing import TYPE_CHECKING

from nmlightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from nmlightning.surgery.checkpoints import load_from_checkpoint as load_from_checkpoint
    from nmlightning.surgery.checkpoints import swap_like as swap_like
    from nmlightning.surgery.swap import SwapReport as SwapReport
    from nmlightning.surgery.swap import swap_norms as swap_norms

__getattr__, __dir__, __all__ = lazy_exports(__name__)
