#!/usr/bin/env bash
# Your recordings and answers: one command from a jsonl to a scored model; see README.md.
#   ./run.sh --source my.jsonl                                    everything, on a laptop
#   ./run.sh --source my.jsonl --task asr                         where the rows do not say which task they are
#   ./run.sh --source train.jsonl --dev dev.jsonl --test test.jsonl --size full
set -euo pipefail
export PAM_CALLED_FROM=${PWD}  # local/data.sh: relative paths of data may start there
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --size quick \
    --fusion pam \
    --test_sets test \
    "$@"
