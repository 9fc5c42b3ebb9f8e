"""From a selection of rows to the table: check, measure the float detectors, then quantize row by row."""

from collections.abc import Sequence

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.costs import Cost
from apq_mmdet.reproduction.entry import Entry
from apq_mmdet.reproduction.lock import locked
from apq_mmdet.reproduction.prepare import IDS, Examined, check_quickly, estimate, examine, write_ids
from apq_mmdet.reproduction.rows import Detector, Row, Selection
from apq_mmdet.reproduction.run import DiskFullError, RunFailedError, execute, finished
from apq_mmdet.reproduction.settings import Settings
from apq_mmdet.reproduction.space import shortage
from apq_mmdet.reproduction.table import Table
from apq_mmdet.reproduction.worker import own_process


class StoppedError(RuntimeError):
    """The command cannot go on; what is finished is kept."""


def reproduce(selection: Selection, settings: Settings, dry_run: bool) -> list[Entry]:
    """Make what the work dir lacks of the selection; the lines of the table.

    Args:
        dry_run: check everything, print the plan and write the lists of calibration images, and stop.

    Raises:
        BadInputError: found before anything was run.
        StoppedError: a float detector is off its reference, or the disk is full.
    """
    with locked(settings.work_dir):
        check_quickly(selection, settings)
        with own_process() as call:
            examined = call(examine, selection, settings)
            entries = _entries(selection, examined, settings)
            table = Table(entries, examined, settings.work_dir)
            costs = call(estimate, _waiting(entries), examined, settings)
        _announce(entries, costs, examined, settings)
        if missing := shortage(list(costs.values()), settings.work_dir):
            raise BadInputError(missing)
        if not dry_run:
            _Runner(table, costs, examined, settings).run()
        return entries


def _entries(selection: Selection, examined: Examined, settings: Settings) -> list[Entry]:
    """A line for each detector and row, with the result of an earlier command where there is one."""
    entries = [Entry(item) for item in (*selection.detectors, *selection.rows)]
    for entry in entries:
        if result := finished(entry.item, examined, settings):
            entry.finish(result)
    return entries


def _waiting(entries: Sequence[Entry]) -> Selection:
    items = [entry.item for entry in entries if entry.result is None]
    return Selection([i for i in items if isinstance(i, Detector)], [i for i in items if isinstance(i, Row)])


def _announce(entries: Sequence[Entry], costs: dict[str, Cost], examined: Examined, settings: Settings) -> None:
    """Print the plan; write the lists of calibration images of the rows that wait."""
    print(f"data: {examined.data}")
    for checkpoint in examined.checkpoints.values():
        if not checkpoint.verified:
            print(f"no digest was published for {checkpoint.path.name}; sha256 {checkpoint.sha256}")
    for entry in entries:
        item = entry.item
        print(f"{item.name}: {costs[item.name] if entry.result is None else 'done'}")
        if isinstance(item, Row) and entry.result is None:
            path = settings.folder(item.name) / IDS
            write_ids(item, examined.images[item.name], examined.data, path)
            print(f"  calibration images: {path}")
    seconds = sum(cost.calibration_seconds + cost.evaluation_seconds for cost in costs.values())
    machine = f" on this machine ({next(iter(costs.values())).machine})" if costs else ""
    print(f"{len(costs)} of {len(entries)} lines are to be made: about {seconds / 3600:.1f} h{machine}", flush=True)


class _Runner:
    """Makes the lines that wait, one after the other; the table is written after each."""

    def __init__(self, table: Table, costs: dict[str, Cost], examined: Examined, settings: Settings) -> None:
        self.table, self.costs, self.examined, self.settings = table, costs, examined, settings
        self.detectors = [entry for entry in table.entries if isinstance(entry.item, Detector)]
        self.rows = [entry for entry in table.entries if isinstance(entry.item, Row)]

    def run(self) -> None:
        """The float detectors first: a row of one that is off its reference would be work in vain."""
        self._make(self.detectors)
        self._refuse_float_gap()
        failed = [entry.detector for entry in self.detectors if entry.result is None]
        for entry in self.rows:
            if entry.detector in failed and entry.result is None:
                entry.state = "not run, its float detector failed"
        self._make(self.rows)

    def _make(self, entries: Sequence[Entry]) -> None:
        self.table.write()
        waiting = [entry for entry in entries if entry.state == "waiting"]
        for number, entry in enumerate(waiting, 1):
            print(f"[{number}/{len(waiting)}] {entry.item.name}", end=" ", flush=True)
            try:
                if missing := shortage([self.costs[entry.item.name]], self.settings.work_dir):
                    raise DiskFullError(missing)
                entry.finish(execute(entry.item, self.examined, self.settings))
                print(f"{entry.ours}, {entry.result['seconds'] / 60:.1f} min", flush=True)
            except RunFailedError as error:
                entry.state = "failed"
                print(f"FAILED: {error}", flush=True)
                if isinstance(error, DiskFullError):
                    raise StoppedError(
                        "no space left; free some and repeat the command, what is finished is kept"
                    ) from error
            finally:
                self.table.write()

    def _refuse_float_gap(self) -> None:
        off = [entry for entry in self.detectors if entry.is_off_reference(self.examined.data)]
        for entry in off:
            entry.state = "done, off its reference"
            wanted = entry.published
            print(
                f"{entry.item.name}: float AP {entry.ours} is not within 0.1 of {wanted.ap}, {wanted.source}",
                flush=True,
            )
        self.table.write()
        if off and not self.settings.allow_float_gap:
            raise StoppedError(
                f"{len(off)} float detectors are off their reference: other data, weights or versions? "
                f"--allow-float-gap goes on, --rows leaves models out"
            )
