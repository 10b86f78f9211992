"""Names in Flower's messages and states: kebab-case, in one place, with a version."""

MESSAGE_VERSION = 3  # raise it when a record or key changes its meaning

# Records of a train or closing message, relay to agent
FRAMES = (
    # ArrayRecord of uint8 arrays: key "3/0" is the first frame of agent 3, "3/1" the
    # one that builds on it
    "frames"
)
ORDER = "order"  # ConfigRecord: what to do
# ArrayRecord: what an app of neighbor_average_mod begins with; only where it may lack
# them
INITIAL = "initial-arrays"
# ConfigRecord, in place of all others: say which agent you are, and do nothing
IDENTIFY = "identify"
# ConfigRecords for such an app; left out if empty
TRAIN_CONFIG, EVALUATE_CONFIG = "train-config", "evaluate-config"

# Records of the answer
FRAME = "frame"  # ArrayRecord of uint8 arrays: FRAME, and KEY_FRAME where one was asked for
KEY_FRAME = "key-frame"
METRICS = "metrics"  # MetricRecord
# ConfigRecord: which agent answers; with the handshake where the order says INTRODUCE
AGENT = "agent"

# Keys of ORDER
VERSION = "message-version"
ROUND = "server-round"
FUSE = "fuse"  # bool: frames and neighbors are those of a real exchange
NEIGHBORS = "neighbors"  # list of agent indices; left out when there are none
EVALUATE = "evaluate"
TRAIN = "train"
MAX_STALENESS = "max-staleness"
# round of the agent's newest frame that the relay has; left out if it has none
ACKNOWLEDGED = "acknowledged"
WHOLE = "whole"  # bool: send a whole frame, too
INTRODUCE = "introduce"  # bool: the relay does not know this node's handshake
RUN = "run"  # 16 hex digits that stand for the run; the same when it is resumed from its record
AGENTS_DIR = "agents-dir"  # simulation only: where the final states go, and with STORE each round's
# JSON text: names, types and shapes of the initial arrays; left out if there are none
LAYOUT = "layout"
# bool, simulation only: keep the state after this round in AGENTS_DIR, too; left out if
# not
STORE = "store"
# list of rounds that the relay could go back to; left out if there are none
CHECKPOINTS = "checkpoints"

# Keys of AGENT beside those of Agent.describe()
FRESH = "fresh"  # bool: the agent began without a saved state
PARAMETERS = "parameters"  # JSON text of Agent.parameters(); in the first answer alone
REFUSED = "refused"  # list of str; left out when there are none
# list of the neighbors whose frames build on some that the agent does not hold; left
# out if none
LACKING = "lacking"
# which round of which neighbor is held; left out if none
HELD_AGENTS, HELD_ROUNDS = "held-agents", "held-rounds"
BUILDS_ON = "builds-on"  # list, one for each frame: the round it builds on, -1 where it is whole
HEADER_BYTES = "header-bytes"  # list, one for each frame
CONTENT = "content"  # 16 hex digits that stand for what the frames decode to

# Node config
PARTITION_ID = "partition-id"
