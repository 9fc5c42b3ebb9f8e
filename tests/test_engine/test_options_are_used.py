"""Options that change nothing that a run would show at once."""

from quick_command import quantize
from small_classifiers import options

from apq_mmdet.engine import classification_command, ptq_loop


def test_a_detectors_calibration_has_the_seed_and_the_memory_that_are_given(config, tmp_path, interrupted_at):
    seen = interrupted_at(ptq_loop, "calibrate")
    assert quantize(config, tmp_path, "--no-eval", "--seed", 3, "--memory-budget", 0.5) == 1
    assert (seen["seed"], seen["memory_budget"]) == (3, 2**29)


def test_a_classifiers_calibration_has_the_seed_that_is_given(folders, classifiers, tmp_path, interrupted_at):
    seen = interrupted_at(classification_command, "calibrate")
    assert classification_command.main(options(folders, classifiers, tmp_path, "--no-eval", "--seed", 3)) == 1
    assert seen["seed"] == 3


def test_evaluated_images_are_refused_where_the_float_model_alone_is_measured(config, data, tmp_path, capsys):
    options = ["--no-eval", "--eval-float", "--calib-dir", data / "val", "--dry-run"]
    assert quantize(config, tmp_path, *options) == 2
    assert "calibration images are evaluated images" in capsys.readouterr().err
