#!/usr/bin/env bash
# What a GPU has to show, from the repository's root, in two parts:
#   bash lab/gpu.sh bench   at most 7 minutes: LLaVA-1.6-7B's shape in 4 bits under a cap of 24 GB;
#       where 80 GB are there, in 16 bits without checkpointing, without and with --compile. Each
#       plays an eighth of an update and learns from it once, to warm up and again to be measured.
#       The table extrapolates to an update of 512 steps and 4 epochs; it is a little too long, for
#       what comes once a rollout comes once an eighth here. Decoding is measured with its step
#       captured, and beside it plainly. The logs hold the ten kernels that take longest.
#   bash lab/gpu.sh check   at most 4 minutes: side by side the tests with CUDA in sight, the
#       rehearsal at full depth, a run of the pocket model on Blackjack.
# Each job is a process of its own, so that a failure leaves the others. Results and logs lie in
# results/bench/gpu-NAME/, and in one archive in $OUT (in runs/ where that is not set).
# To be reached on an H200: at most 22 GB in 4 bits; in 16 bits decoding at 4,000 tokens/s and
# learning at 42 % of the matrix rate (45 % with --compile); an update in 3.3 minutes in 16 bits, in
# 6.8 in 4.
# `lab/gpu.sh --pack` makes runs/gpu-packages.tgz for a machine without a network, to be carried
# along in its place. That machine must have PyTorch, some transformers with huggingface-hub 1.31,
# tokenizers 0.23.1 and safetensors 0.8 or later, accelerate, peft, sentencepiece, pytest,
# hypothesis and matplotlib.
set -uo pipefail
packages=runs/gpu-packages

if [ "${1:-}" = --pack ]; then
    rm -rf "$packages" "$packages.tgz"
    grep -E '^(transformers|gymnasium|bitsandbytes|mistral-common|num2words)==' requirements.txt |
        pip install -q --no-deps --no-compile --target "$packages" -r /dev/stdin farama-notifications docopt || exit 1
    # what is large and not asked for: kernels for other CUDA versions, other tokenizers
    find "$packages/bitsandbytes" -name 'libbitsandbytes_*' ! -name '*cuda130.so' ! -name '*cpu.so' -delete
    find "$packages/mistral_common/data" -type f ! -name tokenizer.model.v1 -delete
    tar -C runs -czf "$packages.tgz" gpu-packages && rm -r "$packages" && du -h "$packages.tgz"
    exit
fi

part=${1:-}
[ "$part" = bench ] || [ "$part" = check ] || { echo "say what: lab/gpu.sh bench, or check"; exit 2; }
[ -f "$packages.tgz" ] && tar -C runs -xzf "$packages.tgz" && export PYTHONPATH="$PWD/$packages"
export HF_HUB_OFFLINE=1
read -r name gigabytes < <(python3 -c '
import torch
found = torch.cuda.get_device_properties(0)
print(found.name.replace(" ", "-"), round(found.total_memory / 1e9))' 2> /dev/null) ||
    { echo "no CUDA GPU is here"; exit 1; }
out=results/bench/gpu-$name
failed=$out/$part-failed
mkdir -p "$out"; rm -f "$failed"
echo "$name, $gigabytes GB"

# job NAME SECONDS COMMAND…: run it for so long at most; its log in $out/NAME.log, a line here
job() {
    local name=$1 limit=$2 begun=$SECONDS; shift 2
    if timeout -s INT -k 5 "$limit" "$@" > "$out/$name.log" 2>&1; then
        result=done
    else
        result="FAILED ($?)"
        echo "$name" >> "$failed"
    fi
    printf '%-28s %-14s %4d s  %s\n' "$name" "$result" $((SECONDS - begun)) \
        "$(tail -n 1 "$out/$name.log" | cut -c 1-300)"
}

if [ "$part" = bench ]; then
    # an eighth of an update, each answer learned from once
    eighth="python3 -m lab.bench --model llava-7b-random --num-steps 1 --update-epochs 1 --updates 1"
    job bench-4-bits 165 $eighth --memory-gb 24 --profile --out "$out/bench-4-bits.json"
    eighth="$eighth --bits 16 --gradient-checkpointing 0"
    if [ "$gigabytes" -ge 79 ]; then
        job bench-16-bits 115 $eighth --profile --out "$out/bench-16-bits.json"
        job bench-16-bits-compile 120 $eighth --compile --out "$out/bench-16-bits-compile.json"
    fi
    python3 - "$out" <<'PYTHON'
import json, pathlib, sys
for file in sorted(pathlib.Path(sys.argv[1]).glob("bench-*.json")):
    found = json.loads(file.read_text())
    whole = 512 / found["env_steps_per_s"] + 4 * 512 / found["samples_per_s"]
    print(file.stem, {key: round(found[key], 3) for key in (
        "decode_tokens_per_s", "plain_decode_tokens_per_s", "plain_kernels_a_step",
        "play_tokens_per_s", "samples_per_s", "mfu", "ratio_error")},
        f"peak {found['peak_memory_gib'] * 2**30 / 1e9:.1f} GB,",
        f"an update of 512 steps {whole / 60:.1f} min")
PYTHON
else
    most=$(nproc --all)
    # one thread each, or they wait for each other; one order of tests
    export OMP_NUM_THREADS=1 PYTHONHASHSEED=0
    workers="--maxprocesses $((most > 4 ? most - 3 : 1))"
    # pyproject.toml's options are pytest-xdist's
    python3 -c "import xdist" 2> /dev/null || workers="-o addopts="
    job rehearsal 225 python3 -m lab.rehearsal --full --out "$out/rehearsal.json" &
    job tests 225 python3 -m pytest -v -p no:cacheprovider $workers &
    job pocket 225 python3 train.py --task blackjack --model pocket --eval-episodes 500 \
        --out "$(mktemp -d)/run" &
    wait
fi
mkdir -p "${OUT:-runs}"
tar -czf "${OUT:-runs}/gpu-$name-$part.tgz" "$out"
[ ! -f "$failed" ]
