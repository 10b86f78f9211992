"""Names in Flower's messages, in kebab-case, with a version; for this room alone."""

MESSAGE_VERSION = 5  # raise it when a record or key changes its meaning

# --- records of an order, relay to agent ---
FRAMES = "frames"  # arrays; "3/0" is the first frame of agent 3, "3/1" the one that builds on it
ORDER = "order"  # config: what to do
# For an app of neighbor_average_mod. Settings of its functions, left out if empty:
TRAIN_CONFIG, EVALUATE_CONFIG = "train-config", "evaluate-config"
INITIAL = "initial-arrays"  # arrays; only where the node may lack them

STATE = "state"  # arrays, simulation only: where the agent goes on in a resumed run
GENERATION = "generation"  # its only array

# In place of all these, a config without entries: say which agent you are, do nothing
IDENTIFY = "identify"

# Of a message to several agents of one node, and of its answer: config that says so.
# Then each agent's records bear its seat, as "3/order".
BUNDLE = "bundle"
PER_NODE, SEATS = "agents-per-node", "seats"  # its keys: a number, and a list of them
# in an answer, in place of a seat's records: config with the text of its failure
FAILED, REASON = "failed", "reason"

# --- keys of ORDER; those that may be left out stand last ---
VERSION = "message-version"
RUN = "run"  # 16 hex digits that stand for the run; the same when it is resumed
ROUND = "server-round"
FUSE = "fuse"  # frames and neighbors are those of a real exchange
EVALUATE = "evaluate"
TRAIN = "train"
MAX_STALENESS = "max-staleness"
WHOLE = "whole"  # send a whole frame, too
INTRODUCE = "introduce"  # the relay does not know this node's handshake
ACKNOWLEDGED = "acknowledged"  # round of the agent's newest frame that the relay has
NEIGHBORS = "neighbors"  # list of agents
# senders of a whole frame, and for each how many weights its masks keep, by layer
KEPT_AGENTS, KEPT_COUNTS = "kept-agents", "kept-counts"
# without a barrier: senders of frames, and the age of each one's newest frame
AGED_AGENTS, AGES = "aged-agents", "ages"
AGE_DECAY = "age-decay"  # what a vote is multiplied by for each round of its age; 1 is left out
CHECKPOINTS = "checkpoints"  # list of rounds that the relay could go back to
KEEP_BEST = "keep-best"  # keep the state that was evaluated, if it is the best so far
STORE = "store"  # simulation only: hand over what belongs into the run record
LAYOUT = "layout"  # JSON: names, types and shapes of the initial arrays

# --- records of an answer ---
AGENT = "agent"  # config: who answers; with the handshake where the order says INTRODUCE
METRICS = "metrics"  # metrics
FRAME = "frame"  # arrays: FRAME, and KEY_FRAME where one was asked for
KEY_FRAME = "key-frame"
HANDED = "handed-over"  # arrays, simulation only: GENERATION, and an exported model by its ending

# --- keys of AGENT beside those of `Agent.describe`; lists are left out if empty ---
NUMBER = "agent"
FRESH = "fresh"  # the agent began without a saved state
REFUSED = "refused"  # list of texts
EVALUATION_ERROR = "evaluation-error"  # why an evaluation that was due is missing
LACKING = "lacking"  # neighbors of whom the agent wants a whole frame
# which round of which neighbor is held
HELD_AGENTS, HELD_ROUNDS = "held-agents", "held-rounds"
BUILDS_ON = "builds-on"  # for each frame the round it builds on, -1 where it is whole
HEADER_BYTES = "header-bytes"  # of each frame
CONTENT = "content"  # 16 hex digits that stand for what the frames decode to
