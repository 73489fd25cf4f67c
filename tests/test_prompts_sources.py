import json
import logging

import numpy as np
import pytest
from prompt_files import listed, prompts, refused

from ecodiff.config.sections import PromptSet
from ecodiff.prompts import make_prompts
from ecodiff.runtime.errors import UserError


@pytest.fixture
def images(tmp_path):
    """A folder with the pictures 0.jpg to 29.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.jpg").touch()
    return str(folder)


def captioned(path, content, count, images, source):
    """Names of images and their captions."""
    table = prompts(path, content, count, source=source, images=images)
    names = [image.removeprefix(f"{images}/") for image in table["image"]]
    return dict(zip(names, table["prompt"], strict=True))


@pytest.mark.parametrize("source", ["file", "gcc", "coco", "flickr30k"])
def test_missing_files_are_named(tmp_path, images, source):
    settings = {"images": images} if source in ("coco", "flickr30k") else {}
    chosen = PromptSet(source=source, path=str(tmp_path / "n.csv"), count=1, **settings)
    with pytest.raises(UserError, match=r"n.csv: there is no such file"):
        make_prompts(chosen, tmp_path / "none")


# --- gcc


@pytest.mark.parametrize(
    "content",
    [
        "one\thttp://a\ntwo \thttp://b\nthree\thttp://c\n",
        "caption\turl\r\none\thttp://a\r\ntwo\thttp://b\r\n",
        "http://a\tone\nhttp://b\ttwo\n",
        "url\tcaption\nhttps://a\tone\nbroken\ttwo\n",
        "one\thttp://a\tdog,cat\t/m/1\t0.9\n\ntwo\thttp://b\t\t\t\n",
    ],
)
def test_gcc_is_read_in_order_whatever_its_columns(tmp_path, content):
    assert listed(tmp_path / "gcc.tsv", content, count=2, source="gcc") == ["one", "two"]


def test_gcc_captions_keep_what_is_no_newline(tmp_path):
    written = 'a\u2028b\thttp://a\nc\x85d\thttp://b\n"e\thttp://c\n'
    found = listed(tmp_path / "gcc.tsv", written, count=3, source="gcc")
    assert found == ["a\u2028b", "c\x85d", '"e']


def test_gcc_counts_blank_captions(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ecodiff")
    written = "one\thttp://a\n \thttp://b\n\n"
    assert listed(tmp_path / "gcc.tsv", written, count=1, source="gcc") == ["one"]
    assert caplog.messages[0].endswith("blank rows left out: 2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "a\tb\nc\td\n",
            "FILE: no columns of captions and addresses with a tab between, but 'a', 'b'",
        ),
        ("http://a\thttp://b\n", "FILE: no columns of captions and addresses"),
        ("", "FILE: no columns of captions and addresses with a tab between, but nothing"),
        ("one\thttp://a\ntwo\n", "FILE, line 2: fields: 1, above: 2"),
        ("one\thttp://a\nhttp://b\ttwo\n", "FILE, line 2: an address is where captions are"),
    ],
)
def test_other_columns_than_gccs_are_refused(tmp_path, content, says):
    assert refused(tmp_path / "gcc.tsv", content, source="gcc").startswith(says)


# --- coco


def coco(*captions, count=30):
    """A captions file, from ids of images and their captions."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 4} for i in range(count)],
        "annotations": [
            {"id": 7 + number, "image_id": image, "caption": caption}
            for number, (image, caption) in enumerate(captions)
        ],
    }


def of_coco(tmp_path, content, images, count):
    return captioned(tmp_path / "coco.json", json.dumps(content), count, images, "coco")


def test_coco_gives_one_caption_an_image_the_first_by_its_id(tmp_path, images):
    content = coco(*((i, f"{i} says {n} ") for n in range(3) for i in range(30)))
    content["annotations"].reverse()
    wanted = {f"{i}.jpg": f"{i} says 0" for i in range(30)}
    assert of_coco(tmp_path, content, images, 30) == wanted


