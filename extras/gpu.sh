#!/usr/bin/env bash
# What a GPU has to show, from the repository's root, in under 25 minutes: bash extras/gpu.sh
#   the tests with CUDA in sight; LLaVA-1.6-7B's shape in 4 bits under a cap of 24 GB; where 80 GB are there, in 16 bits
#   without checkpointing; the rehearsal at full depth. Each in a process of its own, so that a failure leaves the others.
# Results and logs: results/bench/gpu-NAME/. Not run on a GPU yet. Bars: 22 GB or less; on an H100 3.5 minutes or less an
# update and 45 % or more of the matrix rate in learning.
# For a machine without a network that has PyTorch, an older transformers with huggingface-hub 1.31, tokenizers 0.23.1 and
# safetensors 0.8 or later, accelerate, peft, sentencepiece, pytest, hypothesis and matplotlib: extras/gpu.sh --pack,
# elsewhere, writes runs/gpu-packages.tgz; carry that file along in its place, and it is used.
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
print(found.name.replace(" ", "-"), round(found.total_memory / 1e9))') || { echo "no CUDA GPU is here"; exit 1; }
out=results/bench/gpu-$name failed=0
mkdir -p "$out"
echo "$name, $gigabytes GB"

job() {   # job NAME SECONDS COMMAND…: run it for so long at most; its log in $out/NAME.log, a line here
    local name=$1 limit=$2 begun=$SECONDS; shift 2
    if timeout -s INT -k 30 "$limit" "$@" > "$out/$name.log" 2>&1; then result=done; else result="FAILED ($?)"; failed=1; fi
    printf '%-28s %-14s %4d s  %s\n' "$name" "$result" $((SECONDS - begun)) "$(tail -n 1 "$out/$name.log" | cut -c 1-300)"
}

job bench-4-bits 480 python3 -m extras.bench --model llava-7b-random --memory-gb 24 --updates 1 --out "$out/bench-4-bits.json"
[ "$gigabytes" -ge 79 ] && job bench-16-bits 300 python3 -m extras.bench --model llava-7b-random --bits 16 \
    --gradient-checkpointing 0 --updates 1 --out "$out/bench-16-bits.json"
job tests 300 python3 -m pytest -q -p no:cacheprovider test_all.py
job rehearsal 360 python3 -m extras.rehearsal --full --out "$out/rehearsal.json"

python3 - "$out" <<'PYTHON'
import json, pathlib, sys
for file in sorted(pathlib.Path(sys.argv[1]).glob("bench-*.json")):
    found = json.loads(file.read_text())
    print(file.stem, {key: round(found[key], 3) for key in (
        "peak_memory_gib", "rollout_s", "update_s", "whole_update_s", "tokens_per_s", "mfu", "ratio_error")})
PYTHON
exit "$failed"
