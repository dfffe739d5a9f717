# shellcheck shell=bash
# Sourced by pam.sh and local/data.sh: what local/data.sh of this recipe takes, a table for utils/parse_options.sh.
# shellcheck disable=SC2034
data_options="
librispeech     DIR      '${LIBRISPEECH:-}'         a copy that is there: DIR/LibriSpeech/train-clean-100 or DIR/train-clean-100; empty:
                                    download
libricount      DIR      '${LIBRICOUNT:-}'         a copy that is there: the folder with 3_<name>.wav, or the one above it; empty:
                                    download
noise           DIR      ''         recordings without speech, for training clips with nobody in them; empty: made noise
downloads       DIR      downloads  where downloads go
mirror          URL      ''         OpenSLR's mirror to ask first, see the LibriSpeech recipe
remove_archives BOOL     false      delete each archive once it is unpacked and complete
framings        TASKS    'count verify'  count (how many?), verify (is it this many? yes or no), or both
folds           BOOL     false      also write LibriCount in five folds, {train,dev,test}_fold<0..4>
check_counts    BOOL     true       stop when a corpus does not have as many clips as published; false: a warning
seed            N        2026       of everything random"
