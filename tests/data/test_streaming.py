# Copyright 2026 The ERW-HF authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import collections
import io
import itertools
import logging
import tarfile

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset
from helpers import SHARD_ROWS as ROWS
from helpers import kill_training_at, launch_training, train, write_shards
from PIL import Image as PILImage

from erw_hf.data.samples import SampleMaker
from erw_hf.data.source import load_source
from erw_hf.data.streaming import RowReader, StreamingSamples, stream_loader
from erw_hf.trainer.run_record import read_metrics


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def loader(path, workers=0, processes=1, rank=0, state=None, batch=4, seed=0):
    source = load_source(path, streaming=True)
    maker = SampleMaker(source, 8, 1, (1, 8, 8), seed, class_dropout_prob=0.1, random_flip=False)
    samples = StreamingSamples(maker, processes, rank, block=7)
    return stream_loader(samples, batch, workers, pin_memory=False, state=state)


def numbers(batch):
    return batch["pixels"][:, 0, 0, 0].tolist()


def read(stream, batches):
    iterator = iter(stream)
    return [numbers(next(iterator)) for _ in range(batches)]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (7, 0)])
def test_every_sample_of_an_epoch_exactly_once(shards, processes, workers):
    counts = collections.Counter()
    for rank in range(processes):
        samples = loader(shards, workers, processes, rank, batch=1)
        iterator, mine = iter(samples), collections.Counter()
        # A process's share of an epoch is over when a sample comes a second time.
        while True:
            number = numbers(next(iterator))[0]
            if mine[number]:
                break
            mine[number] += 1
        counts += mine
        if workers == 0:
            later = [numbers(next(iterator))[0] for _ in range(sum(mine.values()) - 1)]
            assert set(later) <= set(mine)
    if workers == 0:  # with workers, epochs of the shares overlap at their ends
        assert counts == collections.Counter(range(ROWS))
    else:
        assert max(counts.values()) == 1


def test_order_changes_with_the_epoch_and_the_seed(shards):
    first = [n for batch in read(loader(shards, batch=1), 2 * ROWS) for n in batch]
    assert sorted(first[:ROWS]) == sorted(first[ROWS:]) == list(range(ROWS))
    assert first[:ROWS] != first[ROWS:] and first[:ROWS] != list(range(ROWS))
    assert first != [n for batch in read(loader(shards, batch=1, seed=1), 2 * ROWS) for n in batch]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 5, 24, 26, 55])
def test_resumes_exactly_twice_and_across_epochs(shards, workers, cut):
    whole = read(loader(shards, workers), cut + 40)
    state = None
    position = 0
    for stop in (cut, cut + 1, cut + 20):  # the first two in one block
        stream = loader(shards, workers, state=state)
        iterator = iter(stream)
        assert [numbers(next(iterator)) for _ in range(stop - position)] == whole[position:stop]
        state, position = stream.state_dict(), stop
        del iterator
    assert read(loader(shards, workers, state=state), 20) == whole[cut + 20 :]


@pytest.mark.parametrize("cut", [3, 9, 15, 25])
def test_a_share_of_rows_resumes_exactly_in_every_block(shards, cut):
    """Fewer shards than processes: each process keeps each 6th row, 17 of an epoch, in blocks of 7."""
    share = {"processes": 6, "rank": 4, "batch": 1}
    whole = read(loader(shards, **share), cut + 20)
    stream = loader(shards, **share)
    iterator = iter(stream)
    assert [numbers(next(iterator)) for _ in range(cut)] == whole[:cut]
    assert read(loader(shards, **share, state=stream.state_dict()), 20) == whole[cut:]


def test_draws_of_a_sample_do_not_depend_on_processes_or_workers(shards):
    def draws(**kwargs):
        iterator = iter(loader(shards, batch=1, **kwargs))
        found = {}
        for _ in range(ROWS):
            batch = next(iterator)
            found.setdefault(numbers(batch)[0], batch["noise"][0])
        return found

    plain = draws()
    for other in (draws(workers=2), draws(processes=2, rank=1)):
        shared = set(plain) & set(other)
        assert len(shared) > 5
        assert all(torch.equal(plain[number], other[number]) for number in shared)


def test_files_that_are_no_images_are_skipped_counted_and_named(tmp_path, caplog):
    path = write_shards(tmp_path / "bad", rows=30, shards=2, bad=(3, 20))
    with caplog.at_level(logging.WARNING):
        stream = loader(path, batch=1)
        seen = [n for batch in read(stream, 28) for n in batch]
    assert sorted(seen) == [i for i in range(30) if i not in (3, 20)]
    assert "bad3.png" in caplog.text and "bad20.png" in caplog.text and "2 skipped so far" in caplog.text


