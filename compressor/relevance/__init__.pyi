from .estimators import ESTIMATORS as ESTIMATORS
from .observation import per_sample as per_sample
from .relevance import Relevance as Relevance
