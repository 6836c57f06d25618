"""From the block `secure_aggregation:` to the rules of a round and the quantiser."""

from jaxdist.config.errors import UserError
from jaxdist.config.privacy import SecureAggregation
from jaxdist.federated.secure_aggregation.graph import EXPOSED, degree_for, exposed, threshold_for
from jaxdist.federated.secure_aggregation.quantise import Quantiser
from jaxdist.federated.secure_aggregation.rules import Rules


def build_secure_aggregation(block: SecureAggregation, num_clients: int, size: int) -> tuple[Rules, Quantiser]:
    """For rounds of so many clients and updates of `size` elements. Raises UserError for numbers that do not fit, and
    for so few neighbours that clients might be laid bare."""
    quantiser = Quantiser(block.range, block.bits, num_clients, block.max_weight or 1, block.rounding)
    degree = block.neighbours or (num_clients - 1 if block.identities else degree_for(num_clients, block.threshold))
    threshold = threshold_for(degree + 1, block.threshold)
    if exposed(num_clients, degree, threshold) > EXPOSED:
        raise UserError(
            f"strategy.secure_aggregation.neighbours: with {degree} of {num_clients} clients, the odds that a tenth "
            f"of them lay another bare are above 2^-40; leave it out ({degree_for(num_clients, block.threshold)})"
        )
    return Rules(num_clients, threshold, degree, size + 1, quantiser.word_bits), quantiser
