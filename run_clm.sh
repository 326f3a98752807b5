#!/usr/bin/env bash
# Sets up what is missing, then runs:
#
#   bash run_clm.sh            a small model on the Python language manual, about 3 minutes of training on 2 cores
#   bash run_clm.sh characters --corpus_path my_text.txt
#                              a small model that reads bytes, 2,000 steps: about 2 minutes on 2 cores
#   bash run_clm.sh lecture    the course's full configuration on data/lecture.txt, for a GPU
#   bash run_clm.sh distributed
#                              the small model on two processes that share each batch (docs/many-machines.md)
#   bash run_clm.sh rlhf       from a text to an aligned model on a small task, and a report: about 10 minutes
#   bash run_clm.sh test       the tests
#
# Flags are laid over those below: bash run_clm.sh --seed 1, bash run_clm.sh lecture --seed 1
# Words after `test` go to pytest: bash run_clm.sh test -k tokenizer
#
# PYTHON        the Python to make the environment with (3.11 or newer); default: python3
# CS_LM_VENV    where the virtual environment lies or goes; default: .venv
# CS_LM_PROCESSES  how many processes `distributed` starts; default: 2
# CS_LM_EXTRAS  further extras to test with, such as wandb,mlflow,harness
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv="${CS_LM_VENV:-.venv}"
launcher=() # what starts run_clm.py, if Python alone does not

fail() {
    echo "error: $*" >&2
    exit 2
}

# set_up EXTRAS: the virtual environment with the pinned packages of these extras.
set_up() {
    local stamp="$venv/installed-$1" base="${PYTHON:-python3}"
    cat pyproject.toml constraints.txt | cmp -s - "$stamp" && return
    command -v "$base" >/dev/null || fail "$base: not found; install Python 3.11 or newer, or name one with PYTHON=..."
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$base is $("$base" --version); need Python 3.11 or newer; name one with PYTHON=..."
    echo "setting up $venv with the packages of constraints.txt ..."
    "$base" -m venv "$venv" || fail "$base cannot make a virtual environment; install its venv module"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$1]" || fail "pip could not install the packages"
    cat pyproject.toml constraints.txt >"$stamp"
}

# run ARGUMENTS: this shell becomes Python, so that signals reach it.
run() {
    echo "before other commands: source $venv/bin/activate"
    exec "$venv/bin/python" "$@"
}

# train GIVEN... preset PRESET...: trains with the preset's flags, less those that were given.
train() {
    local given=() preset=() word other skip=no
    while [ "$1" != $'\n'preset ]; do given+=("$1") && shift; done
    shift
    for word in "$@"; do
        if [[ $word == --* ]]; then
            skip=no
            for other in ${given[@]+"${given[@]}"}; do
                case "${other%%=*}" in
                "$word") skip=yes ;;
                --rope_theta) [ "$word" != --theta ] || skip=yes ;;
                --corpus_path) # another text goes by its own name
                    [ "$word" != --corpus_size ] || skip=yes
                    [[ $word != --out_dir || ($mode != default && $mode != distributed) ]] || skip=yes
                    ;;
                --context_length) [ "$word" != --max_seq_length ] || skip=yes ;;
                esac
            done
        fi
        [ $skip = yes ] || preset+=("$word")
    done
    run ${launcher[@]+"${launcher[@]}"} run_clm.py "${preset[@]}" ${given[@]+"${given[@]}"}
}

# The small model of the README.
small=(
    --corpus_size python-manual --vocab_size 2048 --special_tokens '<|endoftext|>'
    --valid_fraction 0.1 --chunk_size 500000 --sampling random
    --d_model 192 --num_heads 6 --d_ff 512 --num_layers 4
    --max_seq_length 256 --seq_length 256 --theta 10000
    --batch_size 16 --grad_accum 1 --num_epochs 10
    --lr 2e-3 --lr_min 2e-5 --warmup_ratio 0.05 --warmfix_ratio 0.9
    --weight_decay 0.5 --betas 0.9 0.95 --eps 1e-8 --max_norm 1.0
    --device auto --dtype float32 --ops fast --seed 0
    --log_interval 10 --eval_interval 40 --eval_tokens 100000
    --save_interval 80 --sample_interval 80 --prompt "The "
)

case "${1:-}" in
"" | -*) mode=default ;;
*) mode="$1" && shift ;;
esac

case "$mode" in
default)
    set_up ui
    train "$@" $'\n'preset "${small[@]}" --out_dir runs/python-manual
    ;;
characters)
    set_up ui
    train "$@" $'\n'preset \
        --vocab_size 256 --special_tokens --valid_fraction 0.1 --sampling epoch \
        --d_model 128 --num_heads 4 --d_ff 320 --num_layers 4 \
        --max_seq_length 64 --seq_length 64 --theta 1000 \
        --batch_size 12 --grad_accum 1 --max_steps 2000 \
        --lr 3e-3 --lr_min 3e-4 --warmup_ratio 0.1 --warmfix_ratio 1.0 \
        --weight_decay 0.2 --betas 0.9 0.95 --eps 1e-8 --max_norm 1.0 \
        --device auto --dtype float32 --ops fast --seed 0 \
        --log_interval 50 --eval_interval 500 --eval_tokens 1000000 \
        --save_interval 500 --sample_interval 1000 --prompt "The " \
        --out_dir runs/characters
    ;;
lecture)
    set_up ui
    train "$@" $'\n'preset \
        --corpus_path data/lecture.txt --corpus_size lecture --vocab_size 32000 \
        --special_tokens '<|endoftext|>' --valid_fraction 0.1 --chunk_size 500000 \
        --d_model 512 --num_heads 8 --d_ff 1344 --num_layers 8 \
        --max_seq_length 512 --seq_length 256 --theta 100000 \
        --batch_size 48 --grad_accum 1 --num_epochs 10 \
        --lr 1e-4 --lr_min 1e-5 --warmup_ratio 0.1 --warmfix_ratio 0.9 \
        --weight_decay 0.01 --betas 0.9 0.95 --eps 1e-8 --max_norm 1.0 \
        --device auto --dtype float32 --ops fast --seed 0 \
        --log_interval 10 --eval_interval 250 --eval_tokens 100000 \
        --save_interval 500 --sample_interval 500 --prompt "The " \
        --out_dir runs/lecture
    ;;
distributed)
    [[ "${CS_LM_PROCESSES:-2}" =~ ^[1-9][0-9]*$ ]] ||
        fail "CS_LM_PROCESSES: got '$CS_LM_PROCESSES', need 1 or more; it is the number of processes"
    set_up ui
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    launcher=(-m torch.distributed.run --standalone --nproc_per_node "${CS_LM_PROCESSES:-2}")
    train "$@" $'\n'preset "${small[@]}" --parallel ddp --out_dir runs/distributed
    ;;
rlhf)
    set_up ui
    run -m cs_lm rlhf "$@"
    ;;
test)
    set_up "ui,test,parity,corpora,serve,scaling${CS_LM_EXTRAS:+,$CS_LM_EXTRAS}"
    # two processes; tests of one xdist_group run one after the other
    exec "$venv/bin/python" -m pytest -n 2 --dist loadgroup "$@"
    ;;
*) fail "got $mode; need default, characters, lecture, distributed, rlhf or test" ;;
esac
