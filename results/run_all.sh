#!/usr/bin/env bash
# Makes the runs and baselines of this folder again, from the repository's root: bash results/run_all.sh [PATTERN]
# One line a run, one core a run, as many side by side as there are cores; PATTERN (grep's) picks some. What is there is
# skipped (delete its folder first); what was interrupted goes on.
set -euo pipefail
export OMP_NUM_THREADS=1

train() {   # train NAME ARGUMENTS…: one RL run and the files of it that are kept
    local name=$1; shift
    [ -f "results/$name/eval.json" ] && return
    local resume="" begun=$SECONDS
    [ -f "runs/$name/config.json" ] && resume="--resume"
    mkdir -p "runs/$name"
    python train.py "$@" --out "runs/$name" $resume > "runs/$name/log.txt" 2>&1 || { echo "$name failed"; return; }
    mkdir -p "results/$name"
    cp "runs/$name/"{config.json,metrics.jsonl,timing.jsonl,transcripts.jsonl,eval_start.json,eval.json} "results/$name/"
    echo "python train.py $* --out runs/$name" > "results/$name/command.txt"
    # from the command's start to its end, held-out games included; not of a run that was interrupted
    [ -n "$resume" ] || echo "{\"wall_s\": $((SECONDS - begun)), \"cores\": 1}" > "results/$name/wall.json"
    echo "$name done"
}

evaluate() {   # evaluate NAME ARGUMENTS…: one evaluation of something that is not trained
    local name=$1; shift
    [ -f "results/baselines/$name.json" ] && return
    python eval.py "$@" --out "results/baselines/$name.json" > /dev/null
}

runs() {
    local task seed cot_lambda games
    # the main table
    for seed in 1 2 3; do
        for task in blackjack points24 numberline ezpoints; do
            games=1000; [ $task = blackjack ] && games=10000
            echo train $task-seed$seed --task $task --seed $seed --eval-episodes $games
        done
    done
    # without chain of thought
    for seed in 1 2 3; do
        for task in blackjack points24 numberline ezpoints; do
            games=1000; [ $task = blackjack ] && games=10000
            echo train $task-no-cot-seed$seed --task $task --no-cot --seed $seed --eval-episodes $games
        done
    done
    # the weight of the thoughts; 0.5 is in the main table
    for seed in 1 2 3; do
        for cot_lambda in 0 1 0.1 0.9 0.3 0.7; do
            echo train numberline-lambda-$cot_lambda-seed$seed --task numberline --cot-lambda $cot_lambda --seed $seed
        done
    done
    for cot_lambda in 0.1 1; do
        echo train blackjack-lambda-$cot_lambda-seed1 --task blackjack --cot-lambda $cot_lambda --eval-episodes 10000
    done
    # every token its own ratio
    for seed in 1 2 3; do
        for task in numberline ezpoints; do
            echo train $task-token-seed$seed --task $task --ratio token --seed $seed
        done
    done
    # what is not trained
    for task in numberline ezpoints points24 blackjack; do
        games=1000; [ $task = blackjack ] && games=10000
        echo evaluate $task-random --task $task --policy random --episodes $games
        echo evaluate $task-expert --task $task --policy expert --episodes $games
    done
    echo evaluate numberline-constant --task numberline --policy always:+
    echo evaluate ezpoints-constant --task ezpoints --policy always:=
    echo evaluate points24-constant --task points24 --policy always:=
    echo evaluate blackjack-constant --task blackjack --policy always:stand --episodes 10000
}

export -f train evaluate
mkdir -p results/baselines
runs | { grep -e "${1:-.}" || true; } | xargs -P "$(nproc)" -I{} bash -c '{}'
