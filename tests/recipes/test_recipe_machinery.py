"""pam.sh and the configurations of every recipe, without running a stage."""

import inspect
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from libri_corpora import copy_recipe

from pam_espnet.cli import run_record

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent for path in ROOT.glob("egs/*/*/run.sh") if path.parent.parent.name != "TEMPLATE")
TEMPLATE = ROOT / "egs/TEMPLATE/pam1"


def fusions(recipe: Path) -> list[str]:
    """All that --fusion takes: files of the recipe and of the template, and each of its encoders alone."""
    files = {path.stem for folder in (recipe, TEMPLATE) for path in folder.glob("conf/fusion/*.yaml")} - {"single"}
    encoders = yaml.safe_load((recipe / "conf/train.yaml").read_text())["frontend_conf"]["encoders"]
    return sorted({name.replace("single_", "single:") for name in files} | {f"single:{name}" for name in encoders})


def overlay(recipe: Path, fusion: str) -> tuple[Path, list[str]]:
    """The configuration file and the changes that pam.sh takes for a fusion."""
    name = fusion.replace(":", "_")
    for folder in (recipe, TEMPLATE):
        if (path := folder / f"conf/fusion/{name}.yaml").is_file():
            return path, []
    return TEMPLATE / "conf/fusion/single.yaml", [f"frontend_conf.fusion_conf.encoder={name.removeprefix('single_')}"]


FUSIONS = [
    pytest.param(recipe, fusion, id=f"{recipe.parent.name}-{fusion}")
    for recipe in RECIPES
    for fusion in fusions(recipe)
]
CONFIGS = [
    pytest.param(recipe, fusion, size.stem, id=f"{recipe.parent.name}-{fusion}-{size.stem}")
    for recipe in RECIPES
    for fusion in fusions(recipe)
    for size in sorted(recipe.glob("conf/size/*.yaml"))
]
# What may be laid over conf/train.yaml besides: for another machine, for another LLM.
OVERLAYS = [
    pytest.param(path.parents[1], path.name, id=f"{path.parents[2].name}-{path.stem}")
    for recipe in RECIPES
    for path in sorted(recipe.glob("conf/*.yaml"))
    if path.name not in ("train.yaml", "card.yaml") and not path.name.startswith("decode")
]


def call(recipe: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["./run.sh", *args], cwd=recipe, capture_output=True, text=True, check=False)


def test_there_is_something_to_test() -> None:
    assert {recipe.parent.name for recipe in RECIPES} >= {"audiocaps", "libricount", "librispeech", "mini", "multitask"}
    assert len(CONFIGS) >= 80 and len(OVERLAYS) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.parent.name)
def test_help_names_every_option(recipe: Path) -> None:
    done = call(recipe, "--help")
    assert done.returncode == 0
    for option in ("--stage", "--stop_stage", "--dry_run", "--size", "--fusion", "--tag", "--ngpu", "--nj"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("options", "sets"),
    [
        ([], ["test_asr", "test_count", "test_caption"]),
        (["--control_sets", "", "--test_sets", "test_voices test_asr"], ["test_voices", "test_asr"]),
        (["--control_sets", "test_asr", "--test_sets", "test_voices test_asr"], ["test_asr"]),
        (["--test_sets", "test_voices"], []),
        (["--audio_off", "false"], []),
    ],
)
def test_the_control_is_decoded_for_the_sets_that_are_named(options: list[str], sets: list[str]) -> None:
    mini = next(recipe for recipe in RECIPES if recipe.parent.name == "mini")
    done = call(mini, "--dry_run", "true", "--stage", "4", "--stop_stage", "5", *options)
    words = next(line for line in done.stdout.splitlines() if line.endswith("--merge ")).split()
    folders = [word.rpartition("/")[2] for word in words if "decode_beam_audio_off/" in word]
    data = words[words.index("--data") + 1 : words.index("--out")]
    assert folders == sets and [word.rpartition("/")[2] for word in data[: len(sets)]] == sets  # the first of --data
    assert ("beam_audio_off" in done.stdout.partition("pam_score")[2]) == bool(sets)


