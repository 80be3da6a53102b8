#!/usr/bin/env bash
# Makes the runs and baselines of this folder again, from the repository's root: bash results/run_all.sh [PATTERN]
# One line a run, one core a run, as many side by side as there are cores; PATTERN (grep's) picks some. What is there is
# skipped (to make it again after a change, delete its folder in results/runs/ and in runs/); what was interrupted goes on.
set -euo pipefail
cores=$(nproc)               # before the next line, which nproc would obey
export OMP_NUM_THREADS=1

train() {   # train NAME GAMES ARGUMENTS…: one RL run, held-out games with its last checkpoint, the files that are kept
    local name=$1 games=$2; shift 2
    [ -f "results/runs/$name/eval.json" ] && return
    learn "$name" "python train.py $* --eval-episodes 0" &&
        finish "$name" python eval.py --task "${name%%-*}" --run "runs/$name" --episodes "$games" --out "runs/$name/eval.json"
}

features() {   # features NAME GAMES ARGUMENTS…: likewise on vision features and an MLP, which plays its own held-out games
    local name=$1 games=$2; shift 2
    [ -f "results/runs/$name/eval.json" ] && return
    learn "$name" "python -m extras.features $* --eval-episodes $games" && finish "$name" true
}

learn() {   # learn NAME COMMAND: run it, or go on with it, and keep its files; fails where it runs elsewhere
    local name=$1 command="$2 --out runs/$1" resume="" begun=$SECONDS run="runs/$1" kept="results/runs/$1"
    [ -f "$run/config.json" ] && resume="--resume"
    mkdir -p "$run" "$kept"
    exec 9> "$run/lock"; flock -n 9 || { echo "$name is running elsewhere"; return 1; }
    $command $resume > "$run/log.txt" 2>&1 || { echo "$name failed: $run/log.txt"; return 1; }
    # from the command's start to its end; not of a run that was interrupted
    [ -n "$resume" ] || echo "{\"wall_s\": $((SECONDS - begun)), \"cores\": 1}" > "$kept/wall.json"
    cp "$run/"{config.json,metrics.jsonl,timing.jsonl,transcripts.jsonl} "$kept/"
    echo "OMP_NUM_THREADS=1 $command" > "$kept/command.txt"
}

finish() {   # finish NAME COMMAND…: play the held-out games, which end in runs/NAME/eval.json
    local name=$1; shift
    "$@" >> "runs/$name/log.txt" 2>&1 || { echo "$name failed: runs/$name/log.txt"; return 1; }
    cp "runs/$name/eval.json" "results/runs/$name/eval.json"
    echo "$name done"
}

needs() {   # needs NAME ARGUMENTS…: whether the run of --run or --won-by, where there is one, is finished
    local learner
    learner=$(grep -oP -- '--(run|won-by) \K\S+' <<< "$*" || true)
    [ -z "$learner" ] || [ -f "$learner/eval.json" ] || { echo "$1 needs $learner first: run this again"; return 1; }
}

evaluate() {   # evaluate NAME GAMES ARGUMENTS…: held-out games with what is not trained by RL, or otherwise sampled
    local name=$1 games=$2; shift 2
    [ -f "results/baselines/$name.json" ] && return
    needs "$name" "$@" || return 1
    mkdir -p runs
    python eval.py "$@" --episodes "$games" --out "results/baselines/$name.json" > "runs/$name.log" 2>&1 ||
        { echo "$name failed: runs/$name.log"; return 1; }
    echo "$name done"
}

plans() {   # plans NAME ARGUMENTS…: what the written plans of Points24 are worth
    local name=$1; shift
    [ -f "results/baselines/$name.json" ] && return
    needs "$name" "$@" || return 1
    mkdir -p runs
    python -m extras.plans "$@" --out "results/baselines/$name.json" > "runs/$name.log" 2>&1 ||
        { echo "$name failed: runs/$name.log"; return 1; }
    echo "$name done"
}

