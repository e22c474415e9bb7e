"""The page about a run, read as a browser reads it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalex.evaluation.evaluate import main as evaluate
from fastalex.inspection.run_report import draw_confusion, main
from fastalex.training import fit

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The words of a page, its pictures, and what it asks of other places."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.pictures, self.asked = "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        source = dict(attributes).get("src") or dict(attributes).get("href")
        if tag == "img" and source and source.startswith("data:image/png;base64,"):
            data = base64.b64decode(source.partition(",")[2])
            self.pictures.append(Image.open(io.BytesIO(data)).size)
        elif source or tag in ("script", "link"):
            self.asked.append(source or tag)

    def handle_data(self, data: str) -> None:
        self.words += data + " "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    data, folder = (tmp_path_factory.mktemp("report") / name for name in ("data", "run"))
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cats & <dogs>", "boats"):
            place = data / part / name
            place.mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 256, (70, 70, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    fit(data=data, output=folder, image_size=64, batch_size=3, epochs=1, threads=1)
    yield folder
    shutil.rmtree(folder)


def test_a_page_holds_everything_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == f"report: {run / 'report.html'}"
    page = Page(run / "report.html")
    assert page.asked == []
    assert len(page.pictures) == 4
    assert min(min(size) for size in page.pictures) > 100
    data = json.loads((run / "run.json").read_text())["settings"]["data"]
    evaluate(
        ["--weights", str(run / "model.safetensors"), "--data", data, "--crops", "1", "--json"]
    )
    error = json.loads(capsys.readouterr().out)["top1_error"]
    assert f"top-1 {error:.1%}" in page.words
    assert f"{1 - error:.1%} right" in page.words
    assert "paper" in page.words
    assert "finished" in page.words
    assert "cats & <dogs>" in page.words  # a name is text, whatever is in it


def test_a_square_is_the_share_of_its_row() -> None:
    figure = draw_confusion(np.array([[3, 1], [0, 0]]), ["a", "b_c"])
    (axes,) = figure.axes
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b c"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no run in it"), ("{", "not the run.json of a run"), ("[]", "not the run.json")],
)
def test_what_is_no_run_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.compiled
def test_the_roofline_of_the_step_goes_along(run: Path, tmp_path: Path) -> None:
    """Of a run on a GPU, whose kernels other tests compile."""
    there, output = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "page.html"
    report = json.loads((there / "run.json").read_text())
    report["settings"] |= {"batch_size": 128, "precision": "bf16"}
    (there / "run.json").write_text(json.dumps(report))
    assert main([str(there), "--gpu", "h100", "--output", str(output)]) == 0
    page = Page(output)
    assert len(page.pictures) == 5
    assert "estimate, unmeasured" in page.words
    assert "batch 128, bf16" in page.words
