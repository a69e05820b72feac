"""Text -> batches: deterministic everywhere, every window once an epoch, and clear refusals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nemo_dist_conf.errors import ConfigError, DataError
from nemo_dist_conf.own_loop.row_order import mix_seed
from nemo_dist_conf.train.corpus import BYTE_VOCABULARY, Corpus, check_vocabulary, load_corpus
from nemo_dist_conf.train.data import TextData, build_data, split_microbatches

TEXT = "".join(f"line {n} of a text that is long enough for a few windows\n" for n in range(200))


def corpus(tokens: int) -> Corpus:
    ids = torch.arange(tokens, dtype=torch.int32)
    return Corpus(ids, tokens, "numbers", 1, tokens, {}, False, 0)


def data(windows: int, batch: int = 4, seq_len: int = 8, seed: int = 0) -> TextData:
    return TextData(corpus(windows * seq_len + 1), seq_len=seq_len, global_batch_size=batch, seed=seed)


def refused(error: pytest.ExceptionInfo[ConfigError], *, what: str = "", asked: str = "", type_: str = "") -> None:
    """All three parts are there, the asked words say what was typed, and the remedy parses as Hydra overrides."""
    for problem in error.value.problems:
        assert problem.what and problem.asked and problem.allowed and problem.instead
    assert what in str(error.value.what)
    assert asked in error.value.asked
    if type_:
        assert error.value.type == type_
    for problem in error.value.problems:
        OverridesParser.create().parse_overrides(problem.instead.split(" "))


# ---------------------------------------------------------------------------------------------- order of the batches


def test_labels_are_the_next_tokens_and_windows_overlap_by_one() -> None:
    source = data(windows=12)
    ids, labels = source.batch(0)
    assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape == (4, 8)
    assert torch.equal(labels, ids + 1)  # the corpus counts upwards
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert (ids[:, 0] % 8 == 0).all()


@pytest.mark.parametrize("windows, batch", [(12, 4), (12, 5), (7, 4), (3, 8), (1, 3), (97, 10)])
def test_each_epoch_visits_every_window_exactly_once(windows: int, batch: int) -> None:
    """Also where batches straddle epochs, or hold several of them."""
    source = data(windows, batch)
    epochs = 4
    steps = -(-windows * epochs // batch)
    visited = torch.cat([source.window_ids(step) for step in range(steps)])[: windows * epochs]
    for epoch in visited.view(epochs, windows):
        assert sorted(epoch.tolist()) == list(range(windows))


def test_epochs_have_different_orders() -> None:
    source = data(windows=64, batch=64)
    assert source.window_ids(0).tolist() != source.window_ids(1).tolist() != list(range(64))


def test_every_token_but_the_first_is_predicted_once_an_epoch() -> None:
    source = data(windows=10, batch=10)
    _, labels = source.batch(0)
    assert sorted(labels.flatten().tolist()) == list(range(1, 81))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_the_parts_of_the_data_ranks_make_up_the_global_batch_in_order(size: int, step: int) -> None:
    """12 rows of 17 windows: steps 1 and 5 straddle an epoch."""
    source = data(windows=17, batch=12)
    whole = source.batch(step)
    parts = [source.batch(step, rank, size) for rank in range(size)]
    for index in (0, 1):
        assert all(part[index].size(0) == 12 // size for part in parts)
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    """A run that resumes at step 9 reads what an uninterrupted one does, in whatever order steps are asked."""
    used, fresh = data(windows=5, batch=4), data(windows=5, batch=4)
    for step in (0, 30, 2, 9, 1):
        used.batch(step)
    assert torch.equal(used.batch(9)[0], fresh.batch(9)[0])


def test_the_seed_changes_the_order() -> None:
    assert data(64, 64, seed=0).window_ids(0).tolist() != data(64, 64, seed=1).window_ids(0).tolist()


def test_seeds_depend_on_every_part_and_their_order() -> None:
    seeds = {mix_seed(a, b) for a in range(10) for b in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(12, 3) != mix_seed(1, 23)


def test_microbatches_are_the_rows_in_order() -> None:
    ids, labels = data(windows=12, batch=12).batch(0)
    parts = split_microbatches(ids, labels, 3)
    assert len(parts) == 4
    assert torch.equal(torch.cat([part[0] for part in parts]), ids)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)


PROBE = """
import sys, zlib
from nemo_dist_conf.train.corpus import load_corpus
from nemo_dist_conf.train.data import TextData
source = TextData(load_corpus(sys.argv[1]), seq_len=16, global_batch_size=8, seed=3)
batches = b"".join(t.numpy().tobytes() for step in range(40) for t in source.batch(step))
print(source.corpus.fingerprint, zlib.crc32(batches))
"""


def test_processes_agree_whatever_their_hash_seed_and_folder_order(tmp_path: Path) -> None:
    for name in "zebra alpha mid Beta".split():  # written in another order than they are read
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "b.txt").write_text(f"second of {name} " * 20)
        (tmp_path / "texts" / name / "a.txt").write_text(f"first of {name} " * 20)
    answers = set()
    for hash_seed, threads in (("0", "1"), ("4711", "2")):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", PROBE, str(tmp_path / "texts")]
        answers.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(answers) == 1


# ---------------------------------------------------------------------------------------------- what is read


def test_the_standard_library_takes_less_than_a_cpu_second_and_is_cut_at_its_limit() -> None:
    began = time.process_time()
    found = load_corpus()
    assert time.process_time() - began < 1.0
    assert found.text_bytes == 8_000_000 and found.cut
    assert found.vocabulary == BYTE_VOCABULARY and found.tokens.dtype == torch.uint8
    assert "standard library" in str(found) and "the first 8.0 MB" in str(found)


def test_bytes_are_the_ids_and_zero_separates_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("né", encoding="utf-8")
    (tmp_path / "b.txt").write_text("x")
    assert load_corpus(str(tmp_path)).tokens.tolist() == [*"né".encode(), 0, ord("x"), 0]


def test_folders_are_read_recursively_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".git/config", ".env", "c/__pycache__/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = load_corpus(str(tmp_path))
    assert bytes(found.tokens.tolist()).split(b"\0") == [b"a.txt", b"b/1.txt", b"b/2.txt", b""]
    assert found.files == 3


def test_a_glob_takes_matching_files_and_the_files_of_matching_folders_once(tmp_path: Path) -> None:
    for name in ("one/a.md", "one/b.txt", "two/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert load_corpus(str(tmp_path / "**/*.md")).files == 2
    assert load_corpus(str(tmp_path / "t*")).files == 1
    assert load_corpus(str(tmp_path / "**")).files == 3


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "[1].txt").write_text("brackets")
    assert load_corpus(str(tmp_path / "[1].txt")).files == 1


def test_a_relative_path_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert load_corpus("here.txt").tokens.numel() == 5


def test_files_that_are_not_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "nothing.txt").write_text("")
    found = load_corpus(str(tmp_path))
    assert found.files == 1
    assert found.skipped == {"binary": 1, "not UTF-8": 1, "empty": 1}
    assert "1 binary" in str(found)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read, also by root")
def test_an_unreadable_file_in_a_folder_is_counted_and_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "broken.txt").symlink_to("/proc/self/mem")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert load_corpus(str(tmp_path)).skipped == {"unreadable": 1}
    with pytest.raises(DataError) as error:
        load_corpus(str(tmp_path / "broken.txt"))
    refused(error, what="cannot be read", asked="broken.txt", type_="data.path=null")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert bytes(load_corpus(str(tmp_path)).tokens.tolist()) == b"hi\0"


def test_max_mb_cuts_inside_a_file_without_breaking_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" + "é" * 10, encoding="utf-8")
    (tmp_path / "b.txt").write_text("never read")
    found = load_corpus(str(tmp_path), max_mb=6e-6)  # 6 bytes: the second é is cut in half
    assert bytes(found.tokens.tolist()) == "abcé".encode() + b"\0"
    assert found.cut and found.files == 1
    whole = load_corpus(str(tmp_path), max_mb=1)
    assert not whole.cut and whole.files == 2


# ---------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


def text_folder(folder: Path) -> str:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(TEXT)
    (folder / "texts" / "b.txt").write_text("short")
    return str(folder / "texts")


def test_a_tokenizer_file_encodes_and_ends_each_document(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    found = load_corpus(text_folder(tmp_path), str(tokenizer_file))
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    end = loaded.token_to_id("<|endoftext|>")
    ids = found.tokens.tolist()
    assert ids.count(end) == 2 and ids[-1] == end
    assert loaded.decode(ids[: ids.index(end)]) == TEXT
    assert found.vocabulary == 300 and found.tokens.dtype == torch.int32


def test_a_tokenizer_folder_gives_the_same_ids_as_its_file(tokenizer_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "tok")
    path = text_folder(tmp_path)
    by_folder, by_file = load_corpus(path, str(tmp_path / "tok")), load_corpus(path, str(tokenizer_file))
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_folder.vocabulary == 300


def test_a_tokenizer_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError) as error:
        load_corpus(None, "no-such-org/no-such-tokenizer")
    refused(error, what="no file or folder", asked="data.tokenizer=no-such-org", type_="data.tokenizer=null")


@pytest.mark.parametrize("content", ["not json", "{}", json.dumps({"model": {"type": "Nonsense"}})])
def test_a_broken_tokenizer_file_is_refused(tmp_path: Path, content: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError) as error:
        load_corpus(None, str(tmp_path / "tokenizer.json"))
    refused(error, what="cannot be loaded as a tokenizer", type_="data.tokenizer=null")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError) as error:
        load_corpus(None, str(tmp_path))
    refused(error, asked=f"data.tokenizer={tmp_path}", type_="data.tokenizer=null")


def test_a_missing_package_names_the_pip_line(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        load_corpus(None, str(tokenizer_file))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        load_corpus(None, str(tmp_path))


def test_ids_beyond_the_models_vocabulary_are_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    found = load_corpus(text_folder(tmp_path), str(tokenizer_file))
    check_vocabulary(found, 300)
    with pytest.raises(DataError) as error:
        check_vocabulary(found, 256)
    refused(error, what="300 ids", asked="data.tokenizer=", type_="model.config.vocab_size=300")
    with pytest.raises(DataError) as error:
        check_vocabulary(found, 256, checkpoint="my/model")
    refused(error, asked="data.tokenizer=", type_="data.tokenizer=my/model")


def test_only_ids_that_occur_count(tmp_path: Path) -> None:
    """ASCII works with 128 ids; a byte above does not."""
    (tmp_path / "a.txt").write_text("plain ascii")
    check_vocabulary(load_corpus(str(tmp_path / "a.txt")), 128)
    (tmp_path / "a.txt").write_text("é", encoding="utf-8")
    with pytest.raises(DataError) as error:
        check_vocabulary(load_corpus(str(tmp_path / "a.txt")), 128)
    refused(error, what="bytes up to 195", asked="data.tokenizer=null", type_="model.config.vocab_size=256")


# ---------------------------------------------------------------------------------------------- refusals


def make_empty_folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def make_fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def make_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


BAD_PATHS: list[tuple[str, Any, str]] = [
    ("empty word", lambda p: "", "an empty path"),
    ("blank word", lambda p: "  ", "an empty path"),
    ("missing", lambda p: str(p / "nowhere.txt"), "there is no file or folder"),
    ("glob without match", lambda p: str(p / "*.nothing"), "no file matches"),
    ("empty folder", lambda p: make_empty_folder(p / "folder"), "holds no files"),
    ("empty file", lambda p: make_file(p / "f", b""), "is empty"),
    ("binary file", lambda p: make_file(p / "f", b"\x7fELF\0\0"), "is binary"),
    ("other encoding", lambda p: make_file(p / "f", "naïve".encode("latin-1")), "is not UTF-8 text (byte 0xef"),
    ("a pipe", lambda p: make_fifo(p / "fifo"), "neither a regular file nor a folder"),
    ("a device", lambda p: "/dev/zero", "neither a regular file nor a folder"),
]


@pytest.mark.parametrize("make, what", [row[1:] for row in BAD_PATHS], ids=[row[0] for row in BAD_PATHS])
def test_a_path_that_gives_no_text_is_refused(tmp_path: Path, make: Any, what: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as error:
        load_corpus(path)
    refused(error, what=what, asked="data.path=", type_="data.path=null")
    [word] = shlex.split(error.value.asked)
    assert (
        OverridesParser.create().parse_override(word).value() == path
    )  # the words asked, typed again, are the same request


def test_a_folder_without_any_text_says_what_is_in_it(tmp_path: Path) -> None:
    make_file(tmp_path / "a.bin", b"\0")
    make_file(tmp_path / "b.bin", b"\0")
    with pytest.raises(DataError) as error:
        load_corpus(str(tmp_path))
    refused(error, what="none of the 2 files", type_="data.path=null")
    assert "2 binary" in error.value.what


def test_a_misspelt_path_suggests_its_neighbour(tmp_path: Path) -> None:
    make_file(tmp_path / "corpus.txt", b"text")
    with pytest.raises(DataError, match=r"there is corpus\.txt"):
        load_corpus(str(tmp_path / "corpsu.txt"))


@pytest.mark.parametrize("name", ["it's.txt", "two words", "a=b", "back\\slash", "{brace}", "trailing\\", "q\\'uote"])
def test_odd_names_are_quoted_as_hydra_reads_them(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    with pytest.raises(DataError) as error:
        load_corpus(path)
    [word] = shlex.split(error.value.asked)
    assert OverridesParser.create().parse_override(word).value() == path


@pytest.mark.parametrize("seq_len, type_", [(20, "data.seq_len=5"), (6, "data.seq_len=5")])
def test_a_text_shorter_than_one_sequence_is_refused(tmp_path: Path, seq_len: int, type_: str) -> None:
    found = load_corpus(make_file(tmp_path / "a.txt", b"12345"))  # 6 tokens with the separator
    with pytest.raises(DataError) as error:
        TextData(found, seq_len=seq_len, global_batch_size=1, seed=0)
    refused(error, what="6 tokens", asked=f"data.seq_len={seq_len}", type_=type_)
    assert TextData(found, seq_len=5, global_batch_size=1, seed=0).num_windows == 1


NODE = {"path": None, "tokenizer": None, "seq_len": 16, "max_mb": 0.01}


def build(**changes: Any) -> Any:
    return build_data(OmegaConf.create({**NODE, **changes}), global_batch_size=4, seed=0)


def test_a_config_node_becomes_text_data() -> None:
    source = build()
    assert isinstance(source, TextData)
    assert source.batch(0, 1, 2)[0].shape == (2, 16)
    assert source.tokens_per_batch == 64


@pytest.mark.parametrize(
    "changes, asked, type_",
    [
        ({"seq_len": 0}, "data.seq_len=0", "data.seq_len=64"),
        ({"seq_len": -3}, "data.seq_len=-3", "data.seq_len=64"),
        ({"seq_len": 2.5}, "data.seq_len=2.5", "data.seq_len=64"),
        ({"seq_len": True}, "data.seq_len=true", "data.seq_len=64"),
        ({"seq_len": None}, "data.seq_len=null", "data.seq_len=64"),
        ({"seq_len": "many"}, "data.seq_len=many", "data.seq_len=64"),
        ({"max_mb": 0}, "data.max_mb=0", "data.max_mb=null"),
        ({"max_mb": float("nan")}, "data.max_mb=nan", "data.max_mb=null"),
        ({"path": 12}, "data.path=12", "data.path=null"),
        ({"tokenizer": True}, "data.tokenizer=true", "data.tokenizer=null"),
    ],
)
def test_a_wrong_setting_is_refused(changes: dict[str, Any], asked: str, type_: str) -> None:
    with pytest.raises(DataError) as error:
        build(**changes)
    refused(error, asked=asked, type_=type_)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(DataError) as error:
        build(seq_len=0, max_mb=-1, path=3)
    refused(error)
    assert len(error.value.problems) == 3


def test_a_missing_seq_len_is_refused_as_a_wrong_one() -> None:
    with pytest.raises(DataError, match="data.seq_len"):
        build_data({"path": None}, global_batch_size=1, seed=0)


def test_data_that_is_a_word_is_refused() -> None:
    with pytest.raises(DataError) as error:
        build_data("text", global_batch_size=1, seed=0)
    refused(error, asked="data=text", type_="data=text")


class UsersData:
    def __init__(self, word: str, global_batch_size: int, seed: int) -> None:
        self.got = (word, global_batch_size, seed)

    def batch(self, step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, 1), torch.zeros(1, 1)


def test_a_target_is_the_users_own_data() -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.UsersData", "word": "hi"})
    built: Any = build_data(node, global_batch_size=8, seed=5)
    assert built.got == ("hi", 8, 5)


def test_a_target_without_batch_is_refused() -> None:
    node = OmegaConf.create({"_target_": "builtins.dict"})
    with pytest.raises(DataError) as error:
        build_data(node, global_batch_size=8, seed=5)
    refused(error, what="dict has no method batch", asked="data._target_=builtins.dict", type_="data=text")
