#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_ablation.sh --size clean100 --options "--audio DIR --ngpu 1"     writes RESULTS_clean100.md and .json
# single:ast (conf/fusion/single_ast.yaml) is the sound-event encoder of conf/train_ast.yaml alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/fusions.sh \
    --size clean100 \
    --fusions "pam single:whisper single:wavlm single:wav2vec2 single:ast average concat static" \
    --title "LibriSpeech, LibriCount and AudioCaps together (SIZE): ways to combine encoders" \
    "$@"