@pytest.mark.parametrize(("recipe", "fusion", "size"), CONFIGS)
def test_dry_run_prints_all_stages_and_writes_nothing(recipe: Path, fusion: str, size: str) -> None:
    before = sorted(recipe.iterdir())
    done = call(recipe, "--dry_run", "true", "--fusion", fusion, "--size", size)
    assert done.returncode == 0, done.stderr
    for stage in range(1, 6):
        assert f"stage {stage} " in done.stdout
    file, changes = overlay(recipe, fusion)
    assert f"exp/{fusion.replace(':', '_')}_{size}" in done.stdout and all(change in done.stdout for change in changes)
    assert str(file.relative_to(recipe if file.is_relative_to(recipe) else TEMPLATE.parents[1])) in done.stdout
    starts = ("pam_format --data", "pam_estimate --train", "pam_warm_start --train", "pam_train --train", "pam_score")
    for module in starts:
        assert f"pam_espnet.bin.{module}" in done.stdout
    assert sorted(recipe.iterdir()) == before


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.parent.name)
def test_packing_and_the_demo_are_not_run_by_default(recipe: Path) -> None:
    done = call(recipe, "--dry_run", "true", "--stage", "5", "--stop_stage", "7", "--tag", "mine")
    assert done.returncode == 0 and "pam_pack --exp exp/mine --decode_name beam --out exp/mine/mine.zip" in done.stdout
    assert "pam_demo --model exp/mine/mine.zip" in done.stdout
    assert "stage 6 " not in call(recipe, "--dry_run", "true").stdout


def test_upload_needs_a_name_and_is_private() -> None:
    words = ["--dry_run", "true", "--stage", "8", "--stop_stage", "8", "--tag", "mine"]
    done = call(RECIPES[0], *words)
    assert done.returncode == 1 and "stage 8 needs --hub_repo org/name" in done.stderr
    done = call(RECIPES[0], *words, "--hub_repo", "me/mine")
    assert done.returncode == 0
    command = "pam_upload --exp exp/mine --decode_name beam --repo me/mine"
    assert f"{command} --public false --with_models false" in done.stdout
    more = call(RECIPES[0], *words, "--hub_repo", "me/mine", "--hub_public", "true", "--with_models", "true")
    assert f"{command} --public true --with_models true" in more.stdout


def test_audio_is_put_into_archives_only_when_asked_for() -> None:
    words = ["--dry_run", "true", "--stage", "2", "--stop_stage", "2"]
    assert "--archive_mb" not in call(RECIPES[0], *words).stdout
    asked = call(RECIPES[0], *words, "--archive_mb", "1000", "--max_seconds", "30").stdout
    assert "--max_seconds 30 --archive_mb 1000 " in asked


def test_a_range_of_stages_prints_only_those() -> None:
    done = call(RECIPES[0], "--dry_run", "true", "--stage", "4", "--stop_stage", "4")
    assert "stage 4 " in done.stdout and "stage 3 " not in done.stdout and "stage 5 " not in done.stdout


def test_decoding_on_gpus_is_one_process_each_in_bfloat16() -> None:
    for given, jobs, dtype in (([], 3, "float32"), (["--ngpu", "2"], 2, "bfloat16"), (["--ngpu", "1"], 1, "bfloat16")):
        done = call(RECIPES[0], "--dry_run", "true", "--stage", "4", "--stop_stage", "4", "--nj", "3", *given)
        gpu = "--gpu 1 " if given else ""
        assert f"utils/run.py {gpu}--max-jobs-run {jobs} JOB=1:{jobs} " in done.stdout
        assert f"--batch_size auto --dtype {dtype} --device {'cuda' if given else 'cpu'}" in done.stdout
    more = ["--ngpu", "2", "--decode_nj", "8", "--decode_dtype", "float32", "--batch_size", "4"]
    done = call(RECIPES[0], "--dry_run", "true", "--stage", "4", "--stop_stage", "4", *more)
    assert "JOB=1:8 " in done.stdout and "--batch_size 4 --dtype float32" in done.stdout


