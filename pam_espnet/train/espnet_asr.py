"""ESPnet's ASR task with ``frontend: pam``. Importing this registers it, for ``Speech2Text`` of ESPnet as well."""

import argparse
from importlib.util import find_spec

from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks.asr import ASRTask, frontend_choices

from pam_espnet.errors import ConfigError
from pam_espnet.train.espnet_frontend import MixtureFrontend

frontend_choices.classes["pam"] = MixtureFrontend


class PaMASRTask(ASRTask):
    """ESPnet's, whose config.yaml also has what the frontend found, so that a trained model needs no LLM.

    Raises ConfigError: error rates are to be reported in training, and the package that ESPnet counts them with is not
        installed; ESPnet itself finds that out at the end of the first epoch.
    """

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        rates = [name for name in ("report_cer", "report_wer") if args.model_conf.get(name, True)]
        if rates and not args.collect_stats and find_spec("editdistance") is None:
            options = " ".join(f"--model_conf {name}=false" for name in rates)
            raise ConfigError(
                f"model_conf: {', '.join(rates)}: ESPnet counts errors with the package editdistance, which is not "
                f"installed\n  -> pip install editdistance, or {options}"
            )
        super().main_worker(args)

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        model = super().build_model(args)
        if isinstance(model.frontend, MixtureFrontend):
            args.frontend_conf = {**args.frontend_conf, **model.frontend.found_options}
        return model
