"""What a model is made of: frozen dataclasses, and the presets nano, tiny and base."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from heartbeat_fast.errors import HeartBeatError

T = TypeVar("T")
LARGEST, LONGEST = 100_000, 64  # of any number, of any list, in a config read from a file


class ConfigError(HeartBeatError):
    """A model configuration has unknown or contradictory fields."""


@dataclass(frozen=True)
class DenoiserConfig:
    """The UNet. The defaults are Stable Diffusion 1.5's, with HeartBeat's layers added."""

    latent_channels: int = 4
    local_channels: int = 64  # of the local features, concatenated to the latents
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, finest first
    heads: tuple[int, ...] = (8, 8, 8, 8)
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformer blocks
    layers: int = 2  # residual blocks per level (Stable Diffusion has one more going up)
    # One skip per level instead of one per layer, no middle block (the deepest level's way up takes
    # its place), transformer blocks of the deepest level going down only, upsampling straight to
    # the next level's width: half of Stable Diffusion's work at equal widths.
    lean: bool = False
    groups: int = 32
    context_dim: int = 768  # of text and image tokens
    ff_mult: int = 4
    image_branch: bool = True
    temporal: bool = True
    frames: int = 16  # the longest clip: learned frame positions

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.heads) == len(self.attention) > 0:
            raise ConfigError("channels, heads and attention need one entry per level each")
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % heads or width % self.groups:
                raise ConfigError(
                    f"{width} channels do not divide by {heads} heads and {self.groups} groups"
                )


@dataclass(frozen=True)
class TextConfig:
    """transformers' CLIPTextModel (defaults: ViT-L/14). The empty prompt is start, end, end, …"""

    vocab: int = 49408
    start: int = 49406
    end: int = 49407
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    tokens: int = 77


@dataclass(frozen=True)
class ImageConfig:
    """transformers' SamVisionModel (defaults: MedSAM ViT-B) and the adapter behind it."""

    size: int = 1024
    patch: int = 16
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    window: int = 14  # 0: every layer attends globally
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    relative_positions: bool = True
    channels: int = 256  # of the embedding, one per patch
    adapter: int = 256  # width of the adapter's Conv3d
    grid: int = 8  # the adapter's tokens per side: 64 tokens

    def __post_init__(self) -> None:
        if (self.size // self.patch) % self.grid:
            raise ConfigError(
                f"a grid of {self.grid} does not divide {self.size // self.patch} patches"
            )


@dataclass(frozen=True)
class CodecConfig:
    """kind "echo": our small convolutional codec; "kl": diffusers' AutoencoderKL (SD1.5's)."""

    kind: Literal["echo", "kl"] = "kl"
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)  # finest first
    scale: float = 0.18215  # latents times this have unit deviation
    # Of a distilled decoder: "echo", three, finest first; "kl", four equal ones (TAESD's network).
    decoder_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.decoder_widths:
            return
        levels = 3 if self.kind == "echo" else 4
        if len(self.decoder_widths) != levels or min(self.decoder_widths) < 1:
            raise ConfigError(f"decoder_widths: {self.decoder_widths} came; wanted {levels} widths")
        if self.kind == "kl" and len(set(self.decoder_widths)) > 1:
            raise ConfigError(f"decoder_widths: {self.decoder_widths} came; wanted four equal ones")


@dataclass(frozen=True)
class HeartBeatConfig:
    """The whole model and the noise schedule it is trained with."""

    name: str
    frames: int = 16
    size: int = 256
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    local_hidden: int = 64  # inner width of the local encoders
    pretrained: bool = True  # text and image encoders come trained and stay frozen
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    # Share of a clip's noise power that all its frames have in common (mixed noise: Ge et al.,
    # PYoCo, 2305.10474). Independent noise lets each frame settle on a brightness of its own.
    shared_noise: float = 0.0
    # The same for the noise that sampling starts from: the 5 % that training leaves to each frame
    # still tripled flicker (docs/decisions.md).
    shared_start: float = 0.0
    beta_start: float = 0.00085
    beta_end: float = 0.012
    schedule: Literal["scaled_linear"] = "scaled_linear"
    steps: int = 1000
    few_steps: tuple[int, ...] = ()  # step counts a student was distilled to; empty: any

    def __post_init__(self) -> None:
        if self.text.hidden != self.denoiser.context_dim:
            raise ConfigError(
                f"text.hidden is {self.text.hidden}, wanted context_dim {self.denoiser.context_dim}"
            )
        if self.codec.latent_channels != self.denoiser.latent_channels:
            raise ConfigError("codec.latent_channels is not denoiser.latent_channels")
        if self.size % 8:
            raise ConfigError(f"size {self.size} is not a multiple of 8")

    @property
    def latent(self) -> int:
        """Side of the latents: an eighth of the image's."""
        return self.size // 8


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON's types (tuples become lists when written)."""
    return asdict(config)


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """A config of the given class from JSON's types.

    Raises:
        ConfigError: an unknown field, a missing one, or one of the wrong type or absurd size.
    """
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}")
    try:
        return kind(**{name: _value(name, hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def _value(name: str, hint: Any, value: Any) -> Any:
    """One field from its JSON form."""
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, list | tuple) and len(value) <= LONGEST:
        return tuple(_value(name, get_args(hint)[0], item) for item in value)
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, str) and type(value) is hint:
        return value
    if hint is int and type(value) is int and 0 <= value <= LARGEST:
        return value
    raise ConfigError(f"{name} is {value!r:.80}, wanted {getattr(hint, '__name__', hint)}")


NANO = HeartBeatConfig(
    name="nano",
    frames=4,
    size=64,
    denoiser=DenoiserConfig(
        local_channels=16,
        channels=(32, 64),
        heads=(2, 4),
        attention=(False, True),
        layers=1,
        lean=True,
        groups=8,
        context_dim=32,
        ff_mult=2,
        frames=4,
    ),
    text=TextConfig(vocab=512, start=0, end=1, hidden=32, layers=1, heads=2),
    image=ImageConfig(
        size=64,
        hidden=32,
        layers=1,
        heads=2,
        window=0,
        global_layers=(0,),
        relative_positions=False,
        channels=16,
        adapter=16,
        grid=4,
    ),
    codec=CodecConfig(kind="echo", widths=(8, 16, 16), scale=1.0),
    local_hidden=16,
    pretrained=False,
    prediction="v_prediction",
    shared_noise=0.95,
    shared_start=1.0,
)

TINY = replace(
    NANO,
    name="tiny",
    frames=16,
    size=256,
    denoiser=DenoiserConfig(
        latent_channels=8,
        channels=(64, 128, 192),
        heads=(2, 4, 6),
        attention=(False, True, True),
        layers=1,
        lean=True,
        context_dim=128,
        ff_mult=2,
    ),
    text=TextConfig(vocab=512, start=0, end=1, hidden=128, layers=2, heads=4),
    image=ImageConfig(
        size=256,
        hidden=96,
        layers=3,
        heads=3,
        window=0,
        global_layers=(0, 1, 2),
        relative_positions=False,
        channels=64,
        adapter=64,
    ),
    codec=CodecConfig(kind="echo", latent_channels=8, widths=(32, 48, 64), scale=1.0),
    local_hidden=64,
)

BASE = HeartBeatConfig(name="base")

PRESETS = {config.name: config for config in (NANO, TINY, BASE)}
