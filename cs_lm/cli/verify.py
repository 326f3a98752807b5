"""`python -m cs_lm verify`: reads token stores and runs completely, and reports damaged files."""

from collections.abc import Sequence
from dataclasses import dataclass

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.data.token_store import MemmapManager
from cs_lm.errors import Problem, UserError
from cs_lm.training.run_dir import RunFolder


@dataclass(frozen=True)
class VerifyConfig:
    store: tuple[str, ...] = setting((), "folders of token stores; one of the two is required")
    out_dir: tuple[str, ...] = setting((), "folders of runs")

    def validate(self) -> list[Problem]:
        if self.store or self.out_dir:
            return []
        return [Problem("--store, --out_dir", "got none", fix="name what to verify")]


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(VerifyConfig, "python -m cs_lm verify", __doc__, argv)
    wrong = []
    for folder in config.store:
        try:
            store = MemmapManager(folder)
            store.verify()
            print(f"{folder}: {len(store):,} tokens in {len(store.files)} files, as written")
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    for folder in config.out_dir:
        try:
            found = RunFolder(folder).verify()
            wrong += found
            if not found:
                print(f"{folder}: checkpoints and tokenizer are as written, the log can be read")
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(*wrong)
    return 0
