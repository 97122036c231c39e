"""Results as values and as files: what follows from the seeds, and that damage is one error."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from made_results import made_result, not_made, seed_result

from reproduce.choices import Choices
from reproduce.plan import make_plan
from reproduce.results import (
    FULL_PRECISION,
    Measured,
    Result,
    ResultError,
    Status,
)
from reproduce.table_results import (
    TableResults,
    planned_conditions,
    stored_result,
)

ROW = "bedrooms-w4a4-quest"


@pytest.fixture
def plan(tmp_path):
    return make_plan("table3", Choices(results=tmp_path), dry=True)


def test_mean_and_deviation_are_over_the_seeds():
    result = made_result({"fid": [1.0, 4.0], "kid": [1.0, None]})
    assert result.metric("fid") == Measured(2.5, pytest.approx(4.5**0.5))
    assert result.metric("kid") == Measured(None, None)  # not every seed has it
    assert result.metric("sfid") == Measured(None, None)
    assert made_result({"fid": [3.0]}).metric("fid") == Measured(3.0, None)
    assert not_made().metric("fid") == Measured(None, None)


def test_size_and_memory_are_of_the_largest_seed_and_seconds_of_the_mean_one():
    first, second = {"calibrate": 1.0, "finetune": 2.0}, {"calibrate": 3.0, "finetune": 6.0}
    seeds = (
        seed_result(0, size_bytes=5, peak_bytes=9, seconds=first | {"sample": 7.0}),
        seed_result(1, size_bytes=6, peak_bytes=8, seconds=second | {"sample": 9.0}),
    )
    result = made_result({}, seeds=seeds)
    assert (result.size_bytes, result.peak_bytes) == (6, 9)
    assert result.seconds == {"calibrate": 2.0, "finetune": 4.0, "sample": 8.0}
    assert result.quantize_seconds == 6.0
    assert result.n_samples == 2000
    assert result.of_seed(1) == seeds[1] and result.of_seed(2) is None


def test_what_nothing_was_quantized_for():
    full = made_result({}, engine=FULL_PRECISION, seeds=(seed_result(peak_bytes=None),))
    assert (full.quantize_seconds, full.peak_bytes) == (None, None)
    none = not_made()
    found = (none.size_bytes, none.peak_bytes, none.quantize_seconds, none.trained_fraction)
    assert found == (None,) * 4 and none.seconds == {} and none.n_samples == 0


@pytest.mark.parametrize(("fraction", "expected"), [(0.07, 0.07), (0.0, None), (None, None)])
def test_share_of_the_weights_that_are_trained(fraction, expected):
    result = made_result({}, seeds=(seed_result(trained_fraction=fraction),))
    assert result.trained_fraction == expected


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "row.json"
    whole = made_result(
        {"fid": [1.0 / 3.0, 2.0], "inception_score": [None, 1e-7]},
        reason=None,
    )
    seed = dataclasses.replace(whole.seeds[0], about={"note": "x", "n_samples": 3, "recall": 0.5})
    whole = dataclasses.replace(whole, seeds=(seed, *whole.seeds[1:]))
    for result in (whole, not_made(), not_made(Status.FAILED)):
        result.write(path)
        assert Result.read(path) == result
        assert [p.name for p in tmp_path.iterdir()] == ["row.json"]
    values = json.loads(whole.to_json())
    assert values["format"] == 2 and list(values)[0] == "format"
    assert not {"label", "bits", "paper", "verdict"} & set(values)  # the table's row has them


def damaged(*path: str | int, value: object = ..., without: bool = False) -> str:
    """The text of a result file where one key has another value, or is missing."""
    values = json.loads(made_result({"fid": [1.0]}).to_json())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if without:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected JSON"),
        ('{"format": 2, ', "expected JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "format 1"),
        ('{"format": 2}', "table"),
        (damaged("format", value=3), "format"),
        (damaged("status", value="finished"), "status"),
        (damaged("row", without=True), "row"),
        (damaged("cell", value="x"), "cell"),
        (damaged("seeds", 0, "metrics", "fid", value="low"), "seeds.0.metrics.fid"),
        (damaged("seeds", 0, "metrics", "fid", value=math.nan), "seeds.0.metrics.fid"),
        (damaged("seeds", 0, "seconds", "sample", value=math.inf), "seeds.0.seconds.sample"),
        (damaged("seeds", 0, "size_bytes", value=1.5), "seeds.0.size_bytes"),
        (damaged("seeds", 0, "processors", without=True), "seeds.0.processors"),
        (damaged("seeds", value=None), "seeds"),
        (damaged("conditions", "sampling", "eta", value="0"), "conditions.sampling.eta"),
        (damaged("conditions", "model", "sha256", value=7), "conditions.model.sha256"),
        (damaged("provenance", 0, "machine", "cpu", value=3), "provenance.0.machine.cpu"),
        (damaged("provenance", 0, "versions", without=True), "provenance.0.versions"),
    ],
)
def test_damage_names_file_and_key(tmp_path, text, says):
    path = tmp_path / "row.json"
    path.write_text(text)
    with pytest.raises(ResultError) as error:
        Result.read(path)
    message = str(error.value)
    assert str(path) in message and says in message and "\n" not in message


def test_a_file_that_is_no_text_is_one_error(tmp_path):
    (tmp_path / "row.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    for name in ("row.json", "folder"):
        with pytest.raises(ResultError, match=name):
            Result.read(tmp_path / name)


def test_results_of_before_02_are_refused(plan):
    path = plan.row_file(ROW)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"table": "table3", "cell": ROW, "status": "done"}))
    with pytest.raises(ResultError) as error:
        TableResults.stored(plan, strict=True)
    assert str(error.value) == (
        f"{path}: made by questlib before 0.2 (format 1); make the row again, "
        "or name another --results folder"
    )


def test_one_damaged_row_is_a_failed_one_and_names_its_file(plan):
    other = "bedrooms-fp"
    made_result({"fid": [1.0]}, row=other).write(plan.row_file(other))
    path = plan.row_file(ROW)
    path.write_text(json.dumps({"cell": ROW}))
    results = TableResults.stored(plan)
    assert results[other].done
    assert results[ROW].status == Status.FAILED and path.name in results[ROW].reason


def test_a_changed_value_is_not_what_was_written(tmp_path):
    path = tmp_path / "row.json"
    made_result({"fid": [1.5]}).write(path)
    path.write_text(path.read_text().replace("1.5", "1.4"))
    with pytest.raises(ResultError, match=r"row.json: its values are not what was written"):
        Result.read(path)
    values = json.loads(path.read_text())
    del values["digest"]  # as files of before
    path.write_text(json.dumps(values))
    assert Result.read(path).metric("fid").value == 1.4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(seeds=[]), "seeds: expected some"),
        (lambda v: v["seeds"].append(v["seeds"][0]), "each once"),
        (lambda v: v["seeds"][0]["metrics"].update(fdi=1.0), "unknown fdi"),
        (lambda v: v["seeds"][0].update(size_bytes=-1), "size_bytes is below zero"),
        (lambda v: v["seeds"][0].update(layers={"simulated": -1}), "simulated is below zero"),
        (lambda v: v["conditions"].update(samples_per_seed=0), "samples_per_seed"),
    ],
)
def test_values_that_contradict_each_other(change, says):
    values = json.loads(made_result({"fid": [1.0]}).to_json())
    del values["digest"]
    change(values)
    with pytest.raises(ResultError, match=f"^row: .*{says}"):
        Result.from_json(json.dumps(values), "row")


def test_a_row_without_a_file_was_not_run(plan):
    result = stored_result(plan.table.row(ROW), plan)
    assert (result.status, result.row, result.seeds) == (Status.NOT_RUN, ROW, ())
    assert "python -m reproduce table3 --scale mini" in result.reason
    paper = make_plan("table3", Choices(scale="paper", results=plan.results), dry=True)
    assert stored_result(paper.table.row(ROW), paper).reason == paper.missing(paper.table.row(ROW))


def test_a_file_of_another_row_is_refused(plan):
    made_result({"fid": [1.0]}, row="bedrooms-fp").write(plan.row_file(ROW))
    with pytest.raises(ResultError, match=f"expected the result of table3, {ROW}, mini scale"):
        stored_result(plan.table.row(ROW), plan)


def test_a_table_has_its_rows_in_order(plan):
    made_result({"fid": [1.0]}, row=ROW).write(plan.row_file(ROW))
    results = TableResults.stored(plan)
    assert [row.id for row, _ in results] == [row.id for row in plan.table.rows]
    assert len(results) == len(plan.table.rows)
    assert [row.id for row, _ in results.done] == [ROW]
    assert results[ROW].metric("fid").value == 1.0
    row, full = results.full_precision
    assert row.full_precision and full.status == Status.NOT_RUN


def test_conditions_name_no_folders(tmp_path):
    model, reference = tmp_path / "my-model", tmp_path / "images.npz"
    for path in (model, reference):
        path.mkdir()
    choices = Choices(scale="paper", model=str(model), reference=str(reference))
    plan = make_plan("table3", choices, dry=True)
    found = planned_conditions(plan.table.row(ROW), plan, "0" * 64)
    assert found.model is not None and found.model.id == "my-model"
    assert (found.reference, found.captions, found.clip) == ("images.npz", None, None)
    assert found.samples_per_seed == 50_000 and str(found.sampling) == "DDIM 200 steps, eta 1"
    assert planned_conditions(plan.table.row(ROW), plan).model is None
