#!/usr/bin/env bash
# Speech recognition on LibriSpeech with several audio encoders and one LLM; see README.md.
#   ./run.sh --ngpu 1                                            100 hours, downloaded
#   ./run.sh --ngpu 4 --size full960 --librispeech /corpora      all 960 hours, from a copy that is there
#   ./run.sh --ngpu 1 --tag pam_24gb --train_config "conf/train.yaml conf/train_24gb.yaml" \
#       --set "num_iters_per_epoch=3600"                           one GPU of 24 GB
#   ./run.sh --ngpu 1 --fusion average --stage 3                 a control on the same data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --size clean100 \
    --fusion pam \
    --test_sets "test_clean test_other" \
    --use_cache false \
    --audio_off false \
    --max_seconds 36 \
    "$@"
