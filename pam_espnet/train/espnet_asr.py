"""ESPnet's ASR task with ``frontend: pam``. Importing this registers it, for ``Speech2Text`` of ESPnet as well."""

import argparse

from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks.asr import ASRTask, frontend_choices

from pam_espnet.train.espnet_frontend import MixtureFrontend

frontend_choices.classes["pam"] = MixtureFrontend


class PaMASRTask(ASRTask):
    """ESPnet's, whose config.yaml also has what the frontend found, so that a trained model needs no LLM."""

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        model = super().build_model(args)
        if isinstance(model.frontend, MixtureFrontend):
            args.frontend_conf = {**args.frontend_conf, **model.frontend.found_options}
        return model
