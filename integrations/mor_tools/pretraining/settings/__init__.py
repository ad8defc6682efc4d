"""Every setting of a pretraining run: what it means, and which values work together.

A YAML file and `key=value` overrides become one frozen `Settings`. All errors in them are found
here, before a process group, a file or a model exists.
"""

from mor_tools.pretraining.settings.data import DataSettings
from mor_tools.pretraining.settings.model import ModelSettings, MoESettings
from mor_tools.pretraining.settings.parallel import ParallelSettings
from mor_tools.pretraining.settings.reporting import EvaluationSettings, WandbSettings
from mor_tools.pretraining.settings.run import Settings
from mor_tools.pretraining.settings.training import TrainingSettings, UptrainSettings

__all__ = [
    "DataSettings",
    "EvaluationSettings",
    "MoESettings",
    "ModelSettings",
    "ParallelSettings",
    "Settings",
    "TrainingSettings",
    "UptrainSettings",
    "WandbSettings",
]
