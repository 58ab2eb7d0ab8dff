"""Rules on optimizer steps, parameter groups and schedules."""

from nmlightning.optim.decay import CautiousDecay as CautiousDecay
from nmlightning.optim.decay import CorrectedDecay as CorrectedDecay
from nmlightning.optim.decay import DecaySchedule as DecaySchedule
from nmlightning.optim.decay_equivalent_lr import DecayEquivalentLR as DecayEquivalentLR
from nmlightning.optim.hyperball import Hyperball as Hyperball
from nmlightning.optim.lr_correction import LRCorrection as LRCorrection
from nmlightning.optim.norm_bounds import SpectralCap as SpectralCap
from nmlightning.optim.norm_bounds import UnitNorm as UnitNorm
from nmlightning.optim.norm_schedule import NormSchedule as NormSchedule
from nmlightning.optim.radial_projection import RadialProjection as RadialProjection
from nmlightning.optim.schedules import InverseSquareRootLR as InverseSquareRootLR
from nmlightning.optim.step_hooks import StepRule as StepRule
