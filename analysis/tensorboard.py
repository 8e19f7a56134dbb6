"""A run's log as TensorBoard event files: python analyze.py tensorboard RUN ..."""
from analysis.loading import run_log
from engine.checkpoints import is_number
from engine.runtime import UserError


def scalars(record):
    """An epoch's record as {"loss": 1.2, "avg/tail": 41.7, ...}, without lists and NaN."""
    numbers = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{key}": inner for key, inner in value.items()}
        else:
            numbers[name] = value
    return {name: float(value) for name, value in numbers.items()
            if isinstance(value, bool) or is_number(value)}


def write_events(run, folder):
    """Write the epochs of a run's log into `folder`, where steps are epochs from 1.

    What this folder's older event files say of the run is hidden, so it may be repeated as a run
    goes on. Raises UserError without the package tensorboard.
    """
    log = run_log(run)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("this needs a package: pip install tensorboard") from None
    with SummaryWriter(folder, purge_step=0) as writer:
        for record in log:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record["epoch"] + 1)
