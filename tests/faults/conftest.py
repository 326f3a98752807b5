import pytest


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """It takes longer than a tiny run."""
    for module in ("reporter",):
        monkeypatch.setattr(f"cs_lm.training.{module}.plotted", lambda *_: "no plot")
