"""Files of weights, of which one tensor at a time is read."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cs_lm.errors import UserError
from cs_lm.storage.atomic import atomic_write
from cs_lm.storage.safe_load import check_archive, check_old_file, check_tensor

MAX_JSON_BYTES = 64 << 20
ADDED_TOKENS = "added_tokens.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
INSTALL_HINT = "install the extra with: pip install 'cs_lm[{}]'"


class Source(Protocol):
    """shapes      of every tensor, by the name that it has in the files
    not_floats  names of tensors whose numbers would not be those of a float32
    gives_away  whether a tensor that was read may be kept
    """

    shapes: dict[str, tuple[int, ...]]
    not_floats: list[str]
    owns_tensors: bool

    def reading(self, name: str) -> AbstractContextManager[Tensor]:
        """The tensor, to be used inside; once for each name."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ValueError naming a file that holds no JSON object, or far too much."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"more than {MAX_JSON_BYTES >> 20} MB")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"weights: {str(path)!r} cannot be read ({error})") from None
    return content


def write_json(path: Path, content: dict) -> None:
    atomic_write(path, json.dumps(content, indent=2).encode("utf-8"))


class SafetensorsSource:
    """One or more `.safetensors` files, of which a tensor is a window that is closed again."""

    owns_tensors = False

    def __init__(self, paths: list[Path]):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise UserError(
                f"weights: needs the package safetensors; {INSTALL_HINT.format('weights')}"
            ) from None
        self._open = safe_open
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.not_floats: list[str] = []
        self._path_of: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (it is no dict)
                        tensor = file.get_slice(name)
                        if tensor.get_dtype() not in _FLOATS:
                            self.not_floats.append(name)
                        _add(self.shapes, name, tuple(tensor.get_shape()), path)
                        self._path_of[name] = path
            except (SafetensorError, OSError) as error:
                raise UserError(f"weights: {str(path)!r} cannot be read ({error})") from None

    @contextmanager
    def reading(self, name: str) -> Iterator[Tensor]:
        with self._open(self._path_of[name], "pt") as file:
            yield file.get_tensor(name)


class TorchSource:
    """One or more files of `torch.save`, which are read whole, and given out in pieces."""

    owns_tensors = True

    def __init__(self, paths: list[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.not_floats: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                is_archive = file.read(4) == b"PK\x03\x04"  # as torch.load decides it
            (check_archive if is_archive else check_old_file)(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors = self._tensors_of(content)
            for name, x in tensors.items():
                if type(name) is not str or not isinstance(x, Tensor):
                    raise UserError("more than named tensors")
                check_tensor(x)
        except Exception as error:  # torch.load raises whatever its unpickler meets
            raise UserError(
                f"weights: {str(path)!r} cannot be read ({type(error).__name__}): it is damaged, "
                "or holds more than tensors"
            ) from None
        for name, x in tensors.items():
            _add(self.shapes, name, tuple(x.shape), path)
            if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                self.not_floats.append(name)
        self._tensors.update(tensors)

    def _tensors_of(self, content: Any) -> dict[str, Tensor]:
        return content.get("state_dict", content)

    @contextmanager
    def reading(self, name: str) -> Iterator[Tensor]:
        tensor = self._tensors.pop(name)
        memory = tensor.untyped_storage().data_ptr()
        shared = [x for x in self._tensors.values() if x.untyped_storage().data_ptr() == memory]
        yield tensor.clone() if shared else tensor


class NanoGPTSource(TorchSource):
    """nanoGPT's `ckpt.pt`, as if it were in the layout of GPT-2: products from the right, and
    biases of zeros where it was trained without.

    model_args  what it says of the model's shape
    """

    _PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    def __init__(self, path: Path):
        super().__init__([path])
        for name in list(self._tensors):
            tensor = self._tensors.pop(name)
            name = name.removeprefix("_orig_mod.")  # of a model that was compiled
            if name.rpartition(".")[0].endswith(self._PRODUCTS) and tensor.dim() == 2:
                tensor = tensor.T
            self._tensors[name] = tensor
        for name, tensor in list(self._tensors.items()):
            owner, _, kind = name.rpartition(".")
            is_biased = owner.endswith(("ln_1", "ln_2", "ln_f", *self._PRODUCTS))
            if kind == "weight" and is_biased and f"{owner}.bias" not in self._tensors:
                self._tensors[f"{owner}.bias"] = torch.zeros(tensor.shape[-1])
        self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}
        self.not_floats = [n for n, x in self._tensors.items() if not x.is_floating_point()]

    def _tensors_of(self, content: Any) -> dict[str, Tensor]:
        self.model_args = dict(content["model_args"])
        return content["model"]


class TensorFlowSource:
    """A checkpoint of TensorFlow, `model.ckpt.index` and its data."""

    owns_tensors = True

    def __init__(self, prefix: Path):
        try:
            import tensorflow as tf
        except ImportError:
            raise UserError(
                "weights: a TensorFlow checkpoint needs the package tensorflow; "
                f"{INSTALL_HINT.format('tensorflow')}"
            ) from None
        try:
            self._reader = tf.train.load_checkpoint(str(prefix))
            shapes = self._reader.get_variable_to_shape_map()
        except (ValueError, tf.errors.OpError) as error:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"weights: {str(prefix)!r} cannot be read ({first_line})") from None
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        kinds = self._reader.get_variable_to_dtype_map()
        self.not_floats = [name for name, kind in kinds.items() if not kind.is_floating]

    @contextmanager
    def reading(self, name: str) -> Iterator[Tensor]:
        yield torch.from_numpy(self._reader.get_tensor(name))


def _add(shapes: dict[str, tuple], name: str, shape: tuple[int, ...], path: Path) -> None:
    """Raises: ValueError for a name that an earlier file has already."""
    if name in shapes:
        raise UserError(f"weights: {name} of {str(path)!r} is in another file, too")
    shapes[name] = shape


def nanogpt_file(path: Path) -> Path | None:
    """The `ckpt.pt` that a path names or holds, without settings beside it."""
    file = path / "ckpt.pt" if path.is_dir() else path
    is_alone = not (file.parent / "config.json").exists()
    return file if file.suffix == ".pt" and file.is_file() and is_alone else None


def open_source(path: Path) -> Source:
    """The weights in a folder, or in a file of it.

    Raises: FileNotFoundError or ValueError saying what is needed.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return SafetensorsSource([path])
        if path.suffix in (".bin", ".pt", ".pth"):
            return TorchSource([path])
        if path.name.endswith(".index"):
            return TensorFlowSource(path.with_suffix(""))
        raise UserError(f"weights: got {str(path)!r}, need a .safetensors, .bin or .index file")
    for name, kind in (
        ("model.safetensors", SafetensorsSource),
        ("pytorch_model.bin", TorchSource),
    ):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return kind([path / name])
        if index.is_file():
            return kind(_shards(index))
    indices = sorted(path.glob("*.index"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise UserError(f"weights: {str(path)!r} holds {names}; name one of them")
    if indices:
        return TensorFlowSource(indices[0].with_suffix(""))
    raise FileNotFoundError(
        f"weights: {str(path)!r} holds no model.safetensors, pytorch_model.bin or "
        "model.ckpt.index, nor an index of several files"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them in its folder."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"weights: {str(index)!r} has no weight_map of names and files")
    paths = []
    for name in sorted(set(files.values())):
        path = index.parent / name
        if Path(name).name != name or "\\" in name or not path.is_file():
            raise UserError(f"weights: {str(index)!r} names {name!r}, which is no file beside it")
        paths.append(path)
    return paths
