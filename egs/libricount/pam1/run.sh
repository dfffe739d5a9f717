#!/usr/bin/env bash
# How many people are talking? Trained on mixtures of LibriSpeech's training readers, scored on LibriCount; see README.md.
#   ./run.sh --ngpu 1                                                  all of it, downloaded
#   ./run.sh --ngpu 1 --librispeech /corpora --libricount /corpora/LibriCount10-0dB
#   ./run.sh --ngpu 1 --tag pam_24gb --train_config "conf/train.yaml conf/train_24gb.yaml" \
#       --set "num_iters_per_epoch=2800"                           one GPU of 24 GB
#   ./run.sh --ngpu 1 --fusion average --stage 3                       a control on the same data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --size clean100 \
    --fusion pam \
    --test_sets "test_count test_verify" \
    --use_cache false \
    --audio_off false \
    "$@"
