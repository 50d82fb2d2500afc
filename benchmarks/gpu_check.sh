#!/usr/bin/env bash
# Checks this code on one GPU in at most 8 minutes: scripts, time and memory of a step, waits, speed, tests of a GPU.
#
#   bash benchmarks/gpu_check.sh              # writes gpu_check/: summary.txt, log.txt
#   bash benchmarks/gpu_check.sh --tiny       # small sizes, with or without a GPU: shows that the check runs
#
# Run it from the root of the repository; PYTHON names the interpreter, OUT the folder, LIMIT the seconds. Each part has
# a limit of its own and may fail. A stopped check prints what it has.
set -u
PYTHON=${PYTHON:-python} OUT=${OUT:-gpu_check} LIMIT=${LIMIT:-480} TINY=
SIZE=512 BATCH=9 STEPS=12 WORKERS=6 BACKBONE=vgg16 LARGE=deeplabv3_resnet101 IMAGES="(500, 375)"
if [ "${1:-}" = --tiny ]; then
  TINY=yes SIZE=32 BATCH=2 STEPS=4 WORKERS=0 BACKBONE=small LARGE=small IMAGES="(96, 72)"
fi
mkdir -p "$OUT"
WORK=$(mktemp -d)
DATA=$WORK/data
: >"$OUT/summary.txt" >"$OUT/log.txt"
export PYTHONPATH=. PYTHONWARNINGS=ignore
CHILD=

finish() {
  [ -n "$CHILD" ] && kill "$CHILD" 2>/dev/null
  rm -rf "$WORK"
  echo "----- $SECONDS s"
}
trap finish EXIT
trap 'exit 143' TERM INT

part() { # title, seconds, command
  local title=$1 seconds=$2 start=$SECONDS code
  shift 2
  [ $((LIMIT - SECONDS)) -lt "$seconds" ] && seconds=$((LIMIT - SECONDS))
  [ "$seconds" -ge 5 ] || { echo "$title: no time left" | tee -a "$OUT/summary.txt"; return; }
  timeout -k 5 "$seconds" "$@" >"$WORK/log" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  code=$?
  CHILD=
  { echo "##### $title: $*"; tail -c 60000 "$WORK/log"; } >>"$OUT/log.txt"
  printf '%-28s exit code %3d, %4d s  %s\n' "$title" $code $((SECONDS - start)) \
    "$(grep -E '^(error:|[0-9]+ steps of|memory|waits|\w*Error|.* (passed|failed))' "$WORK/log" | tail -4 | cut -c1-160 | tr '\n' '|')" |
    tee -a "$OUT/summary.txt"
}

nvidia-smi >>"$OUT/log.txt" 2>&1
part "draw images" 60 "$PYTHON" -c "
from pathlib import Path
from dataset.drawn import write_dataset
write_dataset(Path('$DATA'), 96, 16, $IMAGES)"
SHARED=(--data-path "$DATA" --num-workers "$WORKERS")
RUN=("${SHARED[@]}" --split 1 --embedding glove --backbone "$BACKBONE" --backbone-weights none --input-size "$SIZE"
  --batch-size "$BATCH" --max-steps "$STEPS")
FIRST=$WORK/runs/split1/stage1/latest.pth
TEACHER=(--pseudo-labels episodes)
part "stage 1" 40 "$PYTHON" train_split_lambda.py "${RUN[@]}" --output-dir "$WORK/runs" --save-every 2
part "stage 1 continues" 30 "$PYTHON" train_split_lambda.py "${RUN[@]}" --output-dir "$WORK/runs" \
  --restore-from-where continue
part "stage 2, paper" 40 "$PYTHON" train_st_split.py "${RUN[@]}" --output-dir "$WORK/runs"
part "stage 2, pseudo-labeller" 45 "$PYTHON" train_st_split.py "${RUN[@]}" --output-dir "$WORK/best" \
  --stage1-checkpoint "$FIRST" "${TEACHER[@]}"
part "evaluation, three scales" 30 "$PYTHON" eval.py "${SHARED[@]}" --checkpoint "$FIRST" --scales 0.75 1 1.25 --flip
part "own images" 25 "$PYTHON" predict.py --checkpoint "$FIRST" --images "$DATA"/JPEGImages/*1.jpg --output-dir "$WORK/out"
part "waits of stage 1" 45 "$PYTHON" -m benchmarks.waits train_split_lambda.py "${RUN[@]}" --output-dir "$WORK/waits"
part "waits of stage 2" 45 "$PYTHON" -m benchmarks.waits train_st_split.py "${RUN[@]}" --output-dir "$WORK/waits"
DRY=("${RUN[@]}" --output-dir "$WORK/dry" --dry-run)
part "a step of stage 1" 30 "$PYTHON" train_split_lambda.py "${DRY[@]}"
part "a step in float32" 30 "$PYTHON" train_split_lambda.py "${DRY[@]}" --amp off
part "a step with less memory" 30 "$PYTHON" train_split_lambda.py "${DRY[@]}" --checkpoint-activations
part "a step of a large backbone" 30 "$PYTHON" train_split_lambda.py "${DRY[@]}" --backbone "$LARGE"
part "a step of stage 2" 30 "$PYTHON" train_st_split.py "${DRY[@]}" --stage1-checkpoint "$FIRST"
part "against the plain loop" 200 "$PYTHON" -m benchmarks.speed --parts train eval memory ${TINY:+--quick --backbone small}
cat "$WORK/log" >>"$OUT/summary.txt"
[ -n "$TINY" ] || part "tests of a GPU" 60 "$PYTHON" -m pytest -q -p no:cacheprovider -k "gpu or device or fused" tests
