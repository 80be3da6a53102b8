#!/usr/bin/env bash
# What a GPU has to show, from the repository's root, in at most 18 minutes: bash lab/gpu.sh
#   LLaVA-1.6-7B's shape in 4 bits under a cap of 24 GB; where 80 GB are there, in 16 bits without
#   checkpointing; then, side by side, the tests with CUDA in sight, the rehearsal at full depth, a
#   run of the pocket model. Each in a process of its own, so that a failure leaves the others. The
#   benches play and learn a quarter of an update; the table gives the whole.
# Results and logs: results/bench/gpu-NAME/. Bars: 22 GB or less; on an H100 3.5 minutes or less an
# update and 45 % or more of the matrix rate in learning.
# For a machine without a network that has PyTorch, an older transformers with huggingface-hub 1.31,
# tokenizers 0.23.1 and safetensors 0.8 or later, accelerate, peft, sentencepiece, pytest,
# hypothesis and matplotlib: lab/gpu.sh --pack, elsewhere, writes runs/gpu-packages.tgz; carry that
# file along in its place, and it is used.
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

[ -f "$packages.tgz" ] && tar -C runs -xzf "$packages.tgz" && export PYTHONPATH="$PWD/$packages"
export HF_HUB_OFFLINE=1
read -r name gigabytes < <(python3 -c '
import torch
found = torch.cuda.get_device_properties(0)
print(found.name.replace(" ", "-"), round(found.total_memory / 1e9))') ||
    { echo "no CUDA GPU is here"; exit 1; }
out=results/bench/gpu-$name
mkdir -p "$out"; rm -f "$out/failed"
echo "$name, $gigabytes GB"

# job NAME SECONDS COMMAND…: run it for so long at most; its log in $out/NAME.log, a line here
job() {
    local name=$1 limit=$2 begun=$SECONDS; shift 2
    if timeout -s INT -k 30 "$limit" "$@" > "$out/$name.log" 2>&1; then
        result=done
    else
        result="FAILED ($?)"
        echo "$name" >> "$out/failed"
    fi
    printf '%-28s %-14s %4d s  %s\n' "$name" "$result" $((SECONDS - begun)) \
        "$(tail -n 1 "$out/$name.log" | cut -c 1-300)"
}

quarter="--model llava-7b-random --num-steps 2 --updates 1"
job bench-4-bits 240 python3 -m lab.bench $quarter --memory-gb 24 --out "$out/bench-4-bits.json"
job bench-4-bits-wide 200 python3 -m lab.bench $quarter --memory-gb 24 --micro-batch-size 8 \
    --play-batch-size 64 --profile --out "$out/bench-4-bits-wide.json"
[ "$gigabytes" -ge 79 ] && job bench-16-bits 200 python3 -m lab.bench $quarter --bits 16 \
    --gradient-checkpointing 0 --out "$out/bench-16-bits.json"
most=$(nproc --all)
# one thread each, or they wait for each other; one order of tests
export OMP_NUM_THREADS=1 PYTHONHASHSEED=0
workers="--maxprocesses $((most > 4 ? most - 3 : 1))"
# pyproject.toml's options are pytest-xdist's
python3 -c "import xdist" 2> /dev/null || workers="-o addopts="
job rehearsal 400 python3 -m lab.rehearsal --full --out "$out/rehearsal.json" &
job tests 400 python3 -m pytest -v -p no:cacheprovider $workers &
job pocket 200 python3 train.py --task blackjack --model pocket --eval-episodes 500 \
    --out "$(mktemp -d)/run" &
wait

python3 - "$out" <<'PYTHON'
import json, pathlib, sys
for file in sorted(pathlib.Path(sys.argv[1]).glob("bench-*.json")):
    found = json.loads(file.read_text())
    print(file.stem, {key: round(found[key], 3) for key in (
        "peak_memory_gib", "tokens_per_s", "samples_per_s", "mfu", "ratio_error")},
          "an update of 512 steps:", round(4 * found["whole_update_s"]), "s")
PYTHON
[ ! -f "$out/failed" ]
