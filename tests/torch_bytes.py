"""torch.save's format by hand: the opcodes that torch writes (pickle protocol 2), a persistent id for each storage."""

import struct
import zipfile


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def called(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + tuple_of(*arguments) + b"R"


def dictionary(entries, kind=None):
    items = b"(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"
    return (b"}" if kind is None else called("collections", "OrderedDict")) + items


def tensor_of(key, shape, strides, offset=0, numel=0, storage="FloatStorage", kind="_rebuild_tensor_v2"):
    pid = tuple_of(text("storage"), f"ctorch\n{storage}\n".encode(), text(key), text("cpu"), number(numel)) + b"Q"
    hooks = called("collections", "OrderedDict")
    sizes = [tuple_of(*map(number, numbers)) for numbers in (shape, strides)]
    return called("torch._utils", kind, pid, number(offset), *sizes, b"\x89", hooks)


def contiguous(key, array):
    strides = [s // array.itemsize for s in array.strides]
    return tensor_of(key, array.shape, strides, numel=array.size)


def write_torch(path, content, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_state_dict(path, tensors, wrap=lambda entries: entries):
    entries = dictionary({name: contiguous(name, tensor) for name, tensor in tensors.items()}, kind="OrderedDict")
    metadata = tuple_of(dictionary({"_metadata": called("collections", "OrderedDict")})) + b"0"  # built and popped
    state = dictionary({"_metadata": called("collections", "OrderedDict")}) + b"b"  # as an attribute
    return write_torch(path, metadata + wrap(entries + state), tensors)
