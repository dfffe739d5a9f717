# shellcheck shell=bash
# Sourced by pam.sh and local/data.sh: what local/data.sh of this recipe takes, a table for utils/parse_options.sh.
# shellcheck disable=SC2034
data_options="
source          NAME     ''         your data: a .jsonl of messages and audios, a CSV, parquet, owner/name of the Hugging
                                    Face hub, ...: what utils/import_data.py --help lists; relative paths of data start
                                    where run.sh is called, or at its folder
dev             NAME     ''         the same for the validation set; empty: a part of the source is held out
test            NAME     ''         the same for the test set
held_out        PERCENT  10         of the utterances, for each set that is held out
task            NAME     ''         task of rows that have none: asr, count, caption, verify
prompt          TEXT     ''         question of rows that have none; empty: the task's
columns         CHANGES  ''         FIELD=COLUMN separated by blanks (within a name '\ '), for columns with other names
audio_root      DIR      ''         where relative paths of recordings start; empty: at the source's folder
models          BOOL     true       fetch the small models of the mini recipe, which the configuration names"
