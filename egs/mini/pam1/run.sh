#!/usr/bin/env bash
# One prompt-aware speech LLM for three tasks, on small real models and real recordings; see README.md.
#   ./run.sh                                          everything, quick size
#   ./run.sh --size full                              the larger corpus and a longer training
#   ./run.sh --fusion average --stage 3               a control on the same data: single:whisper, single:yamnet,
#                                                     single:pyannote, average, concat, static
#   ./run.sh --stage 4 --stop_stage 5                 decode and score again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --size quick \
    --fusion pam \
    --test_sets "test_asr test_voices test_count test_caption" \
    --control_sets "test_asr test_count test_caption" \
    "$@"
