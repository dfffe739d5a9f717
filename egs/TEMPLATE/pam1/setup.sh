#!/usr/bin/env bash
# Makes the skeleton of a new recipe: run.sh, conf/, local/data.sh to fill in.
set -euo pipefail

usage="Usage: egs/TEMPLATE/pam1/setup.sh egs/<corpus>/pam1

Makes a recipe that runs the stages of pam.sh. Its configurations are copies of the mini recipe's, to be edited;
local/data.sh is yours to write: it makes Kaldi-style data directories with wav.scp, text, prompt, utt2task, utt2spk."

case "${1:-}" in
    -h | --help) echo "${usage}" && exit 0 ;;
    "") echo "${usage}" >&2 && exit 1 ;;
esac
[ $# -eq 1 ] || { echo "error: one directory, please" >&2 && exit 1; }
[ ! -e "$1" ] || { echo "error: $1 exists already" >&2 && exit 1; }

template=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mini=${template}/../../mini/pam1
mkdir -p "$(dirname "$1")"
parent=$(cd "$(dirname "$1")" && pwd)
case "${parent}" in
    "$(cd "${template}/../.." && pwd)"/*) ;;
    *) echo "error: $1 must be egs/<corpus>/<name>: recipes find pam.sh two directories up" >&2 && exit 1 ;;
esac
mkdir -p "$1/local"
cp -r "${mini}/conf" "$1/conf"
cat >"$1/run.sh" <<'EOF'
#!/usr/bin/env bash
# What this recipe trains, in one sentence.
#   ./run.sh --stage 1 --stop_stage 5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ../../TEMPLATE/pam1/pam.sh \
    --train_set train \
    --valid_set dev \
    --test_sets "test" \
    "$@"
EOF
cat >"$1/local/data.sh" <<'EOF'
#!/usr/bin/env bash
# Stage 1: make <data_dir>/{train,dev,test}/{wav.scp,text,prompt,utt2task,utt2spk}.
# pam.sh calls it as: local/data.sh --size NAME --data_dir DIR --nj N
set -euo pipefail
echo "error: $0 is not written yet" >&2
exit 1
EOF
chmod +x "$1/run.sh" "$1/local/data.sh"
echo "made $1; next: write $1/local/data.sh, edit $1/conf/, then $1/run.sh"
