"""Weight files of other programs, read one tensor at a time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cs_lm.errors import UserError, missing_package
from cs_lm.storage.json_file import read_json
from cs_lm.storage.safe_load import check_archive, check_old_file, check_tensor

ADDED_TOKENS = "added_tokens.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Source(Protocol):
    """The tensors in weight files.

    shapes        of every tensor, by its name in the files
    not_floats    names of tensors that are not of a supported floating-point type
    owns_tensors  whether the caller may keep a tensor without a copy
    """

    shapes: dict[str, tuple[int, ...]]
    not_floats: list[str]
    owns_tensors: bool

    def reading(self, name: str) -> AbstractContextManager[Tensor]:
        """A context with the tensor, valid inside only. Call it once for each name."""
        ...


class SafetensorsSource:
    """One or more `.safetensors` files; each tensor is mapped into memory only while in use."""

    owns_tensors = False

    def __init__(self, paths: list[Path]):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise UserError(missing_package("weights", "safetensors", "weights")) from None
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
    """One or more files of `torch.save`. They are read whole; each tensor is given out once."""

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
                is_archive = file.read(4) == b"PK\x03\x04"  # the same test as in torch.load
            (check_archive if is_archive else check_old_file)(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors = self._tensors_of(content)
            for name, x in tensors.items():
                if type(name) is not str or not isinstance(x, Tensor):
                    raise UserError("more than named tensors")
                check_tensor(x)
        except Exception as error:  # the unpickler of torch.load can raise any exception
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
    """nanoGPT's `ckpt.pt`, converted to the layout of GPT-2.

    Matrices are transposed to (d_in, d_out); missing biases become zeros.
    model_args  the model's shape, from the file
    """

    _PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    def __init__(self, path: Path):
        super().__init__([path])
        for name in list(self._tensors):
            tensor = self._tensors.pop(name)
            name = name.removeprefix("_orig_mod.")  # the prefix of a compiled model
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
    """A TensorFlow checkpoint: `model.ckpt.index` and its data."""

    owns_tensors = True

    def __init__(self, prefix: Path):
        try:
            import tensorflow as tf
        except ImportError:
            raise UserError(missing_package("weights", "tensorflow", "tensorflow")) from None
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
    """Adds a shape. Raises: UserError for a name that an earlier file has already."""
    if name in shapes:
        raise UserError(f"weights: {name} of {str(path)!r} is in another file too; need it once")
    shapes[name] = shape


def nanogpt_file(path: Path) -> Path | None:
    """The `ckpt.pt` in a folder, or the `.pt` file itself; None with a config.json beside it."""
    file = path / "ckpt.pt" if path.is_dir() else path
    is_alone = not (file.parent / "config.json").exists()
    return file if file.suffix == ".pt" and file.is_file() and is_alone else None


def open_source(path: Path) -> Source:
    """The weights in a folder, or in one of its files.

    Raises: FileNotFoundError or UserError saying what is needed.
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
    """The files that an index lists; all must be in its folder."""
    files = read_json(index, "weights").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"weights: {str(index)!r} has no weight_map of names and files")
    paths = []
    for name in sorted(set(files.values())):
        path = index.parent / name
        if Path(name).name != name or "\\" in name or not path.is_file():
            raise UserError(f"weights: {str(index)!r} names {name!r}, which is no file beside it")
        paths.append(path)
    return paths
