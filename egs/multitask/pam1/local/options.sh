# shellcheck shell=bash
# Sourced by pam.sh: what local/data.sh of this recipe takes: what those of its three corpora take, and the release of
# AudioCaps. An option that two of them have, such as --librispeech, is given to both.
Options=()
Help=
for Corpus in librispeech libricount audiocaps; do
    # shellcheck source=/dev/null
    . "../../${Corpus}/pam1/local/options.sh"
    for Name in "${DATA_OPTIONS[@]}"; do
        # LibriCount's folds train on readers of LibriSpeech's test set
        [[ " ${Options[*]} folds " == *" ${Name} "* ]] || Options+=("${Name}")
    done
    Help+="${DATA_HELP}"$'\n'
done
unset folds
# shellcheck disable=SC2034
captions=v1
# shellcheck disable=SC2034  # pam.sh reads these
DATA_OPTIONS=("${Options[@]}" captions)
# shellcheck disable=SC2034
DATA_HELP="  --captions NAME       release of AudioCaps' captions: v1 (2019) or v2 (AudioCaps 2.0, 2025) (v1)
$(awk '/^  --/ { again = $1 == "--folds" || seen[$1]++ } !again' <<<"${Help%$'\n'}")"
