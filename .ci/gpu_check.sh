#!/usr/bin/env bash
# What a GPU is to show, in at most 6 minutes on an H100 or H200: tables of speed as files.
#
#   .ci/gpu_check.sh [FOLDER]          (default: $OUT, or gpu_check)
#
# Needs Python with torch, timm, safetensors, pydantic, PyYAML, fsspec, filelock, tenacity and tqdm, and matplotlib for
# the picture; neither an installation of this package nor ray, open_clip, optuna and webdataset.
# A trial run on a CPU at toy size: DEVICE=cpu .ci/gpu_check.sh
# Each step has a limit of its own, 360 s in all. One that reaches it leaves time for the others, and no rows: so the
# most important table comes first, in a step of its own. Graphs that torch has compiled in it wait on disk for others.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-${OUT:-gpu_check}}
python=${PYTHON:-python3}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2
rm -f "$out"/{predictor,rankings,merging,graphs,cudnn,scoring,scoring_compiled,tokens}.{json,md} "$out"/tokens.png "$out"/tables.md

if [ "${DEVICE:-cuda}" = cpu ]; then
  common=(--device cpu --model "${MODEL:-patchrank_clip_digits}" --repeats 3 --threads 1)
  many=2 half=fp32 compile=() graphs=() cudnn=() lengths=9:65:28 scored=1
else
  common=(--device "${DEVICE:-cuda}" --model "${MODEL:-patchrank_clip_b16}" --repeats 20)
  many=${BATCH_SIZE:-256} half=bf16 compile=(--compile) graphs=(--cuda-graphs) cudnn=(--cudnn-attention)
  lengths=16:256:8 scored=16
fi

"$python" -c 'import patchrank' || { echo "error: a package is missing; see the list in $0" >&2; exit 2; }

failed=()
step() { # NAME SECONDS FLAGS: runs the benchmark, whose rows and table go to NAME.json and NAME.md
  local name=$1 limit=$2
  shift 2
  echo "+ $name: $*" >&2
  if ! timeout -k 5 "$limit" "$python" -m patchrank.benchmark "${common[@]}" --dtype "$half" "$@" \
      --json "$out/$name.json" --markdown "$out/$name.md" >/dev/null; then
    failed+=("$name")
  fi
}

step predictor 85 --methods timm,predictor --batch-size "$many" ${compile[@]+"${compile[@]}"}
step scoring 25 --golden --batch-size "$scored" --dtype bf16
step rankings 75 --methods timm,cls_attention,evit --batch-size "$many" ${compile[@]+"${compile[@]}"}
step graphs 30 --methods timm,predictor,cls_attention,evit,tome,rank_merge --batch-size 1 ${graphs[@]+"${graphs[@]}"}
step tokens 25 --tokens "$lengths" --batch-size "$many" --picture "$out/tokens.png"
step scoring_compiled 50 --golden --batch-size "$scored" --dtype bf16 ${compile[@]+"${compile[@]}"}
step merging 50 --methods timm,tome,rank_merge --batch-size "$many" ${compile[@]+"${compile[@]}"}
step cudnn 20 --methods timm,predictor,rank_merge --batch-size "$many" ${cudnn[@]+"${cudnn[@]}"}

for name in predictor rankings merging graphs cudnn scoring scoring_compiled tokens; do
  [ -e "$out/$name.md" ] && { cat "$out/$name.md"; echo; rm "$out/$name.md"; }
done >"$out/tables.md"
echo "tables: $out/tables.md" >&2
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: not measured: ${failed[*]}" >&2
  exit 1
fi
