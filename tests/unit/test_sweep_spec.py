"""A sweep's file becomes the same runs each time, and mistakes in it are named."""

import json

import pytest

from cs_lm.cli.train import config_of
from cs_lm.errors import UserError
from cs_lm.models.stats import flops_per_token, num_parameters
from cs_lm.scaling.sweep import planned_runs, read_spec, spec_of

SHAPE = "d_ff = 64\nnum_layers = 1\nmax_seq_length = 16\nseq_length = 16\nvocab_size = 300\n"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text " * 500, encoding="utf-8")


def runs_of(text, path="x.toml"):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return planned_runs(read_spec(path), config_of)


def test_a_grid():
    runs = runs_of(
        f'[flags]\ncorpus_path = "a.txt"\n{SHAPE}num_heads = 2\ntokens = 5_000\nbatch_size = 4\n'
        "[vary]\nlr = [1e-3, 1e-2]\nshape = [{d_model = 16}, {d_model = 32, num_heads = 4}]\n"
    )
    assert [run.name for run in runs] == [
        "000-lr=0.001,shape=16", "001-lr=0.001,shape=32x4", "002-lr=0.01,shape=16",
        "003-lr=0.01,shape=32x4",
    ]  # fmt: skip
    last = runs[-1].config
    assert (last.optim.lr, last.model.d_model, last.model.num_heads) == (0.01, 32, 4)
    assert last.max_steps == round(5000 / 64)
    assert last.num_steps(500) == last.max_steps  # however short the text is


def test_random_settings_are_those_of_the_seed():
    text = (
        f'[flags]\ncorpus_path = "a.txt"\n{SHAPE}\n[random]\ncount = 30\nseed = 3\n[vary]\n'
        "lr = {low = 1e-4, high = 1e-2, log = true}\nbatch_size = {low = 2, high = 9}\n"
        "num_heads = [1, 2]\nd_model = [16]\n"
    )
    runs = runs_of(text)
    assert [run.words for run in runs] == [run.words for run in runs_of(text)]
    rates = [run.config.optim.lr for run in runs]
    assert len(set(rates)) == 30 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 8 < sum(rate < 1e-3 for rate in rates) < 22  # even on a logarithmic axis
    sizes = [run.settings["batch_size"] for run in runs]
    assert {type(size) for size in sizes} == {int} and {*range(3, 9)} <= {*sizes} <= {*range(2, 10)}
    assert runs_of(text.replace("seed = 3", "seed = 4"))[0].words != runs[0].words


def test_equal_compute():
    runs = runs_of(
        f'[flags]\ncorpus_path = "a.txt"\n{SHAPE}num_heads = 1\nbatch_size = 2\n'
        "[vary]\nd_model = [16, 64]\n"
        "[isoflop]\nbudgets = [1e9, 1e10]\ntokens_per_parameter = [0.1, 10]\n"
    )
    assert runs
    for run in runs:
        tokens = run.config.max_steps * run.config.tokens_per_step
        flops = flops_per_token(run.config.model, 16) * tokens
        assert flops == pytest.approx(run.settings["budget"], rel=0.05)
        assert 0.09 <= tokens / num_parameters(run.config.model) <= 10.1
    assert {run.settings["budget"] for run in runs} == {1e9, 1e10}


def test_json_is_the_same():
    content = {"flags": {"corpus_path": "a.txt"}, "vary": {"lr": [1e-3], "compile": [True, False]}}
    runs = runs_of(json.dumps(content), "x.json")
    assert [run.config.compile for run in runs] == [True, False]
    assert spec_of(spec_of(content).as_json()) == spec_of(content)


BASE = '[flags]\ncorpus_path = "a.txt"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[vary", "cannot be read"),
        (BASE, "varies nothing"),
        ("[vray]\n", r"unknown part \[vray\]"),
        (BASE + "[vary]\nlr = 3\n", "lr: got 3, need a list"),
        (BASE + "[vary]\nlr = []\n", "need a list of values"),
        (BASE + "[vary]\nlr = [1e-3, 1e-3]\n", "each value once"),
        (BASE + "[vary]\nlr = {low = 1, high = 2}\n", r"a range is for \[random\]"),
        (BASE + "[random]\ncount = 2\n[vary]\nlr = {low = 2, high = 1}\n", "need low and high"),
        (BASE + "[random]\ncount = 0\n[vary]\nlr = [1]\n", "count: got 0, need 1 to"),
        (BASE + "[random]\nnumber = 3\n[vary]\nlr = [1]\n", "number: unknown"),
        (BASE + '[vary]\nout_dir = ["a"]\n', "out_dir: the sweep sets it"),
        (BASE + "[vary]\nlr = [1e-3]\n[isoflop]\nbudgets = [-1]\n", "budgets: got"),
        (BASE + "[vary]\ntokens = [5]\n[isoflop]\nbudgets = [1e9]\n", "the compute sets it"),
        (BASE + "[vary]\nnum_epochs = [5]\n[isoflop]\nbudgets = [1e9]\n", "the compute sets it"),
        (BASE + "[vary]\ntokens = [5]\nmax_steps = [3]\n", "tokens and max_steps say the same"),
        (BASE + "[vary]\nlr = [2024-01-01]\n", "lr: got 2024-01-01, need numbers"),
        (BASE + "[vary]\nlr = [[1e-3]]\n", "need numbers, texts"),
        (BASE + "[vary]\nstate = [{lr = 1e-3}]\n", "state: is no name of a setting"),
        (BASE + '[vary]\n"../x" = [{lr = 1e-3}]\n', "is no name of a setting"),
        (BASE + "[random]\ncount = 2\n[vary]\nlr = {low = 1, high = 2, log = 'no'}\n", "log ="),
        ('[vary]\nresume = [true]\n', "resume: the sweep sets it"),
        (BASE + "[vary]\nlr = [1e-3, 7]\nl_r = [1]\n", "--l_r: unknown flag; did you mean --lr"),
        (BASE + "[vary]\nlr = [1e-3, -1]\n", "lr=-1: --lr: got -1.0"),
        (BASE + "[vary]\nlr = [1e-3]\n[isoflop]\nbudgets = [1e5]\n", "no model makes 20 updates"),
        (f"{BASE}[vary]\nseed = {list(range(200))}\nlr = {list(range(1, 100))}\n",
         "makes 19,800 runs, need at most"),
    ],
)  # fmt: skip
def test_mistakes(text, words):
    with pytest.raises(UserError, match=words):
        runs_of(text)
