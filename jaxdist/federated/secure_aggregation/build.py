"""From the block `secure_aggregation:` to the rules of a round and the quantiser."""

from jaxdist.config.privacy import SecureAggregation
from jaxdist.federated.secure_aggregation.graph import degree_for, threshold_for
from jaxdist.federated.secure_aggregation.quantise import Quantiser
from jaxdist.federated.secure_aggregation.rules import Rules


def build_secure_aggregation(block: SecureAggregation, num_clients: int, size: int) -> tuple[Rules, Quantiser]:
    """For rounds of so many clients and updates of `size` elements. Raises UserError for numbers that do not fit."""
    quantiser = Quantiser(block.range, block.bits, num_clients, block.max_weight or 1, block.rounding)
    degree = block.neighbours or (num_clients - 1 if block.identities else degree_for(num_clients, block.threshold))
    threshold = threshold_for(degree + 1, block.threshold)
    return Rules(num_clients, threshold, degree, size + 1, quantiser.word_bits), quantiser