def test_coco_is_drawn_by_seed(tmp_path, images):
    content = json.dumps(coco(*((i, f"of {i}") for i in range(30))))
    draws = [
        listed(tmp_path / "c.json", content, count=5, source="coco", images=images, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] != [f"of {i}" for i in range(5)]


def test_cocos_blank_captions_and_unlisted_images_are_counted(tmp_path, images, caplog):
    caplog.set_level(logging.INFO, "ecodiff")
    content = coco((0, " "), (0, "the next"), (1, "one"), (99, "of no image"), (2, ""))
    assert of_coco(tmp_path, content, images, 2) == {"0.jpg": "the next", "1.jpg": "one"}
    assert "blank captions left out: 2" in caplog.messages[0]
    assert "annotations of images that are not listed left out: 1" in caplog.messages[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"caption": None}, "annotations.1.caption: Input should be a valid string"),
        ({"id": "8"}, "annotations.1.id: Input should be a valid integer"),
        ({"image_id": "1"}, "annotations.1.image_id: Input should be a valid integer"),
        ({"image_id": [1]}, "annotations.1.image_id: Input should be a valid integer"),
    ],
)
def test_a_wrong_annotation_of_coco_is_named(tmp_path, images, change, says):
    content = coco((0, "a"), (1, "b"))
    content["annotations"][1].update(change)
    said = refused(tmp_path / "c.json", json.dumps(content), source="coco", images=images)
    assert said.startswith(f"FILE: not a COCO captions file: {says}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "FILE: not JSON"),
        ('{"images": [', "FILE: not JSON"),
        ('{"images": ["\\ud800"]}', "FILE: half a character"),
        ("[" * 100_000, "FILE: not JSON"),
        ("[]", "FILE: not a COCO captions file: Input should be"),
        ("{}", "FILE: not a COCO captions file: images: Field required"),
        ('{"images": [], "annotations": []}', "prompts.count: 1 wanted, but FILE has 0"),
    ],
)
def test_another_file_than_cocos_is_one_line(tmp_path, images, content, says):
    said = refused(tmp_path / "c.json", content, source="coco", images=images)
    assert said.startswith(says)


def test_missing_pictures_are_counted_and_named(tmp_path, images):
    content = json.dumps(coco(*((i, "a") for i in range(40)), count=40))
    with pytest.raises(UserError, match=r"prompts\.images: 10 of 40 pictures are missing") as error:
        prompts(tmp_path / "c.json", content, 40, source="coco", images=images)
    names = str(error.value).split(": ")[-1].split(", ")
    assert len(names) == 6 and names[-1] == "..."
    assert set(names[:5]) < {f"'{i}.jpg'" for i in range(30, 40)}


def test_a_missing_folder_of_pictures_is_named(tmp_path):
    content, none = json.dumps(coco((0, "a"))), str(tmp_path / "none")
    with pytest.raises(UserError, match=r"prompts\.images: there is no folder .*none"):
        prompts(tmp_path / "c.json", content, 1, source="coco", images=none)


# --- flickr30k

LAYOUTS = {
    "bars": "image_name| comment_number| comment\n1.jpg| 0| A man , smiling .\n1.jpg| 1| no\n"
    "2.jpg| 0| A dog .\n",
    "lists": 'raw,sentids,filename\n"[""A man , smiling ."", ""no""]","[0, 1]",1.jpg\n'
    '"["" "", ""A dog .""]","[2]",2.jpg\n',
    "token": "1.jpg#0\tA man , smiling .\n1.jpg#1\tno\n2.jpg#0\tA dog .\n",
    "commas": 'image_name,comment\n1.jpg,"A man , smiling ."\n1.jpg,no\n2.jpg,A dog .\n',
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_flickr30k_comes_in_several_layouts(tmp_path, images, layout, start):
    found = captioned(tmp_path / "f", start + LAYOUTS[layout], 2, images, "flickr30k")
    assert found == {"1.jpg": "A man , smiling .", "2.jpg": "A dog ."}


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ("1.jpg| 0| A man | a dog .", "A man | a dog ."),
        ('1.jpg| 0| "A man .', '"A man .'),
        ('1.jpg| 0| " A " man "', '" A " man "'),
        ("1.jpg| 4   A dog runs .", "A dog runs ."),
        ("1.jpg|0|3 dogs", "3 dogs"),
        ("1.jpg| 0| a\u2028b", "a\u2028b"),
        ("1.jpg| 0| None", "None"),
    ],
)
def test_flickr30k_captions_are_as_written(tmp_path, images, row, caption):
    written = f"image_name| comment_number| comment\n{row}\n2.jpg| 0| two\n"
    found = captioned(tmp_path / "f.csv", written, 2, images, "flickr30k")
    assert found == {"1.jpg": caption, "2.jpg": "two"}


