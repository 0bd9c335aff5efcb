from .compensation import COMPENSATIONS as COMPENSATIONS
from .compensation import input_means as input_means
from .cutting import cut as cut
from .cutting import removed_channels as removed_channels
from .masks import silence as silence
from .transaction import require_alike as require_alike
from .verification import verified_cut as verified_cut
