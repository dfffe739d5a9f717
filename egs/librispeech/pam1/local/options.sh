# shellcheck shell=bash
# Sourced by pam.sh and local/data.sh: what local/data.sh of this recipe takes, a table for utils/parse_options.sh.
# shellcheck disable=SC2034
data_options="
librispeech     DIR      '${LIBRISPEECH:-}'         a copy that is there: DIR/LibriSpeech/test-clean or DIR/test-clean; empty: download
downloads       DIR      downloads  where archives and LibriSpeech/ go when they are downloaded
mirror          URL      ''         ask there first; an address that ends where /12/test-clean.tar.gz would follow
remove_archives BOOL     false      delete each archive once it is unpacked and complete
transcripts     CASE     lower      lower, as an LLM would write words without punctuation, or upper, as the corpus
dev_utterances  N        1000       how many of the dev set are kept for validation in training, 0 for all
check_counts    BOOL     true       stop when utterances or hours are not the published ones; false: a warning
seed            N        2026       of the prompts and of the choice of dev utterances"
