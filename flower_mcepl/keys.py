"""Names in Flower's messages and states: kebab-case, in one place, with a version."""

MESSAGE_VERSION = 1  # raise it when a record or key changes its meaning

# Records of a train or closing message, relay to agent
FRAMES = "frames"  # ArrayRecord: one uint8 array per neighbor, its key the neighbor's agent index
ORDER = "order"  # ConfigRecord: what to do

# Records of the answer
FRAME = "frame"  # ArrayRecord with the single array FRAME
METRICS = "metrics"  # MetricRecord
AGENT = "agent"  # ConfigRecord: the handshake, in every answer

# Keys of ORDER
VERSION = "message-version"
ROUND = "server-round"
FUSE = "fuse"  # bool: frames and neighbors are those of a real exchange
NEIGHBORS = "neighbors"  # list of agent indices; left out when there are none
EVALUATE = "evaluate"
TRAIN = "train"
MAX_STALENESS = "max-staleness"
AGENTS_DIR = "agents-dir"  # simulation only: where the final states go

# Keys of AGENT beside those of Agent.describe()
FRESH = "fresh"  # bool: the agent began without a saved state
PARAMETERS = "parameters"  # JSON text of Agent.parameters(); in the first answer alone
REFUSED = "refused"  # list of str; left out when there are none

# Node config
PARTITION_ID = "partition-id"
