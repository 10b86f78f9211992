"""What a Flower app written for FedAvg begins with: the server's initial arrays, and the configuration it is told."""

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from flower_mcepl import keys
from flower_mcepl.array_layout import ArrayLayout
from flower_mcepl.ledger import Ledger


class InitialArrays:
    """Goes once to every node, with its first message; with each later one go only the arrays' names and shapes.

    A node that fails gets them again with its next message: it may be one that has lost its state. Agents of
    `make_client_app` make their own weights from the run's seed, and read none of this.

    Parameters
    ----------
    arrays : ArrayRecord
        As given to ``start``; with an empty one nothing is sent.
    train_config, evaluate_config : ConfigRecord
        As given to ``start``, for the app's train and evaluate functions.
    ledger : Ledger
        Where the bytes are counted, apart from those of the links.
    """

    def __init__(
        self, arrays: ArrayRecord, *, train_config: ConfigRecord, evaluate_config: ConfigRecord, ledger: Ledger
    ) -> None:
        self._arrays, self._ledger = arrays, ledger
        self._configs = {keys.TRAIN_CONFIG: train_config, keys.EVALUATE_CONFIG: evaluate_config}
        self._layout = ArrayLayout.of({name: array.numpy() for name, array in arrays.items()}).to_json()
        self._have: set[int] = set()  # nodes whose last answer was sound

    def add_to(self, content: RecordDict, *, node: int) -> None:
        """Add to a message for ``node`` what it needs of this."""
        if not self._arrays:
            return
        content.config_records[keys.ORDER][keys.LAYOUT] = self._layout
        content.update({name: config for name, config in self._configs.items() if config})
        if node not in self._have:
            content[keys.INITIAL] = self._arrays
            self._ledger.add_initial(sum(len(array.data) for array in self._arrays.values()))

    def note(self, node: int, *, sound: bool) -> None:
        """Note that the node answered as an agent, or that it failed."""
        if sound:
            self._have.add(node)
        else:
            self._have.discard(node)
