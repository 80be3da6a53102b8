#!/usr/bin/env bash
# Makes the runs and baselines of this folder again, from the repository's root: bash results/run_all.sh
# One line a run; what is there is skipped (delete its folder first), what was interrupted goes on. One run at a time, all cores.
set -euo pipefail

train() {   # train NAME ARGUMENTS…: one RL run and the files of it that are kept
    local name=$1; shift
    [ -f "results/$name/eval.json" ] && echo "results/$name is there: skipped" && return
    local resume="" begun=$SECONDS
    [ -f "runs/$name/config.json" ] && resume="--resume"
    python train.py "$@" --out "runs/$name" $resume
    mkdir -p "results/$name"
    cp "runs/$name/"{config.json,metrics.jsonl,timing.jsonl,transcripts.jsonl,eval_start.json,eval.json} "results/$name/"
    echo "python train.py $* --out runs/$name" > "results/$name/command.txt"
    # from the command's start to its end, held-out games included; not of a run that was interrupted
    [ -n "$resume" ] || echo "{\"wall_s\": $((SECONDS - begun)), \"cores\": $(nproc)}" > "results/$name/wall.json"
}

evaluate() {   # evaluate NAME ARGUMENTS…: one evaluation of something that is not trained
    local name=$1; shift
    [ -f "results/baselines/$name.json" ] && return
    mkdir -p results/baselines
    python eval.py "$@" --out "results/baselines/$name.json" > /dev/null
}

for task in numberline ezpoints points24 blackjack; do
    episodes=1000; [ $task = blackjack ] && episodes=5000
    evaluate "$task-random" --task $task --policy random --episodes $episodes
    evaluate "$task-expert" --task $task --policy expert --episodes $episodes
done
evaluate numberline-constant --task numberline --policy always:+ --episodes 1000
for task in ezpoints points24; do
    evaluate $task-constant --task $task --policy always:= --episodes 1000
done
evaluate blackjack-constant --task blackjack --policy always:stand --episodes 5000

for seed in 1 2; do
    train blackjack-seed$seed --task blackjack --seed $seed --eval-episodes 5000
    for task in numberline ezpoints points24; do
        train $task-seed$seed --task $task --seed $seed
    done
done
