#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_ablation.sh --size v1 --options "--csv DIR --audio DIR --ngpu 1"     writes RESULTS_v1.md and .json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/fusions.sh \
    --size v1 \
    --fusions "pam single:whisper single:wavlm single:wav2vec2 single:ast average concat static" \
    --title "AudioCaps SIZE.0: ways to combine encoders" \
    "$@"
