"""Every kind of case, by the name that the table gives it."""

from tests.campaigns import body_cases, file_cases, kill_cases, settings_cases, text_cases
from tests.campaigns.campaign import Case

SELDOM = ("killed saving a model", "killed writing a file")
"""A fork of a process with torch in it takes far longer than what is tried in it."""
KINDS: dict[str, Case] = {
    "settings, command line": settings_cases.command_line,
    "settings, file": settings_cases.file,
    "request bodies": body_cases.body,
    "model folder": file_cases.folder_of_ours,
    "Megatron checkpoint": file_cases.megatron_checkpoint,
    "Llama folder": file_cases.llama,
    "published checkpoint": file_cases.published,
    "text": text_cases.lines,
    "token ids": text_cases.pair,
    "killed saving a model": kill_cases.folder_of_a_model,
    "killed writing a file": kill_cases.file_of_a_run,
}
