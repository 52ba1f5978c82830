#!/bin/sh
# The bars of a box with a GPU, one command each: benchmarks/gpu_bars.sh 1|2|3|4|5 (`moebox` on the PATH).
# For a box with one GPU of 80 GB or more and 128 GB of RAM; each takes less than 90 seconds. The report, or its
# last line as JSON, has the figures that the bar names.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
k2() { moebox bench --shape kimi-k2 "$@" ${BENCH_FLAGS:-}; }

case "${1:-}" in
1 | 2) # CPU road alone, then both roads, nothing resident: ms a layer
    "$python" benchmarks/roads.py --threads 13,14,15 ;;
3) # 8 MoE layers with 9 % of the experts, as in 80 GB, then 20 %: floor, tok/s at 60 layers
    k2 --layers 9 --vram 80GB --context 8192 --prompt-tokens 64
    k2 --layers 9 --vram 143GB --context 8192 --prompt-tokens 64 ;;
4) # the expert kernel alone: share of copy bandwidth, share of the bf16 rate
    "$python" benchmarks/gpu_experts.py ;;
5) # prompts with nothing resident: times the floor at 4,096 tokens; 512 tokens at llama.cpp's 4 MoE layers
    k2 --layers 9 --vram 0 --context 8192 --prompt-tokens 4096 --decode-tokens 0
    k2 --layers 5 --vram 0 --context 8192 --prompt-tokens 512 --decode-tokens 0 ;;
*)
    echo "usage: $0 1|2|3|4|5" >&2
    exit 2 ;;
esac
