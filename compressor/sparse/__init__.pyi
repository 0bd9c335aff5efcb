from .allocation import ALLOCATIONS as ALLOCATIONS
from .regrowth import METHODS as METHODS
from .training import GRANULARITIES as GRANULARITIES
from .training import SparseTraining as SparseTraining
