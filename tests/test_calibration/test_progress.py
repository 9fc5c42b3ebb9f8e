from apq_mmdet.calibration.progress import SearchBar


def test_a_person_sees_block_layer_candidates_and_memory(capsys):
    with SearchBar({"first": 2, "second": 4}, shown=True) as bar:
        bar.begin("first")
        bar.quantizer("layer.weight")
        bar.finish()  # one of its two searches was not needed
        bar.begin("second")
        bar.quantizer("layer.input")
        bar.left(37, "candidates")
        bar._bar.refresh()
    seen = capsys.readouterr().err.split("\r")[-1]
    assert "second layer.input" in seen
    assert "37 candidates left, peak memory" in seen
    assert "3/6" in seen


def test_what_follows_the_search_is_named_and_not_counted(capsys):
    with SearchBar({"first": 1}, shown=True) as bar:
        bar.begin("first")
        bar.quantizer("layer.weight")
        bar.stage("compensation")
        bar._bar.refresh()
    seen = capsys.readouterr().err.split("\r")[-1]
    assert "first compensation" in seen
    assert "1/1" in seen


def test_other_processes_show_nothing(capsys):
    with SearchBar({"first": 1}, shown=False) as bar:
        bar.begin("first")
        bar.quantizer("layer")
        bar.left(3, "iterations")
        bar.finish()
    assert capsys.readouterr().err == ""