best() {   # best NAME GAMES STEPS ARGUMENTS…: STEPS of supervised fine-tuning on the expert's own labels, RL from there
    local name=$1 games=$2 steps=$3 task=${1%%-*}; shift 3
    local begun=$SECONDS start="runs/$task-best-sft" more=""
    [ -f "results/runs/$name/eval.json" ] && return
    mkdir -p runs
    exec 8> "$start.lock"; flock 8                              # the other seeds wait for the one that makes it
    if [ ! -f "$start/config.json" ]; then
        [ -f "$start/sft.json" ] && more=--resume
        python sft.py --task "$task" --model pocket --full --bits 32 --steps "$steps" --lr 1e-3 --seed 11 --out "$start" ${more:-} \
            > "$start.log" 2>&1 || { echo "$name failed: $start.log"; return 1; }
        echo "{\"steps\": $steps, \"wall_s\": $((SECONDS - begun)), \"cores\": 1}" > "results/baselines/$task-best-sft.json"
    fi
    evaluate "$task-best-start" "$games" --task "$task" --model "$start" --temperature 0.5
    flock -u 8
    train "$name" "$games" --task "$task" --model "$start" "$@"
}

family() {   # family NAME GAMES FAMILY ARGUMENTS…: RL on a pocket model of another family, made first where it is missing
    local name=$1 games=$2 family=$3 task=${1%%-*} model="runs/pocket-$3"; shift 3
    mkdir -p runs
    exec 8> "$model.lock"; flock 8                              # the others wait for the one that makes it
    if [ ! -d "$model" ]; then
        local begun=$SECONDS
        python -m extras.pocket --family "$family" --steps 500 3000 300 --out "$model" > "$model.log" 2>&1 ||
            { echo "$name failed: $model.log"; return 1; }
        echo "{\"wall_s\": $((SECONDS - begun)), \"cores\": 1}" > "results/baselines/pocket-$family.json"
    fi
    flock -u 8
    evaluate "$task-$family-start" "$games" --task "$task" --model "$model"
    train "$name" "$games" --model "$model" "$@"
}

