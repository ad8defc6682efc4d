"""Small semantic faults, as somebody might make them, from all parts of the library."""

from tests.campaigns.planted_faults.generation import GENERATION_FAULTS
from tests.campaigns.planted_faults.megatron import MEGATRON_FAULTS
from tests.campaigns.planted_faults.model import MODEL_FAULTS
from tests.campaigns.planted_faults.routing import ROUTING_FAULTS
from tests.campaigns.planted_faults.training import TRAINING_FAULTS

FAULTS = [
    *ROUTING_FAULTS,
    *MODEL_FAULTS,
    *GENERATION_FAULTS,
    *TRAINING_FAULTS,
    *MEGATRON_FAULTS,
]
