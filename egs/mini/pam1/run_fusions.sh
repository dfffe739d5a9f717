#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_fusions.sh                      quick size; writes RESULTS_quick.md and .json
#   ./run_fusions.sh --size full          full size; writes RESULTS_full.md and .json
#   ./run_fusions.sh --fusions "pam static"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/fusions.sh \
    --size quick \
    --fusions "pam single:whisper single:yamnet single:pyannote average concat static" \
    --title "Mini corpus, size SIZE: ways to combine encoders" \
    "$@"
