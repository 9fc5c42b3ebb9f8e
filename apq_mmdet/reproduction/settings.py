"""What a command is told once, for all rows."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Where things are, and how rows are run.

    Attributes:
        data_root: folder in COCO layout.
        checkpoints: folder of the float checkpoints.
        work_dir: folder of the table and of every row's results.
        not_coco: accept other data than COCO 2017, and say so.
        allow_float_gap: quantize a float detector that is not at its reference.
        allow_overlap: calibrate on evaluated images.
        download: fetch checkpoints that are not there.
        device: cpu, cuda or cuda:N; None for CUDA where there is one.
        processes: that torchrun starts for each row; None runs rows without it.
        memory_budget: of calibration, GiB.
    """

    data_root: Path
    checkpoints: Path
    work_dir: Path
    not_coco: bool = False
    allow_float_gap: bool = False
    allow_overlap: bool = False
    download: bool = False
    device: str | None = None
    processes: int | None = None
    memory_budget: float = 4.0

    def folder(self, name: str) -> Path:
        """Of a detector's or row's results."""
        return self.work_dir / name

    def config(self, name: str) -> Path:
        """Of a detector or row, on the data root; not in its folder, where mmengine writes one of the same name."""
        return self.work_dir / "configs" / f"{name}.py"