@pytest.mark.parametrize(
    ("given", "runner", "last"),
    [
        ("--inference_nj 5", "--max-jobs-run 5 JOB=1:5 ", "float32 --device cpu"),
        ("--ngpu 2 --inference_nj 5", "--gpu 1 --max-jobs-run 5 JOB=1:5 ", "bfloat16 --device cuda"),
        ("--ngpu 2 --gpu_inference false", "--max-jobs-run 3 JOB=1:3 ", "float32 --device cpu"),
        ("--ngpu 2 --gpu_inference true", "--gpu 1 --max-jobs-run 2 JOB=1:2 ", "bfloat16 --device cuda"),
        ("--gpu_inference true", "--gpu 1 --max-jobs-run 1 JOB=1:1 ", "bfloat16 --device cuda"),
    ],
)
def test_decoding_takes_espnet_s_names(given: str, runner: str, last: str) -> None:
    words = ["--dry_run", "true", "--stage", "3", "--stop_stage", "4", "--nj", "3", "--select", "scores"]
    shown = call(RECIPES[0], *words, *given.split()).stdout.splitlines()
    decode = [line for line in shown if "pam_decode" in line]
    assert f"utils/run.py {runner}" in decode[0] and len(decode) == 2
    (select,) = (line for line in shown if "pam_select" in line)
    assert f"utils/run.py --gpu {int('cuda' in last)} " in select  # it decodes, too
    assert all(f"--dtype {last} " in line for line in (*decode, select))
    (train,) = (line for line in shown if "pam_train " in line)
    assert f"--gpu {2 if '--ngpu' in given else 0} " in train


def test_a_file_db_sh_has_the_paths_of_corpora(tmp_path: Path) -> None:
    recipe = copy_recipe(tmp_path, "multitask", "librispeech", "libricount", "audiocaps")
    (recipe / "db.sh").write_text("LIBRISPEECH='/corpora/Libri Speech'\nAUDIOCAPS=/clips\n")
    words = ["--dry_run", "true", "--stop_stage", "1", "--audio", "/others"]
    done = call(recipe, *words)
    for option in ("--librispeech /corpora/Libri\\ Speech ", "--libricount '' ", "--audio /others "):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fusion", "none"], "conf/fusion/none.yaml"),
        (["--size", "none"], "conf/size/none.yaml"),
        (["--stage", "two"], "--stage"),
        (["--fusoin", "pam"], "--fusion"),
        (["--dry_run", "maybe"], "true or false"),
        (["--select", "luck"], "loss or scores"),
        (["--batch_size", "0"], "number from 1 or auto"),
        (["--decode_nj", "0"], "at least 1"),
        (["extra"], "extra"),
    ],
)
def test_mistakes_are_named(args: list[str], message: str) -> None:
    done = call(RECIPES[0], "--dry_run", "true", *args)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(("recipe", "fusion", "size"), CONFIGS)
def test_every_configuration_is_one_that_training_accepts(recipe: Path, fusion: str, size: str, tmp_path: Path) -> None:
    file, changes = overlay(recipe, fusion)
    check_configuration(recipe, [Path("conf/train.yaml"), file, Path(f"conf/size/{size}.yaml")], changes, tmp_path)


@pytest.mark.parametrize(("recipe", "name"), OVERLAYS)
def test_every_further_file_is_one_that_training_accepts(recipe: Path, name: str, tmp_path: Path) -> None:
    size = sorted(recipe.glob("conf/size/*.yaml"))[0].name
    files = [Path(f"conf/{file}") for file in ("train.yaml", name, "fusion/pam.yaml", f"size/{size}")]
    check_configuration(recipe, files, [], tmp_path)
    configs = f"conf/train.yaml conf/{name}"
    done = call(recipe, "--dry_run", "true", "--train_config", configs)
    assert done.returncode == 0 and configs in done.stdout, done.stderr


