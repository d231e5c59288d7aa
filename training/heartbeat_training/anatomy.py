"""The phantom's anatomies, which a session moves too: they live in the runtime."""

from heartbeat_fast.anatomy import Anatomy as Anatomy
from heartbeat_fast.anatomy import sample_anatomy as sample_anatomy