def test_a_stream_sorted_by_class_is_warned_of(tmp_path, shards, caplog):
    read(loader(shards), 4)
    assert "sorted by class" not in caplog.text
    features = Features({"image": Image(), "label": ClassLabel(names=list("abc"))})
    images = [PILImage.new("L", (8, 8), i) for i in range(60)]
    Dataset.from_dict({"image": images, "label": [i // 20 for i in range(60)]}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    read(loader(str(tmp_path)), 4)
    assert "the first 7 images of the stream belong to 1 of 3 classes: it seems sorted by class" in caplog.text
    assert caplog.text.count("sorted by class") == 1


def test_streams_are_checked_before_training(tmp_path, shards):
    source = load_source(shards, streaming=True)
    assert (source.num_classes, source.id2label) == (3, {0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match="image_column='photo'"):
        load_source(shards, streaming=True, image_column="photo")
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": [PILImage.new("L", (8, 8))], "label": [7]}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(ValueError, match="for a stream, set num_classes"):
        load_source(str(tmp_path), streaming=True)
    source = load_source(str(tmp_path), streaming=True, num_classes=3)
    maker = SampleMaker(source, 8, 1, (1, 8, 8), 0, 0.1, False)
    with pytest.raises(ValueError, match=r"label 7 of .* is not in \[0, 2\]"):
        next(iter(StreamingSamples(maker, 1, 0)))


def test_truncated_shards_are_left_counted_and_named(tmp_path, caplog):
    """Also resumed exactly: in a block that holds the break, and after it."""
    path = write_shards(tmp_path / "cut", rows=60, shards=6)
    shard = tmp_path / "cut" / "train-2.parquet"
    lost = len(load_dataset("parquet", data_files=str(shard), split="train"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        whole = read(loader(path), 30)
    assert "skipped the rest of the broken shard" in caplog.text and "train-2.parquet" in caplog.text
    assert len({n for batch in whole for n in batch}) == 60 - lost
    # 7 processes: fewer shards than processes, so each reads all of them and keeps each 7th row.
    for processes, rank, cuts in ((1, 0, (3, 7, 9, 13)), (3, 2, (2, 4, 9)), (7, 1, (1, 2, 5))):
        whole = read(loader(path, processes=processes, rank=rank, batch=2), 20)
        for cut in cuts:
            stream = loader(path, processes=processes, rank=rank, batch=2)
            iterator = iter(stream)
            assert [numbers(next(iterator)) for _ in range(cut)] == whole[:cut]
            state = stream.state_dict()
            assert read(loader(path, processes=processes, rank=rank, batch=2, state=state), 20 - cut) == whole[cut:]


@pytest.mark.parametrize("broken", ["first", "damaged inside", "of a worker"])
def test_other_ways_in_which_a_shard_breaks(tmp_path, broken, caplog, capfd):
    path = write_shards(tmp_path / "cut", rows=60, shards=4)
    shard = tmp_path / "cut" / ("train-0.parquet" if broken == "first" else "train-3.parquet")
    lost = len(load_dataset("parquet", data_files=str(shard), split="train"))
    content = bytearray(shard.read_bytes())
    if broken == "damaged inside":
        content[4:200] = bytes(196)
    shard.write_bytes(content if broken == "damaged inside" else content[:-40])
    log = logging.FileHandler(tmp_path / "log")  # which workers write to as well
    logging.getLogger().addHandler(log)
    batches = read(loader(path, workers=2 if broken == "of a worker" else 0), 30)
    logging.getLogger().removeHandler(log)
    assert len({n for batch in batches for n in batch}) == 60 - lost
    said = (tmp_path / "log").read_text()
    if broken == "first":  # passed over by the reader of parquet itself
        said += caplog.text + capfd.readouterr().err
    assert shard.name in said
    assert not any(f"shard {path}/{other.name}" in said for other in shard.parent.iterdir() if other != shard)


def test_a_share_without_a_readable_image_ends_the_run(tmp_path):
    path = write_shards(tmp_path / "bad", rows=12, shards=2, bad=range(6, 12))
    with pytest.raises(ValueError, match="process 1, worker 0: its share of the data holds no readable image"):
        read(loader(path, processes=2, rank=1), 1)


def test_a_stream_without_a_readable_image_is_refused_when_it_is_opened(tmp_path):
    path = write_shards(tmp_path / "bad", rows=12, shards=2, bad=range(12))
    with pytest.raises(ValueError, match=r"none of 12 rows .* holds a readable image.*row 0 \(bad0.png\)"):
        load_source(path, streaming=True)


def test_files_that_lie_on_their_own_are_fetched_by_what_tries_again(tmp_path, monkeypatch):
    """An imagefolder has paths in place of content: a failing read is no broken image."""
    for i in range(6):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (8, 8), i).save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png")
    failures = [OSError(5, "Input/output error"), TimeoutError("slow")]

    def flaky(path):
        if failures:
            raise failures.pop()
        return open(path, "rb").read()

    monkeypatch.setattr("erw_hf.data.streaming.read_file", flaky)
    monkeypatch.setattr("erw_hf.data.retrying.time.sleep", lambda seconds: None)
    assert sorted(n for batch in read(loader(str(tmp_path), batch=1), 6) for n in batch) == list(range(6))
    assert not failures


def test_a_truncated_archive_is_left_where_it_breaks(tmp_path, caplog):
    for shard in range(3):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for i in range(10 * shard, 10 * shard + 10):
                buffer = io.BytesIO()
                PILImage.new("L", (8, 8), i).save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("cls", b"1")):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    broken = tmp_path / "train-1.tar"
    broken.write_bytes(broken.read_bytes()[: 4 * 1024 + 512 + 20])  # in the content of the third member
    source = load_source(str(tmp_path), streaming=True, num_classes=3)
    maker = SampleMaker(source, 8, 1, (1, 8, 8), 0, 0.1, False)
    with caplog.at_level(logging.WARNING):
        samples = StreamingSamples(maker, 1, 0, block=7)
        epoch = [int(sample["pixels"][0, 0, 0]) for sample in itertools.islice(samples, 22)]
    assert sorted(epoch) == [*range(12), *range(20, 30)]
    assert (
        "skipped the rest of the broken shard" in caplog.text and "train-1.tar after 2 of its examples" in caplog.text
    )


def flaky_stream(failures):
    """40 numbers in 4 shards; reading fails at each of `failures`, in turn, as over a network."""

    def rows(shards):
        for shard in shards:
            for number in range(10 * shard, 10 * shard + 10):
                if failures and failures[0] == number:
                    raise ConnectionError(f"connection lost at {failures.pop(0)}")
                yield {"label": number}

    return IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})


def test_the_reader_goes_on_after_failures_where_it_was(monkeypatch, caplog):
    waits = []
    monkeypatch.setattr("erw_hf.data.retrying.time.sleep", waits.append)
    reader = RowReader(flaky_stream([0, 5, 5, 5, 23]), None, retry_seconds=1000)
    rows = [row["label"] for _ in range(5) for row in reader.read(9)]
    assert rows == list(range(40))
    assert waits == [1, 1, 2, 4, 1]  # back-off, from the start again once a row has come
    assert "retrying in 4 s (ConnectionError: connection lost at 5)" in caplog.text


def test_the_reader_gives_up_in_bounded_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("erw_hf.data.retrying.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("erw_hf.data.retrying.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    with pytest.raises(ConnectionError, match="no data for .* connection lost at 7"):
        RowReader(flaky_stream([7] * 1000), None, retry_seconds=300).read(9)
    assert 200 < clock[0] <= 300
    reader = RowReader(flaky_stream([]), None, retry_seconds=300)
    monkeypatch.setattr(reader, "_rows", failing())
    with pytest.raises(FileNotFoundError):  # what waiting does not mend is raised at once
        reader.read(1)


def failing():
    raise FileNotFoundError("gone")
    yield


def losses(run):
    return [(record["step"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("kept", [2, 3, 5])
def test_training_on_a_stream_resumes_bitwise(tmp_path, tiny_flags, shards, kept):
    import shutil

    flags = [
        *tiny_flags,
        f"--dataset_name={shards}",
        "--streaming",
        "--checkpoints_total_limit=9",
        "--checkpointing_steps=1",
    ]
    train(*flags, f"--output_dir={tmp_path}/whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(kept + 1, 8):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    train(*flags, f"--output_dir={tmp_path}/cut", "--resume_from_checkpoint=latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        train(
            *flags,
            f"--output_dir={tmp_path}/cut",
            "--resume_from_checkpoint=checkpoint-2",
            "--dataloader_num_workers=1",
        )


def test_two_processes_stream_are_killed_and_resume_bitwise(tmp_path, tiny_flags, shards):
    flags = [
        *tiny_flags,
        f"--dataset_name={shards}",
        "--streaming",
        "--dataloader_num_workers=2",
        "--train_batch_size=2",
    ]
    launch_training(*flags, f"--output_dir={tmp_path}/whole", processes=2)
    resume = [*flags, f"--output_dir={tmp_path}/cut", "--resume_from_checkpoint=latest"]
    kill_training_at(5, *resume, processes=2)
    launch_training(*resume, processes=2)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
