"""`python -m cs_lm plot`: draws the losses of a run as a PNG file."""

from collections.abc import Sequence
from dataclasses import dataclass

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.errors import Problem
from cs_lm.training.plots import AGAINST, SHOWN, plot_losses
from cs_lm.training.run_dir import RunFolder


@dataclass(frozen=True)
class PlotConfig:
    out_dir: str = setting("", "folder of the run; required")
    against: str = setting("step", "the lower axis", choices=AGAINST)
    show: str = setting("loss", "what is drawn", choices=SHOWN)
    png_path: str | None = setting(
        None, "where the plot goes; default: in the folder, named after what it shows"
    )

    def validate(self) -> list[Problem]:
        found = (
            []
            if self.out_dir
            else [Problem("--out_dir", "is missing", fix="name the folder of a run")]
        )
        if self.png_path is not None and not self.png_path.endswith(".png"):
            found.append(
                Problem("--png_path", f"got {self.png_path!r}", "a name that ends in .png")
            )
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(PlotConfig, "python -m cs_lm plot", __doc__, argv)
    folder = RunFolder(config.out_dir)
    path = config.png_path or folder.plot_of(config.show, config.against)
    print(plot_losses(folder.metrics, path, config.against, config.show))
    return 0
