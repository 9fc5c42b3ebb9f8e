"""What a command tells the shell: 0 success, 2 bad input found before work, 1 failure in it."""

import sys
import traceback
from collections.abc import Callable

from apq_mmdet.errors import BadInputError, CalibrationError, CheckpointError

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def exit_code_of(work: Callable[[], object]) -> int:
    """Do ``work``, print what went wrong to stderr, and return the exit code."""
    try:
        work()
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; where the command knows --resume, that goes on", file=sys.stderr)
        return EXIT_FAILED
    except (CalibrationError, CheckpointError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK
