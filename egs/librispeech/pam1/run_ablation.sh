#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_ablation.sh --options "--ngpu 1"                    writes RESULTS_clean100.md and .json
#   ./run_ablation.sh --size mini --options "--ngpu 1"        the smallest size
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/fusions.sh \
    --size clean100 \
    --fusions "pam single:whisper single:wavlm single:wav2vec2 average concat static" \
    --title "LibriSpeech SIZE: ways to combine encoders" \
    "$@"
