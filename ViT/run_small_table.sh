#!/usr/bin/env bash
# The real runs of results/vit: a real ViT-S/14 on two small real data sets, control, LoRA, DoRA and a linear probe,
# three seeds each, on the ordinary MLP at equal trained parameters, all in one process.
#   bash ViT/run_small_table.sh GPU [options of small_table.py ...]
# GRID="5e-4 1e-3 2e-3 5e-3 2e-2" gives each method its own learning rate, chosen on held-out training images.
# Finished runs are skipped, so the same command completes an interrupted table, or one that --max_minutes ended.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SHARED=${PARALLEL_CONTROL_SHARED:-$here/../../shared}
MODEL=${MODEL:-$SHARED/models/dinov2_small_timm}
ARCHITECTURE=${ARCHITECTURE:-vit_small_patch14_dinov2}
DATA=${DATA:-} # separated by spaces, paths with spaces in quotes; default: cifar100_7k.npz and flowers12.tar of ../shared
METHODS=${METHODS:-"control lora dora probe"} # separated by spaces; "double control" in quotes of its own
SEEDS=${SEEDS:-"1 2 3"}
EPOCHS=${EPOCHS:-10}
LR=${LR:-5e-3}
GRID=${GRID:-} # learning rates separated by spaces, in the place of LR

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
gpu=$1
shift
words() { # the words of variable $1, with quotes for spaces, as the array $2
    local text
    text=$(xargs printf '%s\n' <<<"${!1}") || {
        echo "error: a quote in $1 is not closed: ${!1}" >&2
        exit 2
    }
    mapfile -t "$2" <<<"$text"
}
if [[ -z $DATA ]]; then
    data=("$SHARED/data/vision/cifar100_7k.npz" "$SHARED/data/vision/flowers12.tar")
elif [[ -e $DATA ]]; then
    data=("$DATA")
else
    words DATA data
fi
words METHODS methods
source "$here/../scripts/interpreter.sh"
echo "$METHODS on ${data[*]} with $MODEL, seeds $SEEDS, $EPOCHS epochs, learning rate ${GRID:-$LR}, device $gpu"
# shellcheck disable=SC2086  # the lists are meant to be split
exec "$PYTHON" -m ViT.small_table --device "$gpu" --model "$MODEL" --architecture "$ARCHITECTURE" --data "${data[@]}" \
    --methods "${methods[@]}" --seeds $SEEDS --epochs "$EPOCHS" --lr "$LR" ${GRID:+--grid $GRID} "$@"
