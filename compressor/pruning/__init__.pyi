from .one_shot import prune as prune
from .pruner import Pruner as Pruner
