"""Captions: rows that do not fit are named, and pictures find theirs by name alone."""

from __future__ import annotations

import json

import pytest

from fewstep.data.captions import Captions, match_captions, read_captions


def read(tmp_path, text: str, name: str = "c.csv") -> Captions:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return read_captions(tmp_path / name)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "prompt,seed\na,1\na cat, sitting,2\n",
            r"line 3 \(row 1\) has 3 fields, the columns are 2",
        ),
        ("prompt\na cat, sitting\n", r"line 2 \(row 0\) has 2 fields"),
        ('prompt,note\na,"b\nc"\n\nc,d,2\n', r"line 5 \(row 1\) has 3 fields"),
        ("prompt,seed\na\n", r"line 2 \(row 0\) has 1 fields"),
        ("prompt,seed\na,1\nb,701.0\n", r"line 3 \(row 1\) has the seed '701.0'"),
        ("prompt,seed\na,1\nb,-1\n", r"line 3 \(row 1\) has the seed '-1'"),
        ("prompt,seed\na,1\nb, \n", r"line 3 \(row 1\) has no seed, and others do"),
        ("prompt,seed\na,1\nb,1e3\n", r"line 3 \(row 1\) has the seed '1e3'"),
        (f"prompt,seed\na,1\nb,{10**30}\n", r"line 3 \(row 1\) has the seed '1000"),
        (f"prompt,seed\na,{2**63}\n", r"line 2 \(row 0\) has the seed"),
        ("prompt,evaluation_seed\na,x\n", r"line 2 \(row 0\) has the seed 'x'"),
        ("prompt,image_id\na,\nb,7\n", r"line 2 \(row 0\) has no image_id"),
        ('prompt,seed\n"a,1\nb,2\nc",3\n', r"lines 2 to 4 \(row 0\) are one caption"),
        ("prompt,seed\na,1\ncaf\udce9,2\n", r"line 3 is not UTF-8: save the file as UTF-8"),
        ("prompt,prompt\na,b\n", r"line 1 has the column 'prompt' twice"),
        ("prompt\na\nb\0c\n", r"line 3 has a NUL"),
    ],
)
def test_rows_that_do_not_fit_are_named_by_line_and_row(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_seeds_stay_as_they_are_or_are_nowhere(tmp_path):
    largest = 2**63 - 1
    assert read(tmp_path, f"prompt,seed\na,007\nb, 5 \nc,{largest}\n").seeds == (7, 5, largest)
    assert read(tmp_path, "prompt,seed\na,\nb,\n").seeds == ()
    both = read(tmp_path, "prompt,seed,evaluation_seed\na,1,3\nb,2,4\n")
    assert both.seeds == (3, 4)
    assert read(tmp_path, "prompt,seed,evaluation_seed\na,1,\nb,2,\n").seeds == (1, 2)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line_of_json(odd, tmp_path):
    texts = (f"one{odd}two", "three, four")
    lines = "\r\n".join(json.dumps(text, ensure_ascii=odd < " ") for text in texts)
    assert read(tmp_path, lines, "c.jsonl").texts == texts
    rows = "".join(json.dumps({"prompt": text}) + "\n\n" for text in texts)
    assert read(tmp_path, rows, "c.jsonl").texts == texts
    assert read(tmp_path, json.dumps(list(texts)), "c.json").texts == texts


def test_a_line_of_json_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"line 4 \(row 2\)"):
        read(tmp_path, '"a"\n\n"b"\n{"prompt":\n', "c.jsonl")
    with pytest.raises(ValueError, match=r"row 1 has the seed '-1'"):
        read(tmp_path, '[{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": -1}]', "c.json")


COCO = Captions("c", ("a", "b", "c"), ("139", "285", "632"))
PLAIN = Captions("p", tuple("abcdefghijkl"))
SEEDS = Captions("s", ("a", "b", "c"), seeds=(701, 5, 30))


@pytest.mark.parametrize(
    "captions, names, texts, way",
    [
        (
            COCO,
            ["COCO_val2014_000000000632.jpg", "COCO_val2014_000000000139.jpg"],
            "ca",
            "image_id",
        ),
        (COCO, ["x/COCO_train2014_000000000285.jpg"], "b", "image_id"),
        (COCO, ["000000000285.png", "632.png"], "bc", "image_id"),
        (PLAIN, ["0.png", "1.png", "10.png", "11.png", "2.png"], "abklc", "number"),
        (PLAIN, ["row-000003.png", "row-000001.png"], "db", "row"),
        (SEEDS, ["000005.png", "000701.png"], "ba", "seed"),
        (SEEDS, ["0.png", "2.png"], "ac", "number"),
    ],
)
def test_pictures_find_their_captions_by_name(captions, names, texts, way):
    assert match_captions(captions, names) == (tuple(texts), way)


@pytest.mark.parametrize(
    "captions, names, stray",
    [
        (COCO, ["139.png", "285.png", "grid.png"], "grid.png"),
        (COCO, ["COCO_val2014_000000000139.jpg", "COCO_val2014_000000000140.jpg"], "0140.jpg"),
        (COCO, ["COCO_val2014_.jpg"], "COCO_val2014_.jpg"),
        (PLAIN, ["0.png", "1.png", "stray.png"], "stray.png"),
        (PLAIN, ["a.png", "b.png"], "a.png"),
        (PLAIN, [f"{i}.png" for i in range(1, 13)], "12.png"),  # counted from 1
        (SEEDS, ["701.png", "6.png"], "6.png"),
        (Captions("five", ("a",) * 5, ("7",) * 5), ["7.png"], "7.png"),
    ],
)
def test_a_picture_without_a_caption_is_named_and_nothing_goes_by_order(captions, names, stray):
    with pytest.raises(ValueError, match=f"{stray} has no caption in"):
        match_captions(captions, names)


@pytest.mark.parametrize("ids", [(), ("1", "2", "3")])
@pytest.mark.parametrize("other", ["b/1.png", "001.png", "1.jpg"])
def test_two_pictures_of_one_caption_are_refused(other, ids):
    with pytest.raises(ValueError, match=rf"a/1\.png and {other} share a caption"):
        match_captions(Captions("c", ("a", "b", "c"), ids), ["a/1.png", other])


@pytest.mark.parametrize("value", [5, ["a", "b"], None, {"raw": "a"}])
def test_a_caption_that_is_no_text_is_called_that(value, tmp_path):
    with pytest.raises(ValueError, match=r"row 1 has a caption that is no text"):
        read(tmp_path, json.dumps(["a", {"image_id": 3, "caption": value}]), "c.json")


def test_a_caption_never_takes_the_name_of_the_contact_sheet():
    for name in ("sheet", "Sheet", "SHEET"):
        assert Captions("c", ("a", "b"), (name, "x")).files == ("row-000000", "row-000001")