def check_configuration(recipe: Path, files: list[Path], changes: list[str], tmp_path: Path) -> None:
    """ESPnet's parser knows every key, every block of options fits its reader, and the encoders' rates go together."""
    from pam_espnet.config import check_options, load_yaml, used_encoders, write_config
    from pam_espnet.data.batching import BatchingOptions
    from pam_espnet.data.prompts import read_wordings
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.frontend.adapter import stacking
    from pam_espnet.frontend.encoders.registry import encoder_class
    from pam_espnet.frontend.frontend import PaMFrontend
    from pam_espnet.frontend.fusion.registry import build_fusion
    from pam_espnet.frontend.masking import MaskOptions
    from pam_espnet.llm.llm import LLM
    from pam_espnet.model import ESPnetPaMModel
    from pam_espnet.train.experiment import merged_config
    from pam_espnet.train.task import PaMTask
    from pam_espnet.train.warm_options import WarmStartOptions

    config = merged_config([recipe / file for file in files], changes)
    write_config(config, tmp_path / "train.yaml")
    args = PaMTask.get_parser().parse_args(["--config", str(tmp_path / "train.yaml"), "--output_dir", str(tmp_path)])
    BatchingOptions(**args.batching_conf)
    WarmStartOptions(**args.warm_start_conf)
    read_wordings({task: recipe / path for task, path in args.prompt_files.items()})
    frontend = args.frontend_conf
    MaskOptions(**frontend.get("mask_conf", {}))
    check_options(config["llm_conf"], "llm_conf", LLM.from_pretrained, LLM)
    check_options(frontend, "frontend_conf", PaMFrontend)
    model_conf = {k: v for k, v in config["model_conf"].items() if k != "extract_feats_in_collect_stats"}
    check_options(model_conf, "model_conf", ESPnetPaMModel)
    encoders = used_encoders(config)
    counts = [len(frontend["encoders"][name]["layers"]) for name in encoders]
    options = frontend.get("fusion_conf", {})
    build_fusion(frontend["fusion"], num_layers=counts, width=8, prompt_width=8, names=encoders, **options)
    for name in encoders:
        own = dict(frontend["encoders"][name])
        kind = own.pop("type")
        inspect.signature(encoder_class(kind)).bind(**own)
        stacking(RATES[kind], frontend["frame_rate"], name)
    assert set(args.lr_scale_conf) <= {"decoder", "frontend", "frontend.fusion.experts", "frontend.fusion.project"}
    for decode in recipe.glob("conf/decode*.yaml"):
        AnswerOptions.from_dict(load_yaml(decode), decode)


# Frames per second that each type of encoder emits (as published models are configured), Hz.
RATES = {"whisper": 50.0, "hf_wave": 50.0, "ast": 10.0, "yamnet": 6.25, "pyannote": 25.0}


