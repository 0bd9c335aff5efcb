from . import saved as saved
from .folder import resumed as resumed
from .main_job import run as run
from .options import as_written as as_written
from .options import read_toml as read_toml
from .settings import Settings as Settings
from .settings import option_kinds as option_kinds
from .stages import Progress as Progress
