#!/usr/bin/env bash
# All stages of a PaM recipe, once. A recipe's run.sh calls it from the recipe's directory with its own defaults.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

template=$(dirname "${BASH_SOURCE[0]}")
template=${template#"${PWD}/"}
quoted=$([ $# -eq 0 ] || LC_ALL=C.UTF-8 printf ' %q' "$@")
export PAM_COMMAND="./run.sh${quoted}"  # kept beside the results
data_options=  # a table of what local/data.sh of a recipe takes beside --size, --data_dir and --nj
# shellcheck source=/dev/null
[ ! -f db.sh ] || . ./db.sh  # where corpora are, as in ESPnet: LIBRISPEECH=DIR, ...; defaults of the options of the data
# shellcheck source=/dev/null
[ ! -f local/options.sh ] || . local/options.sh
nj=$(nproc 2>/dev/null || echo 1)
((nj <= 8)) || nj=8

usage="Usage: ./run.sh [options]; a second run skips what is done, a killed one continues where it stopped

Stages
  1 data        fetch corpora and models, write data/<size>/<set>             (local/data.sh)
  2 format      validate; 16 kHz copies with passports in dump/<size>/raw
  3 train       feature cache, CTC warm start, training                       -> exp/<tag>
  4 decode      beam search on the test sets, with and without audio          -> exp/<tag>/decode_*
  5 score       scores with intervals, RESULTS.md, results.json, pictures     -> exp/<tag>
  6 pack        one file for another machine; only when asked for             -> exp/<tag>/<tag>.zip
  7 demo        a page in the browser that answers with it, until Ctrl-C; needs tools/setup.sh --extras demo
  8 upload      packed anew and sent to --hub_repo on the Hugging Face hub with a model card; prints what it will send

Options: name, value, default. This call had${quoted:- none} (with those that the recipe's run.sh gives)."
options="
stage           N        1          first stage
stop_stage      N        5          last stage
dry_run         BOOL     false      print what would be run, and stop
size            NAME     quick      size of the corpus and of the training: conf/size/<name>.yaml
fusion          NAME     pam        how encoders are combined: conf/fusion/<name>.yaml here, else in
                                    egs/TEMPLATE/pam1; or single:<encoder>, one encoder alone
tag             NAME     ''         experiment directory exp/<tag>; empty: <fusion>_<size>
train_config    FILES    conf/train.yaml  base configurations, separated by blanks (within a name: '\ ')
set             CHANGES  ''         changes to the configuration, key.sub=value separated by blanks
decode_config   FILE     conf/decode.yaml  options of the beam search
decode_tag      NAME     beam       decode directory exp/<tag>/decode_<name>
audio_off       BOOL     true       also decode with the waveform set to zero, as control
control_sets    NAMES    ''         for which of the test sets; empty: for all
all_prompts     BOOL     false      also decode with every other wording of <prompts>/<task>.txt; report the spread
prompts         DIR      conf/prompts  files of wordings for --all_prompts; the first is the one that the data has
use_cache       BOOL     true       train on cached hidden states; false runs the encoders in every step
rebuild_cache   BOOL     false      compute cached hidden states again
warm_start      BOOL     true       CTC warm start of the adapters before training
select          NAME     loss       the model that is kept: loss, ESPnet's average of its best epochs; or scores, the
                                    epoch of those kept whose answers to the validation set score best, all tasks equal
train_set       NAME     train      training set
valid_set       NAME     dev        validation set
test_sets       NAMES    'test_asr test_count test_caption'  separated by blanks
max_seconds     S        30         longer utterances are skipped, and listed
archive_mb      MB       0          stage 2 puts audio into archives of about that size, for large corpora on network
                                    disks 1000; 0: a file for each utterance
nj              N        ${nj}          parallel processes where work is split: the cores, at most 8
ngpu            N        0          GPUs of each node, a process for each, and for decoding; 0 = CPU
num_nodes       N        1          nodes for stage 3, with --cmd slurm
train_nj        N        ''         processes that train on each node; empty: one per GPU, on a CPU one
cmd             NAME     ${PAM_CMD:-local}      where jobs of stages 3 and 4 run: local, slurm (cmd.sh; \$PAM_CMD)
decode_nj       N        ''         processes that decode, each with the whole model; empty: --nj, and on GPUs --ngpu,
                                    each with one GPU
inference_nj    N        ''         ESPnet's name for --decode_nj, stronger than it
gpu_inference   BOOL     ''         decode on GPUs, one for each process; empty: true where --ngpu is not 0
batch_size      SIZE     auto       utterances decoded together; auto: on a GPU as many as its memory holds, on a CPU 8
decode_dtype    NAME     ''         precision of the LLM in decoding: float32, bfloat16, or int8 (on x86 CPUs); empty:
                                    float32, on a GPU bfloat16
with_models     BOOL     false      stages 6 and 8: pretrained models, too, those whose licences are known to allow it
hub_repo        NAME     ''         stage 8: org/name on the Hugging Face hub, made if need be; the token is that of
                                    'hf auth login', or \$HF_TOKEN
hub_public      BOOL     false      stage 8: whether all may see it
${data_options:+
Options of the data of this recipe; relative paths start at its folder${data_options}}"
# shellcheck source=utils/parse_options.sh
. "${template}/../../../utils/parse_options.sh"

# shellcheck source=egs/TEMPLATE/pam1/stages.sh
. "${template}/stages.sh"
[ $# -eq 0 ] || fail "unexpected word '$1'" "  -> options look like --stage 1; --help lists them"
device=cuda
((ngpu > 0)) || device=cpu
decode_nj=${inference_nj:-${decode_nj}} decode_device=${device}
case "${gpu_inference}" in true) decode_device=cuda ;; false) decode_device=cpu ;; esac
if [ "${decode_device}" = cuda ]; then
    decode_gpus=1 decode_nj=${decode_nj:-$((ngpu > 0 ? ngpu : 1))} decode_dtype=${decode_dtype:-bfloat16}
else
    decode_gpus=0 decode_nj=${decode_nj:-${nj}} decode_dtype=${decode_dtype:-float32}
fi
((nj > 0 && decode_nj > 0)) || fail "--nj and --decode_nj must be at least 1"
[[ ${batch_size} =~ ^(auto|[1-9][0-9]*)$ ]] || fail "--batch_size takes a number from 1 or auto, not '${batch_size}'"
[ "${num_nodes}" = 1 ] || [ "${cmd:-local}" != local ] || [ -n "${train_cmd:-}" ] ||
    fail "--num_nodes ${num_nodes}: this machine is one node" "  -> --cmd slurm; on other clusters see pam_train --help"
[[ ${select} =~ ^(loss|scores)$ ]] || fail "--select takes loss or scores, not '${select}'"
[ -d conf ] || fail "no conf/ here: call pam.sh through the run.sh of a recipe"

# shellcheck disable=SC2162  # without -r, so that a blank may be written within a name
read -a configs <<<"${train_config}"
read -r -a changes <<<"${set}"
read -r -a tests <<<"${test_sets}"
controlled=() others=()  # test sets with and without a control
for name in "${tests[@]}"; do
    if [ "${audio_off}" = true ] && [[ " ${control_sets:-${name}} " == *" ${name} "* ]]; then
        controlled+=("${name}")
    else
        others+=("${name}")
    fi
done
fusion=${fusion/#single:/single_}
overlay=conf/fusion/${fusion}.yaml
[ -f "${overlay}" ] || overlay=${template}/${overlay}
if [ ! -f "${overlay}" ] && [[ ${fusion} == single_* ]]; then
    overlay=${template}/conf/fusion/single.yaml
    changes+=("frontend_conf.fusion_conf.encoder=${fusion#single_}")
fi
[ -f "${overlay}" ] || fail "conf/fusion/${fusion}.yaml: no such file" \
    "  -> there are: $(echo conf/fusion/*.yaml "${template}"/conf/fusion/*.yaml), and single:<encoder>"
[ -f "conf/size/${size}.yaml" ] ||
    fail "conf/size/${size}.yaml: no such file" "  -> there are: $(echo conf/size/*.yaml)"
configs+=("${overlay}" "conf/size/${size}.yaml")
tag=${tag:-${fusion}_${size}}
data=data/${size}
raw=dump/${size}/raw
exp=exp/${tag}
worded=dump/${size}/$(basename "${prompts}")  # the test sets in other wordings

if [ "${dry_run}" = false ]; then
    # shellcheck source=egs/TEMPLATE/pam1/path.sh
    . "${template}/path.sh"
else
    python=python
    PAM_ROOT=$(cd "${template}/../../.." && pwd)
fi
# shellcheck source=egs/TEMPLATE/pam1/cmd.sh
. "${template}/cmd.sh"

if wants 1; then
    begin 1 data "local/ (packages and their checksums)" "downloads/, ${data}/"
    run "${python}" "${PAM_ROOT}/tools/check_install.py" --config "conf/size/${size}.yaml"
    data_command=(local/data.sh --size "${size}" --data_dir "${data}" --nj "${nj}")
    for option in $(table_names "${data_options}"); do
        data_command+=("--${option}" "${!option}")
    done
    run "${data_command[@]}"
    end "the same command with --stage 2"
fi

if wants 2; then
    begin 2 format "${data}/" "${raw}/"
    sets=("${train_set}" "${valid_set}" "${tests[@]}")
    archives=()
    [ "${archive_mb}" = 0 ] || archives=(--archive_mb "${archive_mb}")
    module pam_format --data "${sets[@]/#/${data}/}" --out "${sets[@]/#/${raw}/}" --jobs "${nj}" \
        --max_seconds "${max_seconds}" "${archives[@]}"
    end "the same command with --stage 3"
fi

if wants 3; then
    begin 3 train "${raw}/, ${configs[*]}" "dump/${size}/feats/, ${exp}/"
    if [ -f local/check_train.py ]; then  # a recipe's own reasons to refuse a training set
        needs "${data}/${train_set}" "--stage 1 --stop_stage 2"
        run "${python}" local/check_train.py --train "${data}/${train_set}" "${data}/${valid_set}" \
            --tests "${tests[@]/#/${data}/}"
    fi
    needs "${raw}/${train_set}" "--stage 1 --stop_stage 2"
    if [ "${warm_start}" = true ]; then
        changes+=("model_conf.ctc_tokens=${exp}/ctc_tokens.txt")
    else
        changes+=("model_conf.ctc_weight=0" "model_conf.ctc_posteriors=false")  # there is no head
    fi
    experiment=(--train "${raw}/${train_set}" --valid "${raw}/${valid_set}" --exp "${exp}" --config "${configs[@]}"
        --set "${changes[@]}")
    [ "${use_cache}" = false ] || experiment+=(--feats "dump/${size}/feats")
    # It checks the configuration, too.
    module pam_estimate "${experiment[@]}" --ngpu $((ngpu * num_nodes)) --fetch true --num_nodes "${num_nodes}"
    nodes=(--ngpu "${ngpu}")
    [ "${num_nodes}" = 1 ] || nodes+=(--num_nodes "${num_nodes}")
    processes=("${nodes[@]}")
    [ -z "${train_nj}" ] || processes+=(--processes "${train_nj}")
    log=${exp}/log/cache.log
    [ "${use_cache}" = false ] || job "${log}" "${ngpu}" "${num_nodes}" "${log}" pam_cache_features "${experiment[@]}" \
        "${nodes[@]}" --processes $((ngpu > 0 ? ngpu : nj)) --device "${device}" --rebuild "${rebuild_cache}"
    init=()
    if [ "${warm_start}" = true ]; then
        log=${exp}/log/warm_start.log
        job "${log}" "${ngpu}" "${num_nodes}" "${log}" pam_warm_start "${experiment[@]}" "${processes[@]}"
        init=(--init_trained "${exp}/warm_start.safetensors")
    fi
    if [ -f "${exp}/model.safetensors" ] && [ "${dry_run}" = false ]; then
        echo "${exp}/model.safetensors: already trained"
    else
        job "${exp}/progress.txt" "${ngpu}" "${num_nodes}" "${exp}/log/train.log" pam_train "${experiment[@]}" \
            "${init[@]}" "${processes[@]}"
    fi
    if [ "${select}" = scores ] || [ -f "${exp}/selection.json" ]; then
        log=${exp}/log/select.log
        job "${log}" "${decode_gpus}" 1 "${log}" pam_select --exp "${exp}" --by "${select}" \
            --data "${raw}/${valid_set}" --config "${decode_config}" --batch_size "${batch_size}" \
            --dtype "${decode_dtype}" --device "${decode_device}"
    fi
    end "the same command with --stage 4"
fi

if wants 4; then
    begin 4 decode "${exp}/model.safetensors, ${raw}/" "${exp}/decode_${decode_tag}*/"
    needs "${exp}/model.safetensors" "--stage 3 --stop_stage 3"
    ((decode_gpus == 0)) || decode_run+=(--gpu 1)
    decode_dir=${exp}/decode_${decode_tag} controls=()
    complete=true
    ((${#controlled[@]} == 0)) || controls=(--audio_off "${controlled[@]/#/${decode_dir}_audio_off/}")
    tried=("${controlled[@]}" "${others[@]}") # as the command wants them
    sources=("${tried[@]/#/${raw}/}") targets=("${tried[@]/#/${decode_dir}/}")
    if [ "${all_prompts}" = true ]; then
        reworded=(SET/NUMBER)
        if [ "${dry_run}" = false ]; then
            listed=$("${python}" -m pam_espnet.bin.pam_reword --data "${sources[@]}" --prompts "${prompts}" \
                --out "${worded}")
            mapfile -t reworded <<<"${listed}"
        fi
        for name in "${reworded[@]}"; do
            sources+=("${worded}/${name}")
            targets+=("${decode_dir}/${name%/*}/prompts/${name##*/}")
        done
    fi
    for target in "${targets[@]}" "${controls[@]:1}"; do
        [ -f "${target}/stats.json" ] || complete=false
    done
    args=(--exp "${exp}" --data "${sources[@]}" --out "${targets[@]}" "${controls[@]}"
        --config "${decode_config}" --batch_size "${batch_size}" --dtype "${decode_dtype}" --device "${decode_device}")
    if [ "${dry_run}" = true ] || [ "${complete}" = false ]; then
        log=${decode_dir}/log/decode
        background "${log}.1.log" "${log}.*.log" \
            "${decode_run[@]}" --max-jobs-run "${decode_nj}" JOB=1:"${decode_nj}" "${log}.JOB.log" \
            "${python}" -m pam_espnet.bin.pam_decode "${args[@]}" --shard "JOB/${decode_nj}" --threads 1
    fi
    module pam_decode "${args[@]}" --shard "1/${decode_nj}" --merge
    end "the same command with --stage 5"
fi

if wants 5; then
    begin 5 score "${exp}/decode_*/, ${raw}/" "${exp}/RESULTS.md, ${exp}/results.json, pictures"
    needs "${exp}/decode_${decode_tag}" "--stage 4 --stop_stage 4"
    names=("${decode_tag}")
    ((${#controlled[@]} == 0)) || names+=("${decode_tag}_audio_off")
    module pam_score --exp "${exp}" --data "${tests[@]/#/${raw}/}" --decode_name "${names[@]}" \
        --prompts "${worded}"
    end "see ${PWD}/${exp}/RESULTS.md; the same command with --stage 6 --stop_stage 6 packs it into one file, with
  --stage 8 --stop_stage 8 --hub_repo org/name sends it to the Hugging Face hub"
fi

if wants 6; then
    archive=${exp}/${tag}.zip
    begin 6 pack "${exp}/, its models" "${archive}"
    needs "${exp}/results.json" "--stage 3 --stop_stage 5"
    module pam_pack --exp "${exp}" --decode_name "${decode_tag}" --out "${archive}" \
        --with_models "${with_models}"
    end "${python} -m pam_espnet.bin.pam_inference --model ${PWD}/${archive} clip.wav --prompt \"...\",
  or the same command with --stage 7 --stop_stage 7"
fi

if wants 7; then
    begin 7 demo "${exp}/${tag}.zip" "nothing"
    module pam_demo --model "${exp}/${tag}.zip" --device "${decode_device}"
fi

if wants 8; then
    begin 8 upload "${exp}/, its models" "${hub_repo:-nothing} on the Hugging Face hub"
    [ -n "${hub_repo}" ] || fail "stage 8 needs --hub_repo org/name, where it is sent to"
    needs "${exp}/results.json" "--stage 3 --stop_stage 5"
    module pam_upload --exp "${exp}" --decode_name "${decode_tag}" --repo "${hub_repo}" --public "${hub_public}" \
        --with_models "${with_models}"
    end "${python} -m pam_espnet.bin.pam_serve --model ${hub_repo} (tools/setup.sh --extras serve first),
  or ${python} -m pam_espnet.bin.pam_inference --model ${hub_repo} clip.wav --prompt \"...\""
fi