@pytest.mark.parametrize(("recipe", "fusion"), FUSIONS)
def test_a_model_is_built_of_every_fusion(recipe: Path, fusion: str, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """With tiny parts instead of the ones that a configuration names."""
    from pam_espnet.model import build_model
    from pam_espnet.train.experiment import merged_config

    file, changes = overlay(recipe, fusion)
    config = merged_config([recipe / "conf/train.yaml", file], changes)
    config["llm"] = str(tiny_llm_dir)
    encoders = config["frontend_conf"]["encoders"]
    config["frontend_conf"]["encoders"] = {name: {"type": "tiny_encoder:TinyEncoder"} for name in encoders}
    config["frontend_conf"]["frame_rate"] = 12.5  # the tiny encoder has 25 Hz
    (tmp_path / "tokens.txt").write_text("5\n6\n")
    config["model_conf"]["ctc_tokens"] = str(tmp_path / "tokens.txt")
    names = set(build_model(config).trainable_parameters())
    assert any("lora" in name for name in names)
    for prefix in (*config.get("lr_scale_conf", {}), *config["warm_start_conf"].get("lr_scales", {})):
        assert any(name.startswith(prefix) for name in names), f"{prefix} matches nothing"


@pytest.mark.parametrize(
    "script",
    [pytest.param(script, id=recipe.parent.name) for recipe in RECIPES for script in recipe.glob("run_ablation.sh")],
)
def test_a_comparison_runs_every_fusion_once_and_puts_them_side_by_side(script: Path) -> None:
    recipe = script.parent
    before = sorted(recipe.iterdir())
    done = subprocess.run([str(script), "--dry_run", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = fusions(recipe)
    assert sorted(line[4:] for line in done.stdout.splitlines() if line.startswith("=== ")) == names
    assert done.stdout.count("stage 5 (score)") == len(names)
    assert done.stdout.count("--audio_off exp/") == 2  # decoding and joining, of the first fusion alone
    report = done.stdout.splitlines()[-1]
    assert "pam_score --compare exp/pam_" in report
    assert all(f" exp/{name.replace(':', '_')}_" in report for name in names)
    assert sorted(recipe.iterdir()) == before


def test_a_folder_with_blank_and_apostrophe_is_one_word(tmp_path: Path) -> None:
    recipe = copy_recipe(tmp_path / "bob's own tree", "mini")
    options = ["--dry_run", "true", "--fusion", "single:whisper"]
    options += ["--train_config", r"conf/train.yaml conf/my\ own.yaml"]
    for more, runner in (
        ([], ["utils/run.py"]),
        (["--cmd", "slurm"], ["utils/slurm.py", "--config", "egs/TEMPLATE/pam1/slurm.conf"]),
    ):
        done = call(recipe, *options, *more)
        assert done.returncode == 0, done.stderr
        commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("    ")]
        jobs = [words for words in commands if words[0].endswith(runner[0])]
        assert len(jobs) == 4  # cache, warm start, training, decoding
        root = tmp_path / "bob's own tree"
        for words in jobs:
            assert words[: len(runner)] == [str(root / word) if "/" in word else word for word in runner]
        assert "conf/my own.yaml" in jobs[0]


def test_jobs_of_another_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("train_cmd", r"/opt/my\ queue --time 3")
    done = call(RECIPES[0], "--dry_run", "true")
    words = next(shlex.split(line) for line in done.stdout.splitlines() if "pam_train" in line)
    assert words[:4] == ["/opt/my queue", "--time", "3", "--gpu"]


@pytest.mark.parametrize("typed", ["/data/bob's", "a b", 'say "hi"', "$(touch pwned)", "größer", "back\\slash"])
def test_the_command_is_kept_word_by_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    recipe = copy_recipe(tmp_path / "tree", "mini")
    (recipe / "local/options.sh").write_text('printf "%s" "${PAM_COMMAND}" >command\n')
    assert call(recipe, "--dry_run", "true", "--train_set", typed).returncode == 0
    monkeypatch.setenv("PAM_COMMAND", (recipe / "command").read_text())
    assert run_record("x")["command"][-2:] == ["--train_set", typed]
    monkeypatch.setenv("PAM_COMMAND", f"./run.sh {typed}")  # of a caller who quotes nothing
    assert run_record("x")["command"][0] == "./run.sh"


def test_a_new_recipe_is_made_and_refuses_to_overwrite(tmp_path: Path) -> None:
    """setup.sh needs the tree around it, so it runs on a copy of egs/ and utils/."""
    import shutil

    shutil.copytree(ROOT / "egs" / "TEMPLATE", tmp_path / "egs" / "TEMPLATE")
    shutil.copytree(ROOT / "egs" / "mini" / "pam1" / "conf", tmp_path / "egs" / "mini" / "pam1" / "conf")
    shutil.copytree(ROOT / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    setup = tmp_path / "egs" / "TEMPLATE" / "pam1" / "setup.sh"
    target = tmp_path / "egs" / "corpus" / "pam1"
    done = subprocess.run([str(setup), str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert call(target, "--dry_run", "true").returncode == 0
    again = subprocess.run([str(setup), str(target)], capture_output=True, text=True, check=False)
    assert again.returncode != 0 and "exists already" in again.stderr
    outside = subprocess.run([str(setup), str(tmp_path / "x" / "pam1")], capture_output=True, text=True, check=False)
    assert outside.returncode != 0 and "egs/" in outside.stderr
