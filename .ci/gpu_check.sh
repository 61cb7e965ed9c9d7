#!/usr/bin/env bash
# What a GPU is to show, on an H100 or H200: tables of speed as files.
#
#   .ci/gpu_check.sh [FOLDER [STEP...]]          (default: $OUT, or gpu_check; all steps)
#
# Needs Python with torch, timm, safetensors, pydantic, PyYAML, fsspec, filelock, tenacity and tqdm, and matplotlib for
# the picture; neither an installation of this package nor ray, open_clip, optuna and webdataset.
# A trial run on a CPU at toy size: DEVICE=cpu .ci/gpu_check.sh
# Each step has a limit of its own, 10 minutes in all: starting takes some 10 s, and compiling a tower 30 s. One that
# reaches it leaves time for the others, and no rows: so the most important table comes first, in a step of its own, and
# steps named after the folder run alone. Graphs that torch has compiled in one wait on disk for others.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
names=(predictor rankings merging graphs cudnn scoring scoring_compiled tokens)
out=${1:-${OUT:-gpu_check}}
wanted=("${@:2}")
[ ${#wanted[@]} -gt 0 ] || wanted=("${names[@]}")
for name in "${wanted[@]}"; do
  [[ " ${names[*]} " == *" $name "* ]] || { echo "error: no step is called '$name'; try one of ${names[*]}" >&2; exit 2; }
done
python=${PYTHON:-python3}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2
rm -f "$out"/tables.md
for name in "${wanted[@]}"; do rm -f "$out/$name".{json,md,png}; done

if [ "${DEVICE:-cuda}" = cpu ]; then
  common=(--device cpu --model "${MODEL:-patchrank_clip_digits}" --repeats 3 --threads 1)
  many=2 half=fp32 compile=() graphs=() cudnn=() lengths=9:65:28 scored=1
else
  common=(--device "${DEVICE:-cuda}" --model "${MODEL:-patchrank_clip_b16}" --repeats 20)
  many=${BATCH_SIZE:-256} half=bf16 compile=(--compile) graphs=(--cuda-graphs) cudnn=(--cudnn-attention)
  lengths=16:256:16 scored=16
fi

"$python" -c 'import patchrank' || { echo "error: a package is missing; see the list in $0" >&2; exit 2; }

failed=()
step() { # NAME SECONDS FLAGS: runs the benchmark, whose rows and table go to NAME.json and NAME.md
  local name=$1 limit=$2
  shift 2
  [[ " ${wanted[*]} " == *" $name "* ]] || return 0
  echo "+ $name: $*" >&2
  if ! timeout -k 5 "$limit" "$python" -m patchrank.benchmark "${common[@]}" --dtype "$half" "$@" \
      --json "$out/$name.json" --markdown "$out/$name.md" >/dev/null; then
    failed+=("$name")
  fi
}

step predictor 85 --methods timm,predictor --batch-size "$many" ${compile[@]+"${compile[@]}"}
step tokens 45 --tokens "$lengths" --batch-size "$many" --picture "$out/tokens.png"
step scoring 45 --golden --batch-size "$scored" --dtype bf16 --repeats 5
step graphs 40 --methods timm,predictor,cls_attention,evit,tome,rank_merge --batch-size 1 ${graphs[@]+"${graphs[@]}"}
step rankings 110 --methods timm,cls_attention,evit --batch-size "$many" ${compile[@]+"${compile[@]}"}
step cudnn 25 --methods timm,predictor,rank_merge --batch-size "$many" ${cudnn[@]+"${cudnn[@]}"}
step scoring_compiled 100 --golden --batch-size "$scored" --dtype bf16 --repeats 5 ${compile[@]+"${compile[@]}"}
step merging 150 --methods timm,tome,rank_merge --batch-size "$many" ${compile[@]+"${compile[@]}"}

for name in "${names[@]}"; do
  [ -e "$out/$name.md" ] && { cat "$out/$name.md"; echo; rm "$out/$name.md"; }
done >"$out/tables.md"
echo "tables: $out/tables.md" >&2
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: not measured: ${failed[*]}" >&2
  exit 1
fi
