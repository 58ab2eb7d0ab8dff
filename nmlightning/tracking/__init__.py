"""Norms, step sizes and rotations of weights, measured and recorded in any training loop."""

from nmlightning.tracking.norm_tracker import NormTracker as NormTracker
from nmlightning.tracking.norm_tracker import track_norms as track_norms
