#!/usr/bin/env bash
# Captions of sounds: AudioCaps, four frozen encoders, Qwen2.5-3B; see README.md.
#   ./run.sh --size v1 --csv DIR --audio DIR --ngpu 1     release 1: the official CSVs, and a folder with the clips
#   ./run.sh --size v2 --csv DIR --fetch true --ngpu 1    release 2.0; fetch the clips that are still there (days)
#   ./run.sh --ngpu 1 --train_config "conf/train.yaml conf/train_24gb.yaml" ...     one GPU of 24 GB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --size v1 \
    --fusion pam \
    --test_sets test \
    --max_seconds 11 \
    --use_cache false \
    "$@"
