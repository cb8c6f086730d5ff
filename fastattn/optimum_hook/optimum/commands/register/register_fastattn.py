"""`optimum-cli export fastattn -m MODEL OUTPUT_DIR`: what `fastattn export` does, under optimum's command.

optimum reads every file of the namespace `optimum.commands.register`. This one is not installed into it:
without optimum it would make a package `optimum` that holds nothing, which transformers and peft take for the
real one. It lies in a folder of fastattn's, and `fastattn-optimum.pth` puts that on the path where optimum is
installed (setup.py).
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from fastattn.cli.export import HELP, add_options


class FastattnExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="fastattn", help=HELP)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        from fastattn.cli.models import MODEL_HELP

        parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=MODEL_HELP)
        parser.add_argument(
            "output_dir", metavar="OUTPUT_DIR", help="folder to write; made where it does not exist"
        )
        add_options(parser)

    def run(self) -> None:
        from fastattn.cli import run_verb
        from fastattn.cli.export import run

        sys.exit(run_verb("export", run, self.args))


REGISTER_COMMANDS = [(FastattnExportCommand, ExportCommand)]
