# shellcheck shell=bash
# Sourced by recipes: how jobs are started. Each command follows Kaldi's contract: CMD [--gpu n] [JOB=1:n] LOG program...
#   local   this machine, through utils/run.py
# To use another one (a queue with the same contract), set train_cmd and decode_cmd before calling run.sh.
train_cmd=${train_cmd:-"${PAM_ROOT}/utils/run.py"}
decode_cmd=${decode_cmd:-"${PAM_ROOT}/utils/run.py"}
