#!/usr/bin/env bash
# One model for three corpora and four tasks: it transcribes LibriSpeech, counts voices in LibriCount, tells whether a
# count is right, and describes the sounds of AudioCaps; see README.md.
#   ./run.sh --ngpu 1 --audio DIR                       LibriSpeech and LibriCount downloaded; AudioCaps' clips in DIR
#   ./run.sh --ngpu 4 --size full960 --librispeech /corpora --libricount /corpora/LibriCount10-0dB --audio DIR --csv DIR
#   ./run.sh --ngpu 1 --train_config "conf/train.yaml conf/train_ast.yaml" ...     with an encoder for sound events
#   ./run.sh --ngpu 1 --train_config "conf/train.yaml conf/train_24gb.yaml" ...    one GPU of 24 GB
#   ./run.sh --ngpu 1 --stage 4 --all_prompts true      every wording of the test questions, and the spread
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --size clean100 \
    --fusion pam \
    --test_sets "test_clean test_other test_count test_verify test_caption" \
    --select scores \
    --use_cache false \
    --max_seconds 36 \
    "$@"
