from .allocation import ALLOCATIONS as ALLOCATIONS
from .config import Granularity as Granularity
from .config import MaskAllocation as MaskAllocation
from .config import Method as Method
from .config import SparseConfig as SparseConfig
from .regrowth import METHODS as METHODS
from .training import SparseTraining as SparseTraining
