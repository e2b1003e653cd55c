"""Weight files: read without running anything in them, fingerprinted, and fitted key by key."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from util.checkpoint import CheckpointError, check_weights_fit, load_file
from util.config import ConfigError

StateDict = dict[str, Tensor]


class BackboneError(ConfigError):
    """The backbone is not available as it was asked for; the message says what is."""


def read_file(path: Path) -> dict:
    """Plain types and tensors only: a file that wants more is refused by name, never run."""
    if not path.is_file():
        raise BackboneError(f"pretrained weights: there is no file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        contents = load_file(path)
    except CheckpointError as error:
        wanted = unsafe_names(path)
        if wanted:
            raise BackboneError(
                f"{path} is refused, because reading it would run code: it wants "
                f"{', '.join(wanted)}; expected a file of tensors and plain types, so save its "
                f"weights alone where you trust it"
            ) from error
        raise BackboneError(str(error)) from error
    if not isinstance(contents, dict):
        raise BackboneError(f"{path} holds a {type(contents).__name__}; expected a state_dict")
    return contents


def read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    try:
        return load_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{path} cannot be read ({error})") from error


def unsafe_names(path: Path) -> list[str]:
    """What a pickle wants to import beyond tensors; empty where the file is damaged instead."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it could not be read, and the caller says so
        return []


def unwrap(contents: dict, names: tuple[str, ...], path: Path) -> StateDict:
    """The tensors below the first of these keys that is there, or at the top."""
    for name in names:
        if isinstance(contents.get(name), dict):
            contents = contents[name]
            break
    tensors = {key: value for key, value in contents.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(contents)[:5])) or "nothing"
        raise BackboneError(f"{path} holds no weights where they are expected; it holds {found}")
    return tensors


def fit(model: nn.Module, weights: StateDict, source: object) -> None:
    """Every key must be there, in its shape, and no other."""
    try:
        check_weights_fit(weights, model.state_dict(), source)
    except CheckpointError as error:
        raise BackboneError(str(error)) from error
    model.load_state_dict(weights)


def file_fingerprint(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_fingerprint(model: nn.Module) -> str:
    """The same for weights that come from no file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
