"""The one private touch of LightningCLI, tested in tests/test_cli.py."""

from pytorch_lightning.cli import LightningCLI


class ExplicitOptionsWin(LightningCLI):
    """LightningCLI that leaves the options as they were parsed.

    Lightning 2.6 overwrites them with a checkpoint's `hyper_parameters` after parsing, so that an
    option on the command line has no effect with `--ckpt_path`. `nm` parses the checkpoint's first.
    """

    def _parse_ckpt_path(self) -> None:
        pass
