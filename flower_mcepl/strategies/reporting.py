"""What a person sees at the end of a run."""

from logging import INFO, WARNING, getLogger

from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.table import agent_table

logger = getLogger("flwr")


def report(record: RunRecord) -> None:
    """Log the agents' table and draw the overview, if the extra `report` is there."""
    try:
        run = read_run(record.path)
        for line in agent_table(run).splitlines():
            logger.log(INFO, "%s", line)
        logger.log(INFO, "Picture: %s", plot_run(run))
    # the run itself is done and recorded: a missing extra or full disk must not fail it
    except Exception as error:
        logger.log(WARNING, "no report: %s", error)
    logger.log(INFO, "Run record: %s", record.path)
