"""torchrun, which leaves the last word to the run: `python -m mor_tools.pretraining.torchrun ...`.

It takes the arguments of torchrun and starts processes as torchrun does. The difference is the end:
where the processes said why they ended (`endings.tell`), their message is the last thing on the
terminal, without torchrun's traceback and its table of failures. After a refused setting the exit
status is 2, and after an interrupt 128 plus the number of the signal, as shells expect.
"""

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from mor_tools import terminal
from mor_tools.pretraining import endings, watch

_ROUTINE = ("Received %s death signal", "Sending process %s closing signal", "failed (exitcode")
"""How those lines of torchrun's log begin that describe an ending which is told anyway."""
_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)


def main(arguments: Sequence[str]) -> None:
    """Run torchrun with these arguments; exits with a status other than 0 unless all went well."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    try:
        torch_run.run(torch_run.parse_args(list(arguments)))
    except ChildFailedError as failed:
        raise SystemExit(_tell(failed)) from None
    except SignalException as received:  # the run itself has said what it saved
        raise SystemExit(128 + received.sigval) from None


def _tell(failed: ChildFailedError) -> int:
    """Print why processes failed, and return the exit status."""
    failures = failed.failures.values()
    told = [endings.told(failure.error_file_data) for failure in failures]
    messages = dict.fromkeys(message for message in told if message is not None)
    if messages:
        for message in messages:
            print(terminal.error(message), file=sys.stderr)
        return 2
    if any(failure.exitcode == watch.HUNG for failure in failures):
        return watch.HUNG  # the watch named the ranks
    print(failed, file=sys.stderr)
    return 1


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ROUTINE)


if __name__ == "__main__":
    main(sys.argv[1:])