runs() {
    local task seed cot_lambda setting temperature
    local plain="--temperature 0.5 --negative-weight 1 --imitation 0"       # PPO alone, also on Points24
    declare -A games=([blackjack]=10000 [points24]=1000 [numberline]=1000 [ezpoints]=1000 [alfworld]=500)
    declare -A constant=([blackjack]=stand [points24]== [numberline]=+ [ezpoints]==)
    # what is not trained
    for task in blackjack points24 numberline ezpoints; do
        echo evaluate $task-random ${games[$task]} --task $task --policy random
        echo evaluate $task-expert ${games[$task]} --task $task --policy expert
        echo evaluate $task-constant ${games[$task]} --task $task --policy always:${constant[$task]}
        echo evaluate $task-start ${games[$task]} --task $task --model pocket
        echo evaluate $task-start-no-cot ${games[$task]} --task $task --model pocket --temperature 0.5 --no-cot
    done
    # the main table
    for seed in 1 2 3 4 5; do
        for task in blackjack points24 numberline ezpoints; do
            echo train $task-seed$seed ${games[$task]} --model pocket --task $task --seed $seed
        done
    done
    # Points24 without what is ours there; these, and its start, at the temperature where the main table's runs end
    for seed in 1 2 3; do
        echo train points24-plain-seed$seed 1000 --model pocket --task points24 --seed $seed $plain
    done
    for seed in 1 2 3; do
        echo evaluate points24-plain-seed$seed-temperature-0.1 1000 --task points24 --run runs/points24-plain-seed$seed --temperature 0.1
    done
    # four times the steps, more exploring at first
    echo train points24-60000-steps-seed1 1000 --model pocket --task points24 --seed 1 --temperature 0.5 --temperature-end 0.1 --total-timesteps 60000
    for temperature in 0.5 0.1; do
        echo evaluate points24-start-temperature-$temperature 1000 --task points24 --model pocket --temperature $temperature
    done
    for temperature in 0.5 0.1; do
        echo plans points24-plans-start-temperature-$temperature --model pocket --temperature $temperature
    done
    # of runs whose checkpoints are not kept here; the start on the numbers that each won
    echo plans points24-plans-seed1 --run runs/points24-seed1
    echo plans points24-plans-60000-steps-seed1 --run runs/points24-60000-steps-seed1 --tries 2
    echo plans points24-plans-start-beside-60000-steps-seed1 --model pocket --temperature 0.1 --won-by runs/points24-60000-steps-seed1 --tries 2
    echo plans points24-plans-start-beside-seed1 --model pocket --temperature 0.1 --won-by runs/points24-seed1
    # ALFWorld, where its engine is installed (extras/requirements-alfworld.txt)
    if python -c "import alfworld" 2> /dev/null; then
        for player in random heuristic expert; do
            echo evaluate alfworld-$player ${games[alfworld]} --task alfworld --policy $player
        done
        echo evaluate alfworld-start ${games[alfworld]} --task alfworld --model pocket
        echo evaluate alfworld-start-no-cot ${games[alfworld]} --task alfworld --model pocket --no-cot
        for seed in 1 2 3; do
            echo train alfworld-seed$seed ${games[alfworld]} --model pocket --task alfworld --seed $seed
            echo train alfworld-no-cot-seed$seed ${games[alfworld]} --model pocket --task alfworld --no-cot --seed $seed
            for cot_lambda in 0 0.5; do
                echo train alfworld-lambda-$cot_lambda-seed$seed ${games[alfworld]} --model pocket --task alfworld --cot-lambda $cot_lambda --seed $seed
            done
            echo train alfworld-twice-seed$seed ${games[alfworld]} --model pocket --task alfworld --cot-lambda 0.5 --total-timesteps 10000 --seed $seed
        done
    fi
    # the same on another family of models
    for seed in 1 2 3; do
        for task in blackjack numberline; do
            echo family $task-qwen3_vl-seed$seed ${games[$task]} qwen3_vl --task $task --seed $seed
        done
    done
    # without chain of thought
    for seed in 1 2 3; do
        for task in blackjack points24 numberline ezpoints; do
            echo train $task-no-cot-seed$seed ${games[$task]} --model pocket --task $task --no-cot --seed $seed $plain
        done
    done
    # the weight of the thoughts; 0.5 is in the main table
    for seed in 1 2 3; do
        for cot_lambda in 0 1 0.1 0.9 0.3 0.7; do
            echo train numberline-lambda-$cot_lambda-seed$seed 1000 --model pocket --task numberline --cot-lambda $cot_lambda --seed $seed
        done
    done
    for cot_lambda in 0.1 1; do
        echo train blackjack-lambda-$cot_lambda-seed1 10000 --model pocket --task blackjack --cot-lambda $cot_lambda --seed 1
    done
    # best effort: taught the expert's own labels first, up to an hour a game
    for seed in 1 2 3; do
        echo best blackjack-best-seed$seed 10000 1000 --seed $seed --lr 5e-5
        echo best points24-best-seed$seed 1000 3000 --seed $seed $plain
    done
    # frozen vision features and an MLP over the actions
    for seed in 1 2 3; do
        for task in blackjack points24 numberline ezpoints; do
            echo features $task-features-seed$seed ${games[$task]} --task $task --seed $seed
        done
    done
    # one setting at a time; the settings were chosen before, on training curves (results/README.md)
    for task in points24 blackjack; do
        for setting in "lr 1e-4" "lr 4e-4" "temperature 0.3" "temperature 0.8" "rank 8" "rank 128"; do
            echo train $task-${setting/ /-}-seed1 ${games[$task]} --model pocket --task $task $plain --$setting --seed 1
        done
    done
}

export -f train features learn finish needs evaluate plans best family
mkdir -p results/baselines
runs | { grep -e "${1:-.}" || true; } | xargs -P "$cores" -I{} bash -ec '{}'