@pytest.mark.parametrize("caption", ['"A dog .', "a | b", 'a\t"b', "5#6 dogs"])
def test_flickr30k_tokens_are_as_written(tmp_path, images, caption):
    written = f"1.jpg#0\t{caption}\n2.jpg#0\ttwo\n"
    found = captioned(tmp_path / "r.token", written, 2, images, "flickr30k")
    assert found == {"1.jpg": caption, "2.jpg": "two"}


def test_flickr30k_takes_the_next_of_a_blank_caption(tmp_path, images, caplog):
    caplog.set_level(logging.INFO, "ecodiff")
    written = "image_name| comment_number| comment\n1.jpg| 0| \n1.jpg| 1| next\n\n"
    assert captioned(tmp_path / "f.csv", written, 1, images, "flickr30k") == {"1.jpg": "next"}
    assert caplog.messages[0].endswith("blank rows left out: 2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1,2\n", "FILE: has neither the columns image_name"),
        ("", "FILE: is empty"),
        ("image_name| comment_number| comment\n1.jpg| 0| a\nno row\n", "FILE, line 3: no image"),
        ("1.jpg#0\ta\n2.jpg\tb\n", "FILE, line 2: no image"),
        ('filename,raw\n1.jpg,"[""a"""\n', "FILE, line 2: not JSON"),
        ("filename,raw\n1.jpg,a dog\n", "FILE, line 2: not JSON"),
        ("filename,raw\n1.jpg,3\n", "FILE, line 2: raw is not a list of captions"),
        ('filename,raw\n1.jpg,"[""a"", 3]"\n', "FILE, line 2: 3 is not text"),
        ('filename,raw\n1.jpg,["a", "b"]\n', "FILE, line 2: ',' expected after"),
        ('filename,raw\n1.jpg,"[""\\ud800""]"\n', "FILE, line 2: half a character"),
    ],
)
def test_rows_that_are_not_flickr30ks_are_named(tmp_path, images, content, says):
    said = refused(tmp_path / "f.csv", content, source="flickr30k", images=images)
    assert said.startswith(says)


def test_order_is_the_sets_own(tmp_path, images):
    """Prompts of a set that was drawn before stay what they were."""
    content = json.dumps(coco(*((i, f"of {i}") for i in range(30))))
    order = np.random.default_rng(3).permutation(30)
    found = listed(tmp_path / "c.json", content, count=30, source="coco", images=images, seed=3)
    assert found == [f"of {i}" for i in order]


# --- a folder of pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder with b.png, a.jpg and sub/c.png, and their captions beside them."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, caption in (("b.png", "a bee"), ("a.jpg", " an ape\n"), ("sub/c.png", "a cat")):
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def of_folder(folder, count, **settings):
    chosen = PromptSet(source="folder", path=str(folder), count=count, **settings)
    table = make_prompts(chosen, folder / "none")
    return [(row.prompt, row.image.removeprefix(f"{folder}/")) for row in table.itertuples()]


def test_captions_lie_beside_their_pictures(pictures):
    expected = [("an ape", "a.jpg"), ("a bee", "b.png"), ("a cat", "sub/c.png")]
    assert of_folder(pictures, 3) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\nb.png,one\nsub/c.png,two\n"),
        (
            "metadata.jsonl",
            '{"file_name": "sub/c.png", "text": "two"}\n{"text": "one", "file_name": "b.png"}\n',
        ),
    ],
)
def test_captions_lie_in_a_list(pictures, name, content):
    (pictures / name).write_text(content)
    assert of_folder(pictures, 2, column="text") == [("one", "b.png"), ("two", "sub/c.png")]


def test_pictures_without_captions_are_counted_and_named(pictures):
    (pictures / "b.txt").unlink()
    (pictures / "sub/c.txt").unlink()
    with pytest.raises(UserError, match=r"2 of 3 pictures in .* have no caption: 'b.png', 'c.png'"):
        of_folder(pictures, 1)


def test_blank_captions_of_pictures_are_counted(pictures, caplog):
    (pictures / "b.txt").write_text("\n")
    with caplog.at_level(logging.INFO):
        assert of_folder(pictures, 2) == [("an ape", "a.jpg"), ("a cat", "sub/c.png")]
    assert "pictures with blank captions left out: 1" in caplog.text


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is no folder of pictures \(.png, "):
        of_folder(tmp_path, 1)


def test_listed_pictures_that_are_missing_are_counted(pictures):
    (pictures / "metadata.csv").write_text("file_name,prompt\nb.png,one\nno.png,two\n")
    with pytest.raises(UserError, match=r"1 of 2 pictures are missing in .*pictures: 'no.png'"):
        of_folder(pictures, 2)
