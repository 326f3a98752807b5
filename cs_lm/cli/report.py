"""`python -m cs_lm report`: one self-contained HTML page of a run.

It has curves with values under the pointer, samples through time, settings, environment and
faults, and opens from a file, without network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._outputs import PAGE, output_problems
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import validate_run
from cs_lm.errors import Problem
from cs_lm.reports.run_report import run_report
from cs_lm.storage.atomic import atomic_write
from cs_lm.training.metrics_log import read_metrics
from cs_lm.training.run_dir import RunFolder


@dataclass(frozen=True)
class ReportConfig:
    out_dir: str = setting("", "folder of the run; required")
    html_path: str | None = setting(None, "where the page goes; default: report.html in the folder")

    def validate(self) -> list[Problem]:
        return validate_run(self.out_dir) + output_problems("--html_path", self.html_path, PAGE)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ReportConfig, "python -m cs_lm report", __doc__, argv)
    folder = RunFolder(config.out_dir)
    path = config.html_path or str(folder.path / "report.html")
    folder.require_log()
    text = run_report(folder.path.resolve().name, read_metrics(folder.metrics))
    atomic_write(path, text.encode("utf-8"))
    print(path)
    return 0
