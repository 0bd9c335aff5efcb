from . import saved as saved
from .folder import resumed as resumed
from .job import run as run
from .settings import Settings as Settings
from .settings import as_written as as_written
from .settings import option_kinds as option_kinds
from .settings import read_toml as read_toml
from .stages import Progress as Progress
