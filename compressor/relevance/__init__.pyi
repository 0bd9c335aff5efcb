from .after_training import gate_relevance as gate_relevance
from .config import EstimatorName as EstimatorName
from .config import Exclusion as Exclusion
from .config import RelevanceConfig as RelevanceConfig
from .estimators import ESTIMATORS as ESTIMATORS
from .observation import per_sample as per_sample
from .relevance import Relevance as Relevance
