"""`python -m cs_lm plot`: draws one run, or several beside each other, as a PNG or SVG file."""

from collections.abc import Sequence
from dataclasses import dataclass

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._outputs import PLOT, output_problems
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import validate_run
from cs_lm.errors import Problem, UserError
from cs_lm.training.plots import AGAINST, SHOWN, plot_runs
from cs_lm.training.run_dir import RunFolder


@dataclass(frozen=True)
class PlotConfig:
    out_dir: tuple[str, ...] = setting((), "folders of runs; required")
    against: str = setting("step", "the lower axis", choices=AGAINST)
    show: str = setting("loss", "what is drawn", choices=SHOWN)
    plot_path: str | None = setting(
        None,
        "where the plot goes, .png or .svg; default: in the folder of the run, named after what it "
        "shows; required with several runs",
        flag="--png_path",
    )

    def validate(self) -> list[Problem]:
        found = validate_run(self.out_dir)
        if self.plot_path is None and len(self.out_dir) > 1:
            need = "with several runs; name a file"
            found.append(Problem("--plot_path", "is missing", need))
        return found + output_problems("--plot_path", self.plot_path, PLOT)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(PlotConfig, "python -m cs_lm plot", __doc__, argv)
    folders = [RunFolder(path) for path in config.out_dir]
    names = [folder.path.resolve() for folder in folders]
    if len(set(names)) < len(names):
        raise UserError("--out_dir: names a run twice; name each once")
    for folder in folders:
        folder.require_log()
    path = config.plot_path or folders[0].plot_of(config.show, config.against)
    print(plot_runs([folder.metrics for folder in folders], path, config.against, config.show))
    return 0
