"""TFDS folders made by hand, in either format, without TensorFlow."""

import itertools
import struct
from pathlib import Path


def write_tfds_folder(folder, file_format, splits, features, name="tiny", crc=None):
    """A data set as TFDS leaves it. splits: name -> for each shard its examples; features: TFDS's FeaturesDict.

    crc: of `tfrecord`. Returns the shards' paths.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = Path(folder)
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix=file_format)
    infos, paths = [], []
    for split, shards in splits.items():
        lengths = [len(shard) for shard in shards]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=template))
        for i, shard in enumerate(shards):
            path = folder / f"{name}-{split}.{file_format}-{i:05}-of-{len(shards):05}"
            records = [features.serialize_example(example) for example in shard]
            if file_format == "tfrecord":
                path.write_bytes(b"".join(tfrecord(record, crc) for record in records))
            else:
                writer = ArrayRecordWriter(str(path), "group_size:1")
                for record in records:
                    writer.write(record)
                writer.close()
            paths.append(path)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, filename_template=template, check_data=False,
        supervised_keys=("image", "label"),
    )  # fmt: skip
    return paths


def tfrecord(data, crc=None):
    """One record of a TFRecord file. crc: the checksum's function, `crc32c` unless a faster one is given."""
    crc = crc or crc32c
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc(length))) + data + struct.pack("<I", masked(crc(data)))


def masked(crc):
    """Turned right by 15 bits, plus a constant (TensorFlow's description of the format)."""
    bits = f"{crc:032b}"
    return (int(bits[-15:] + bits[:-15], 2) + 0xA282EAD8) % 2**32


def crc32c(data):
    """CRC-32C (RFC 3720, B.4) bit by bit: the remainder of a division by a polynomial, all bits reversed."""
    register = 0xFFFFFFFF
    for bit in itertools.chain.from_iterable(((byte >> i) & 1 for i in range(8)) for byte in data):
        feedback = (register & 1) ^ bit
        register = (register >> 1) ^ (0x82F63B78 if feedback else 0)
    return register ^ 0xFFFFFFFF
