"""The command line, ``python -m tools.miniature``: photos, synthesize, vae, base, pack, picture. The methods on top of the base train as any other does, with ``python -m pipelines train``."""

import argparse

from pipelines.cli import run_command
from pipelines.options import a_path
from pipelines.parser import Parser
from pipelines.training.arguments import RAW, add_common, begin, training_pictures
from pipelines.training.ranges import WEIGHT, real, whole
from pipelines.training.settings import DataSettings, require_whole_cells

_PHOTOS = "Fetches the photos that tools/miniature/photos.json lists, with authors and licences, with apt-get, pip and git."
_SYNTHESIZE = "Draws pictures that belong to nobody (dead leaves, textures, strokes, text), to train on."


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 where it failed."""
    return run_command(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tools.miniature", description="How the miniature is made.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say more, and show where an error comes from")

    command = commands.add_parser("photos", parents=[common], help="fetch photos with free licences to train on", description=_PHOTOS, **RAW)
    command.add_argument("-o", "--output", type=a_path, required=True, metavar="FOLDER")
    command.add_argument("--cache", type=a_path, required=True, metavar="FOLDER", help="keeps the packages and repositories")
    command.set_defaults(run=_photos)

    command = commands.add_parser("synthesize", parents=[common], help="draw synthetic pictures to train on", description=_SYNTHESIZE, **RAW)
    command.add_argument("-o", "--output", type=a_path, required=True, metavar="FOLDER")
    command.add_argument("--count", type=whole(1), default=400, help="default: %(default)s")
    command.add_argument("--size", type=whole(64, 16_384), default=512, help="side in pixels (default: %(default)s)")
    command.add_argument("--seed", type=whole(0), default=0, help="of the first picture (default: %(default)s)")
    command.set_defaults(run=_synthesize)

    command = commands.add_parser("vae", parents=[common], help="train a small VAE of Stable Diffusion's shape", **RAW)
    add_common(command, lr=7e-4)
    command.add_argument("--init", type=a_path, help="go on from this VAE (a diffusers folder) instead of random weights")
    command.add_argument(
        "--channels", type=whole(8, 8192, multiple=8), nargs="+", default=[32, 32, 64, 128], help="of each resolution (default: 32 32 64 128)"
    )
    command.add_argument("--kl-weight", type=WEIGHT, default=1e-4, help="pull of the posterior to the standard normal (default: %(default)g)")
    command.add_argument("--decoder-only", action="store_true", help="keep the encoder, and with it the latents")
    command.add_argument("--texture-weight", type=WEIGHT, default=0.0, help="of the distance of how strong fine detail is (default: %(default)g)")
    command.add_argument("--structure-weight", type=WEIGHT, default=0.0, help="of the gradient magnitudes' dissimilarity (default: %(default)g)")
    command.add_argument("--adversarial-weight", type=WEIGHT, default=0.0, help="of a discriminator of patches of pictures (default: none)")
    command.add_argument("--adversarial-from", type=whole(0), default=0, help="steps in which it learns alone (default: %(default)s)")
    command.add_argument("--discriminator-channels", type=whole(1, 8192), nargs="+", default=[32, 64, 128], help="default: 32 64 128")
    command.add_argument(
        "--restored",
        type=real(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of the pictures that are decoded from what the miniature's methods make of them, degraded; with --decoder-only (default: %(default)g)",
    )
    command.add_argument(
        "--mild-degradation", type=real(0, 1), default=0.0, metavar="SHARE", help="of those: chance of the mild degradation (default: %(default)g)"
    )
    command.set_defaults(run=_vae)

    command = commands.add_parser("base", parents=[common], help="train a small UNet of Stable Diffusion's shape on a VAE", **RAW)
    add_common(command, lr=5e-4)
    command.add_argument("--vae", type=a_path, required=True, help="the VAE (a diffusers folder)")
    command.add_argument("--init", type=a_path, help="go on from this base (a diffusers folder), with its prompt, instead of random weights")
    command.add_argument("--low-timesteps", action="store_true", help="draw timesteps as the square of even ones: restoration uses the lower quarter")
    command.add_argument(
        "--channels", type=whole(32, 8192, multiple=32), nargs="+", default=[64, 64, 64], help="of each resolution (default: 64 64 64)"
    )
    command.add_argument("--width", type=whole(1, 8192), default=64, help="of the prompt embedding (default: %(default)s)")
    command.set_defaults(run=_base)

    command = commands.add_parser("pack", parents=[common], help="a base and the methods' weights for it into one folder, in half precision", **RAW)
    command.add_argument("--base", type=a_path, required=True, help="the base (a diffusers folder)")
    command.add_argument("--osediff", type=a_path, help="its OSEDiff adapter")
    command.add_argument("--noise-predictor", type=a_path, help="its noise predictor")
    command.add_argument("-o", "--output", type=a_path, required=True, metavar="FOLDER")
    command.set_defaults(run=_pack)

    command = commands.add_parser("picture", parents=[common], help="held-out photos beside what the miniature makes of them, as one picture", **RAW)
    command.add_argument("photos", type=a_path, nargs="+", metavar="PHOTO")
    command.add_argument("-o", "--output", type=a_path, required=True, metavar="FILE")
    command.add_argument(
        "--mild-degradation", type=real(0, 1), default=1.0, metavar="SHARE", help="chance of the mild degradation (default: %(default)g)"
    )
    command.add_argument("--seed", type=whole(0), default=0, help="of the first photo's degradation (default: %(default)s)")
    command.set_defaults(run=_picture)
    return parser


def _photos(arguments: argparse.Namespace) -> int:
    from .photos import collect_photos

    print(f"{arguments.output}: {collect_photos(arguments.output, arguments.cache)} photos")
    return 0


def _synthesize(arguments: argparse.Namespace) -> int:
    from .synthetic import write_pictures

    write_pictures(arguments.output, arguments.count, arguments.size, arguments.seed)
    return 0


def _vae(arguments: argparse.Namespace) -> int:
    import torch
    from diffusers import AutoencoderKL

    from pipelines.base import DTYPE
    from pipelines.training.degradation import Degradation
    from pipelines.training.loop import train

    from .autoencoder import AutoencoderTask, TextureOptions, small_vae
    from .restored import RestoredLatents

    settings = DataSettings.from_arguments(arguments)
    options = TextureOptions(
        arguments.texture_weight,
        arguments.structure_weight,
        arguments.adversarial_weight,
        arguments.adversarial_from,
        tuple(arguments.discriminator_channels),
        arguments.restored,
    )
    if options.restored and not arguments.decoder_only:
        raise ValueError("--restored: found a share without --decoder-only, expected both: restored latents are those of the encoder as it is.")
    if options.restored:
        require_whole_cells(settings.patch)
    begin(settings)
    vae = AutoencoderKL.from_pretrained(arguments.init, **{DTYPE: torch.float32}) if arguments.init else small_vae(tuple(arguments.channels))
    restore = RestoredLatents(vae) if options.restored else None
    pictures = training_pictures(settings, Degradation(mild_chance=settings.mild) if options.restored else None)
    examples = torch.empty(0) if arguments.decoder_only else torch.stack([pictures[i]["hq"] for i in range(256)])
    task = AutoencoderTask(vae, examples, arguments.kl_weight, decoder_only=arguments.decoder_only, options=options, restore=restore)
    train(task, pictures, settings.loop)
    return 0


def _base(arguments: argparse.Namespace) -> int:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from pipelines.base import DTYPE
    from pipelines.training.bases import PROMPT_FILE, read_prompt_embeds
    from pipelines.training.loop import train

    from .base_unet import BaseUNetTask, small_unet

    settings = DataSettings.from_arguments(arguments)
    begin(settings)
    if arguments.init:
        unet = UNet2DConditionModel.from_pretrained(arguments.init / "unet", **{DTYPE: torch.float32})
        prompt_embeds = read_prompt_embeds(arguments.init / PROMPT_FILE, unet.config.cross_attention_dim)["prompt_embeds"]
    else:
        unet, prompt_embeds = small_unet(tuple(arguments.channels), arguments.width), torch.randn(1, 8, arguments.width)
    vae = AutoencoderKL.from_pretrained(arguments.vae, **{DTYPE: torch.float32})
    task = BaseUNetTask(unet, vae, prompt_embeds, arguments.low_timesteps)
    train(task, training_pictures(settings), settings.loop)
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from .pack import pack

    size = pack(arguments.base, arguments.osediff, arguments.noise_predictor, arguments.output)
    print(f"{arguments.output}: {size / 1e6:.1f} MB of weights")
    return 0


def _picture(arguments: argparse.Namespace) -> int:
    from pipelines.training.degradation import Degradation

    from .picture import compare

    compare(arguments.photos, arguments.output, Degradation(mild_chance=arguments.mild_degradation), arguments.seed)
    return 0
