"""`make faults`: plant every fault, and say which of them no test notices."""

import sys

from tests.campaigns.planted_faults.run import main

sys.exit(main(sys.argv[1:]))
