#!/usr/bin/env bash
# All that a GPU is needed for, in the order of its worth; a quarter of an hour is enough for the first two parts. Run it
# again to go on: what has ended is not run again, and a training run goes on after its last whole epoch.
#
#     .ci/gpu.sh CIFAR [FOLDER [EPOCHS]]
#
# CIFAR: a folder with train/<class>/* and test/<class>/*, or an archive of it. FOLDER (runs/gpu) keeps everything;
# where OUT is set, the logs are packed there as they grow. EPOCHS (40) for each arm.
set -euo pipefail
cifar=$(realpath "$1")
folder=$(realpath -m "${2:-runs/gpu}")
epochs=${3:-40}
cd "$(dirname "$0")/.."
mkdir -p "$folder/data" "$folder/logs"

if [ -n "${OUT:-}" ]; then  # one small file, again and again: whatever ends this script, the last one is there
    while sleep 5; do
        tar -czf "$OUT/part" -C "$folder" --exclude="*.pt" --exclude="*.part" --exclude=data . 2>/dev/null || true
        mv "$OUT/part" "$OUT/logs.tgz"
    done &
    trap 'sleep 6; kill %1' EXIT
fi

once() {  # NAME COMMAND...: its output in logs/NAME.txt, or NAME-failed.txt unless a signal ended it
    [ -e "$folder/logs/$1.txt" ] || [ -e "$folder/logs/$1-failed.txt" ] && return
    echo "$(date +%T) == $1: ${*:2}"
    if "${@:2}" > "$folder/part-$1" 2>&1; then
        (echo "# ${*:2}"; cat "$folder/part-$1") > "$folder/logs/$1.txt"
    elif [ $? -lt 128 ]; then
        (echo "# failed: ${*:2}"; cat "$folder/part-$1") > "$folder/logs/$1-failed.txt"
    fi
    tail -n 12 "$folder/part-$1"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "no GPU: this shows only that the script runs"
if [ -d "$cifar" ]; then
    ln -sfn "$cifar" "$folder/data/cifar10"
elif [ ! -e "$folder/data/cifar10" ]; then
    mkdir -p "$folder/data/part"
    tar -xf "$cifar" -C "$folder/data/part"
    mv "$folder/data/part" "$folder/data/cifar10"
fi

# the scripts as they are, but CIFAR-10's images are decoded once, not in each run
script() { python3 .ci/cached.py "$folder/data/cifar10.bin" "$@"; }
data=(--data cifar10 --root "$folder/data")
arm() {  # NAME LR EPOCHS FLAGS...
    local name="$1-resnet18-lr$2-$3epochs-seed0"
    once "$name" script simsiam_dssl.py "${data[@]}" --lr "$2" --epochs "$3" --knn-every 5 "${@:4}" --out "$folder/$name"
    if [ -e "$folder/logs/$name.txt" ]; then  # backbone.pt is there after each epoch, this after the last one
        once "$name-linear" script linear_eval.py "$folder/$name/backbone.pt" "${data[@]}" --epochs 10 --lr 3
    fi
}

# 1. the tests that need CUDA
once tests timeout --foreground 300 python3 -m pytest -q -m skipif  # NCCL's group can wait for ever after a failure

# 2. CIFAR-10: DSSL against two pairs at a rate higher than the recipe's, at which both learnt faster
arm simsiam-dssl 0.06 "$epochs"
arm simsiam-pairs 0.06 "$epochs" --weights 1 0 0 0 --pairs 2

# 3. what a graph brings at ImageNet's size and to the other methods, which kernels take how long, and the other forms
once forms-imagenet python3 .ci/forms.py --recipe imagenet --forms launched graph --steps 40
once forms-byol python3 .ci/forms.py --script byol_dssl --forms launched graph --steps 40
once forms-simclr python3 .ci/forms.py --script simclr_dssl --forms launched graph --steps 40
once profile python3 .ci/forms.py --forms graph --steps 20 --profile

# 4. one pair for twice the epochs, at the same cost: on letters it is level with DSSL
arm simsiam-plain 0.06 $((2 * epochs)) --weights 1 0 0 0

# 5. the other forms, and a compiled backbone
once forms-more python3 .ci/forms.py --forms graph compiled graph+compiled no-ddp no-cache no-views
