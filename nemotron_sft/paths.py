"""Where things are, what was typed, and when it started. Light: every command imports it first."""

import sys
import time
from pathlib import Path

TYPED = list(sys.argv)  # the command as it was typed
STARTED = time.time()  # of the process, near enough: this is the first module an entry point imports
ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
USER_CONF = Path.home() / ".config" / "nemotron-sft"  # searched after conf/, see hydra_plugins
