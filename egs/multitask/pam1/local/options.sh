# shellcheck shell=bash
# Sourced by pam.sh and local/data.sh: what local/data.sh of this recipe takes, a table for utils/parse_options.sh: what
# those of its three corpora take, and the release of AudioCaps. An option that two of them have, such as --librispeech,
# is given to both.
# shellcheck disable=SC1090,SC2030,SC2031,SC2034
corpus_options() {
    (. "../../$1/pam1/local/options.sh" && printf '%s\n' "${data_options}")
}
# Without LibriCount's folds, which train on readers of LibriSpeech's test set.
data_options="
captions        NAME     v1         release of AudioCaps' captions: v1 (2019) or v2 (AudioCaps 2.0, 2025)
$(for corpus in librispeech libricount audiocaps; do corpus_options "${corpus}"; done |
    awk '/^[a-z]/ { again = $1 == "folds" || seen[$1]++ } NF && !again')"
