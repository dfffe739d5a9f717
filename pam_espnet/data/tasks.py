"""Tasks of a model: the metric and the default prompt of each."""

from dataclasses import dataclass

from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class TaskSpec:
    """A task by name, the metric that scores it (see ``pam_espnet.score``), and its default prompt."""

    name: str
    metric: str
    default_prompt: str


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("asr", metric="wer", default_prompt="Transcribe the speech."),
        TaskSpec("count", metric="count", default_prompt="How many people are speaking?"),
        TaskSpec("caption", metric="caption", default_prompt="Describe the sounds."),
        # speaker number verification: the number that is asked for is in each utterance's prompt
        TaskSpec("verify", metric="choice", default_prompt="Is one person speaking? Answer yes or no."),
    )
}


def task_spec(name: str) -> TaskSpec:
    """Look a task up by name. Raises ConfigError: unknown task; lists the known ones."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return TASKS[name]
