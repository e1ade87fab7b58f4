#!/usr/bin/env bash
# All that a GPU is needed for, in the order of its worth, within a quarter of an hour. Run it again to go on: what is
# done is not done again, and a training run goes on after its last whole epoch.
#
#     .ci/gpu.sh CIFAR [FOLDER [EPOCHS]]
#
# CIFAR: a folder with train/<class>/* and test/<class>/*, or an archive of it. FOLDER (runs/gpu) keeps everything;
# where OUT is set, the logs are packed there as they grow. EPOCHS (30) of CIFAR-10's recipe for each arm.
set -euo pipefail
cifar=$(realpath "$1")
folder=$(realpath -m "${2:-runs/gpu}")
epochs=${3:-30}
cd "$(dirname "$0")/.."
mkdir -p "$folder/data" "$folder/logs"

if [ -n "${OUT:-}" ]; then  # one small file, again and again: whatever ends this script, the last one is there
    while sleep 5; do
        tar -czf "$OUT/part" -C "$folder" --exclude="*.pt" --exclude="*.part" --exclude=data . 2>/dev/null || true
        mv "$OUT/part" "$OUT/logs.tgz"
    done &
    trap 'sleep 6; kill %1' EXIT
fi

once() {  # NAME COMMAND...: its output in logs/NAME.txt, once it has ended well
    [ -e "$folder/logs/$1.txt" ] && return
    echo "== $1: ${*:2}"
    if "${@:2}" > "$folder/part" 2>&1; then
        (echo "# ${*:2}"; cat "$folder/part") > "$folder/logs/$1.txt"
    else
        (echo "# failed: ${*:2}"; cat "$folder/part") > "$folder/logs/$1-failed.txt"
    fi
    tail -n 12 "$folder/part"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "no GPU: this shows only that the script runs"
if [ -d "$cifar" ]; then
    ln -sfn "$cifar" "$folder/data/cifar10"
elif [ ! -e "$folder/data/cifar10" ]; then
    mkdir -p "$folder/data/part"
    tar -xf "$cifar" -C "$folder/data/part" && mv "$folder/data/part" "$folder/data/cifar10"
fi

# 1. a step's forms, SimSiam at CIFAR-10's and at ImageNet's size, then a graph for the other methods
once forms-cifar10 python3 .ci/forms.py
once forms-imagenet python3 .ci/forms.py --recipe imagenet --forms now graph ahead graph+ahead no-views
once forms-byol python3 .ci/forms.py --script byol_dssl --forms now graph
once forms-simclr python3 .ci/forms.py --script simclr_dssl --forms now graph

# 2. CIFAR-10's recipe as it stands: DSSL against two pairs
arm() {  # NAME FLAGS...
    local name="e$epochs-$1-seed0" data=(--data cifar10 --root "$folder/data")
    local flags=("${data[@]}" --epochs "$epochs" --knn-every 10 "${@:2}")
    once "$name" python3 simsiam_dssl.py "${flags[@]}" --out "$folder/$name"
    once "$name-linear" python3 linear_eval.py "$folder/$name/backbone.pt" "${data[@]}" --epochs 10 --lr 3
}
arm dssl
arm pairs --weights 1 0 0 0 --pairs 2

# 3. the tests that need CUDA
once tests python3 -m pytest -q -m skipif

# 4. one pair for twice the epochs, at the same cost: on letters it is level with DSSL
arm plain-twice --weights 1 0 0 0 --epochs $((2 * epochs))
