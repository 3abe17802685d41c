"""Feature extractors for the metrics of evaluate.py: a registry of names, and where the Inception weights come from.

An extractor turns images (uint8 [B, 3, H, W], any size) into features [B, D], which FID, KID, precision and recall
compare, and for the Inception score into logits [B, C]. Three kinds of names are understood:

* those of torch-fidelity, first of all "inception-v3-compat", the network behind published numbers;
* those given to `register_extractor`, here "digits";
* "file.py:Name" or "package.module:Name", an extractor of one's own.

Read next: evaluate.py.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar.data import digit_pixels
from hmar.recipe import unknown

INCEPTION = "inception-v3-compat"
# torch-fidelity's extractors whose weights are a plain state dict; the others fetch theirs in ways of their own.
STATE_DICT_EXTRACTORS = (INCEPTION, "vgg16")

# Makes the extractor, given the path of its weights if the user names one: a subclass of torch-fidelity's
# FeatureExtractorBase, or a function of images that returns features, or {"features": ..., "logits": ...}.
MakeExtractor = Callable[..., Any]


class Features(NamedTuple):
    """What an extractor makes of B images, on the CPU: features_BD float64, logits_BC float64 if it has any."""

    features_BD: Tensor
    logits_BC: Tensor | None


@dataclass
class Extractor:
    """An extractor, ready to use. `record` says in JSON values what it is; two with equal records agree."""

    extract: Callable[[Tensor], Mapping[str, Tensor]]
    features_layer: str
    logits_layer: str | None
    device: torch.device
    record: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> Features:
        """Raises ValueError if the extractor does not return what it should."""
        # NOTE: TF32 would change published numbers in the third digit.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            layers = self.extract(images_B3HW.to(self.device, non_blocking=True))
        checked = {}
        for name in filter(None, (self.features_layer, self.logits_layer)):
            layer = layers.get(name)
            if layer is None and name == self.logits_layer:
                raise ValueError(f'the extractor {self.name} returned no "{name}": leave "is" out of the metrics')
            if not isinstance(layer, Tensor) or layer.ndim != 2 or len(layer) != len(images_B3HW):
                got = f"of shape {tuple(layer.shape)}" if isinstance(layer, Tensor) else f"as {type(layer).__name__}"
                raise ValueError(
                    f'the extractor {self.name} returned "{name}" {got} for {len(images_B3HW)} images, expected a '
                    "tensor with a row of numbers for each"
                )
            if not layer.isfinite().all():
                raise ValueError(f'the extractor {self.name} returned "{name}" that are not finite')
            checked[name] = layer.double().cpu()
        return Features(checked[self.features_layer], checked.get(self.logits_layer))

    @property
    def name(self) -> str:
        return self.record["name"]

    def num_features(self, size: int) -> int:
        """D, found by a look at one black image of size x size; also tells early whether the extractor works."""
        return self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).features_BD.shape[1]


def register_extractor(name: str, make: MakeExtractor) -> None:
    """Make an extractor known by a name.

    Args:
        make: a subclass of torch_fidelity.FeatureExtractorBase; or a function without arguments (or with one, for the
            path that the user gives as weights) that returns a function or module of images uint8 [B, 3, H, W], which
            in turn returns features [B, D], or a dict of "features" [B, D] and "logits" [B, C].
    Raises:
        ValueError: for a name that is taken, or that could be read as file:object.
    """
    if not name or ":" in name or name in known_extractors():
        raise ValueError(f'an extractor cannot be called "{name}": expected a new name without a colon')
    if not callable(make):
        raise ValueError(f"the extractor {name} is a {type(make).__name__}, expected a class or a function")
    _registered[name] = make


def known_extractors() -> list[str]:
    """All names that are registered, here and with torch-fidelity if that is installed."""
    installed = importlib.util.find_spec("torch_fidelity") is not None
    return [*_registered, *(_fidelity_extractors() if installed else ())]


def open_extractor(
    name: str, *, logits: bool = False, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """The extractor of a name (see the module), on a device.

    Args:
        logits: also produce logits, for the Inception score.
        weights: file of its weights; by default Inception's are downloaded once into torch.hub's folder.
    Raises:
        ValueError: for an unknown name, or weights that are not there, cannot be had, or do not fit.
    """
    device = torch.device(device)
    make, record = _find(name)
    if weights is not None or name == INCEPTION:
        weights = _weights_file(name, weights)
        record["weights_sha256"] = _sha256(weights)
    if name in STATE_DICT_EXTRACTORS:
        _check_state_dict(name, weights)
    if _is_fidelity_class(make):
        layers = [make.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")[: 1 + logits]]
        # In the order of the network, each once.
        wanted = [layer for layer in make.get_provided_features_list() if layer in layers]
        keywords = {} if weights is None else {"feature_extractor_weights_path": str(weights)}
        module = _make(name, make, name, wanted, **keywords)

        def extract(images_B3HW: Tensor) -> Mapping[str, Tensor]:
            return module.convert_features_tuple_to_dict(module(images_B3HW))

    else:
        layers = ["features", "logits"][: 1 + logits]
        module = _make(name, make, *([] if weights is None else [weights]))
        if not callable(module):
            raise ValueError(f"the extractor {name} made a {type(module).__name__}, expected a function of images")

        def extract(images_B3HW: Tensor) -> Mapping[str, Tensor]:
            output = module(images_B3HW)
            return output if isinstance(output, Mapping) else {"features": output}

    if isinstance(module, nn.Module):
        module.requires_grad_(False).eval().to(device)
    record["layer"] = layers[0]
    return Extractor(extract, layers[0], layers[1] if logits else None, device, record)


class DigitFeatures(nn.Module):
    """Extractor "digits", for the handwritten digits of data.py: it needs no download and sees 8 x 8 grey cells.

    features [B, 64]: grey from 0 to 1, averaged over the cells of an 8 x 8 grid. logits [B, 10]: logistic regression
    on them, fitted to the training digits when the extractor is made.
    """

    def __init__(self):
        super().__init__()
        pixels_N88, targets_N = digit_pixels("train")
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(max_iter=1000).fit(pixels_N88.flatten(1).double().numpy(), targets_N.numpy())
        self.register_buffer("weight", torch.from_numpy(fitted.coef_))
        self.register_buffer("bias", torch.from_numpy(fitted.intercept_))

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        grey_B1HW = images_B3HW.double().mean(1, keepdim=True).div(255)
        features_BD = F.interpolate(grey_B1HW, (8, 8), mode="area").flatten(1)
        return {"features": features_BD, "logits": F.linear(features_BD, self.weight, self.bias)}


_registered: dict[str, MakeExtractor] = {"digits": DigitFeatures}


def import_torch_fidelity(module: str = "") -> ModuleType:
    """torch_fidelity, or one of its modules; says how to install it."""
    name = f"torch_fidelity.{module}" if module else "torch_fidelity"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"evaluation needs torch-fidelity: pip install 'hmar[metrics]' ({error})", name=error.name
        ) from error


def _fidelity_extractors() -> dict[str, type]:
    return import_torch_fidelity("registry").FEATURE_EXTRACTORS_REGISTRY


def _is_fidelity_class(make: MakeExtractor) -> bool:
    base = sys.modules.get("torch_fidelity.feature_extractor_base")
    return base is not None and inspect.isclass(make) and issubclass(make, base.FeatureExtractorBase)


def _find(name: str) -> tuple[MakeExtractor, dict[str, Any]]:
    """What makes the extractor of a name, and the first part of its record."""
    if name in _registered:
        return _registered[name], {"name": name}
    where, colon, attribute = name.rpartition(":")
    if not colon:
        found = _fidelity_extractors().get(name)
        if found is None:
            raise ValueError(_or_own(unknown("extractor", name, known_extractors())))
        return found, {"name": name, "torch-fidelity": version("torch-fidelity")}
    is_file = where.endswith(".py")
    try:
        if is_file:
            specification = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise ValueError(_or_own(f'cannot import the extractor "{name}": {error}')) from error
    if not hasattr(module, attribute):
        raise ValueError(f'{where} has no {attribute}, from the extractor "{name}"')
    record = {"name": f"{Path(where).name}:{attribute}" if is_file else name}
    if getattr(module, "__file__", None):
        record["code_sha256"] = _sha256(module.__file__)
    return getattr(module, attribute), record


def _or_own(sentence: str) -> str:
    return f"{sentence}; or one of your own, as file.py:Name or package.module:Name"


def _make(name: str, make: MakeExtractor, *arguments: Any, **keywords: Any) -> Any:
    """Call what makes an extractor, with network, file and shape errors as one sentence."""
    try:
        return make(*arguments, **keywords)
    except (OSError, RuntimeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines)[:300] or type(error).__name__
        raise ValueError(f"cannot make the extractor {name}: {reason}. {_alternatives(name)}") from error


def _weights_file(name: str, given: str | Path | None) -> Path:
    """The given file, or Inception's in torch.hub's folder, downloaded if it is not there yet."""
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"no file {given} of the weights of {name}. {_alternatives(name)}")
        return Path(given)
    url = import_torch_fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        checksum = file.stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=checksum, progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the weights of {name} are not at {file} and could not be downloaded ({error}). {_alternatives(name)}"
            ) from error
    return file


def _check_state_dict(name: str, path: str | Path | None) -> None:
    # NOTE: torch-fidelity loads these files without weights_only; what passes here holds tensors and nothing that runs.
    if path is None:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of an unusual protocol, refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or holds more than weights: {reason}. {_alternatives(name)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected named tensors. {_alternatives(name)}")


def _alternatives(name: str) -> str:
    """Where weights are to be had, and what works without them."""
    if name != INCEPTION:
        where = "Give a file of its weights (--extractor-weights), "
    else:
        url = import_torch_fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
        where = f"Download {url} on any machine and give the file (--extractor-weights FILE), "
    return (
        f"{where}take an extractor that needs none (--extractor digits, or file.py:Name of your own), or only write "
        "the .npz for ADM's evaluator (--metrics none)"
    )


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
