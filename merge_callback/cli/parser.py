"""How the command reads its arguments, and what it says of wrong ones."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line, which names the help, instead of listing all options first."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit status 2."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells more\n")
