"""The command `hmar`: tokenize, train, sample, edit, convert, evaluate, demo, info.

Arguments are read here and given to the functions that do the work; torch is imported by the commands that need it, so
that help and mistakes in the arguments answer at once. Bad input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="hmar",
    help="Hierarchical masked autoregressive image generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that more than one command takes.
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="Folder of the tokenizer.", show_default="the one the model was trained with")
]
Classes = Annotated[str | None, typer.Option(help="Class numbers, as in 0,1,7 or 0-9.", show_default="all")]
Cfg = Annotated[float, typer.Option(help="Strength of guidance, 0 for none.")]
CfgRamp = Annotated[
    str,
    typer.Option(help="Guidance by scale: linear, constant, cosine, or a factor for each, as in '[0, 0.5, 1]'."),
]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest codes, 0 for all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest codes of this total probability.")]
Temperature = Annotated[float, typer.Option(help="Below 1: closer to the likeliest codes.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="The likeliest code instead of a draw.")]
Schedule = Annotated[
    str,
    typer.Option(
        help="Masked passes: default, none, one-token, even-N (or just N) or cosine-N, N passes a scale; or "
        "codes committed by each pass by side of the scale, as in '{2: [1, 3], 3: [1, 1, 2, 5]}'."
    ),
]
MaskedCfgFactor = Annotated[float, typer.Option(help="Guidance in masked passes, as a factor on --cfg.")]
BatchSize = Annotated[int, typer.Option(help="Images drawn at once. Another size may round pixels by 1/255 otherwise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto (bf16 on CUDA), fp32 or bf16.")]
Attention = Annotated[str, typer.Option(help="Attention implementation, see hmar info.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete images made with other settings.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose (accepted behind a command, too).")
    ] = False,
) -> None:
    """Hierarchical masked autoregressive image generation."""


@app.command(short_help="Train one stage: tokenizer, next-scale, masked or var.")
def train(
    stage: Annotated[str, typer.Argument(help="tokenizer, next-scale, masked or var.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example optimizer.lr=1e-4.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="YAML file of keys, or a recipe such as imagenet-256-d16; keys on the command line win."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in output_dir.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train one stage. Every stage but tokenizer needs tokenizer_weights, masked also next_scale_weights.

    hmar train tokenizer preset=digits-32 output_dir=runs/tokenizer

    hmar train next-scale preset=digits-32 output_dir=runs/next-scale tokenizer_weights=runs/tokenizer

    hmar train masked preset=digits-32 output_dir=runs/hmar tokenizer_weights=runs/tokenizer
    next_scale_weights=runs/next-scale

    torchrun --nproc-per-node 8 -m hmar train next-scale --config imagenet-256-d16

    An unknown KEY lists the known ones. --resume without --config takes the configuration that the run began with.
    """
    from hmar.recipe import STAGES, apply_overrides, make_config, read_config, read_stage_config, unknown

    if stage not in STAGES:
        raise ValueError(unknown("stage", stage, STAGES))
    overrides = [f"stage={stage}", *(overrides or [])]
    base = read_stage_config(config, stage) if config is not None else {}
    if resume and config is None:
        saved = Path(str(apply_overrides({}, overrides).get("output_dir"))) / "config.yaml"
        base = read_config(saved) if saved.exists() else {}
    run = make_config(apply_overrides(base, overrides))

    from hmar.processes import ProcessFailedError
    from hmar.train import Interrupted, NonFiniteError
    from hmar.train import train as train_stage

    try:
        result = train_stage(run, resume=resume, overwrite=overwrite, progress=not quiet)
    except Interrupted as interruption:
        to_go_on = f"To go on: hmar train {stage} --resume output_dir={run.output_dir}"
        typer.echo(f"{interruption}. {'The run is complete' if interruption.finished else to_go_on}", err=True)
        raise typer.Exit(128 + interruption.signal_number) from None
    except (NonFiniteError, ProcessFailedError) as error:
        _fail(str(error), 1, error)
    typer.echo(f"{stage}: {result.step} steps done, weights in {result.weights}")


@app.command(short_help="Encode all images of a set once; training reads the codes instead of the images.")
def tokenize(
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    images: Annotated[str, typer.Option(help="digits, photographs, or a folder in ImageNet layout.")],
    output: Annotated[Path, typer.Option(help="Folder for the codes.")],
    crops: Annotated[
        int | None,
        typer.Option(
            help="Random crops of each image, one for each epoch, in turn. More can be added later.",
            show_default="8, or 1 where nothing is random",
        ),
    ] = None,
    center_crop: Annotated[bool, typer.Option("--center-crop", help="The middle of each image instead.")] = False,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Decides the random crops. Training on images has the same with it.")] = 0,
    on_error: Annotated[
        str, typer.Option(help="A broken image ends the run (raise), or is replaced by the next one and named (skip).")
    ] = "raise",
    shard_size: Annotated[int, typer.Option(help="Images in a file; a stop loses at most one.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Images encoded at once.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that load images, for each GPU.")] = 0,
    device: Device = "auto",
    rank: Annotated[int, typer.Option(envvar="RANK", help="Which of several processes this is.")] = 0,
    world_size: Annotated[int, typer.Option(envvar="WORLD_SIZE", help="How many processes share the images.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete other codes in the folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Encode all images of a set once. The same command goes on where it was stopped, to the same bytes.

    hmar tokenize --tokenizer runs/tokenizer --images /images --crops 10 --workers 8 --output codes

    hmar train next-scale data.name=codes data.path=codes tokenizer_weights=runs/tokenizer ...

    torchrun --nproc-per-node 8 -m hmar tokenize ... shares the images among GPUs. Processes that are not started
    together take --rank and --world-size; the same command without them completes the index in the end.
    """
    from hmar.codes import read_index_file
    from hmar.processes import joined_processes
    from hmar.tokenize import Interrupted
    from hmar.tokenize import tokenize as tokenize_images

    try:
        with joined_processes(rank, world_size):
            index = tokenize_images(
                tokenizer,
                images,
                output,
                split=split,
                crops=crops,
                center_crop=center_crop,
                seed=seed,
                on_error=on_error,
                shard_size=shard_size,
                batch_size=batch_size,
                workers=workers,
                device=device,
                rank=rank,
                world_size=world_size,
                overwrite=overwrite,
                progress=not quiet,
            )
    except Interrupted as interruption:
        typer.echo(f"{interruption}: the same command goes on with the shards that are missing", err=True)
        raise typer.Exit(128 + interruption.signal_number) from None
    what = f"codes of {index.num_images} images x {index.crops} crops in {output}"
    if not read_index_file(output)["complete"]:
        typer.echo(
            f"process {rank} has done its share; without --rank and --world-size this command completes the {what}"
        )
    elif rank == 0:
        typer.echo(what)


@app.command(short_help="Generate images from a trained model.")
def sample(
    model: Annotated[Path, typer.Option(help="Folder of weights, or of a finished run of masked, next-scale or var.")],
    output: Annotated[Path, typer.Option(help="Folder for the PNG files, grid.png and settings.json.")],
    tokenizer: TokenizerFolder = None,
    classes: Classes = None,
    count: Annotated[int, typer.Option(help="Images of each class.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same images.")] = 0,
    seeds: Annotated[
        str | None, typer.Option(help="Instead of --count and --seed: an image of each class for each, as in 3,7-9.")
    ] = None,
    cfg: Cfg = 1.5,
    cfg_ramp: CfgRamp = "linear",
    top_k: TopK = 0,
    top_p: TopP = 0.0,
    temperature: Temperature = 1.0,
    greedy: Greedy = False,
    schedule: Schedule = "default",
    masked_cfg_factor: MaskedCfgFactor = 0.0,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    precision: Precision = "auto",
    attention: Attention = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Generate images, one PNG each. Images that are in the folder already are not drawn again."""
    wanted, wanted_seeds = _parse_numbers("classes", classes), _parse_numbers("seeds", seeds)

    from hmar.generate import SamplingConfig
    from hmar.sample import parse_ramp, parse_schedule
    from hmar.sample import sample as sample_images

    sampling = SamplingConfig(
        cfg=cfg,
        cfg_ramp=parse_ramp(cfg_ramp),
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        schedule=parse_schedule(schedule),
        masked_cfg_factor=masked_cfg_factor,
        seed=seed,
        greedy=greedy,
    )
    try:
        paths = sample_images(
            model,
            output,
            tokenizer_folder=tokenizer,
            classes=wanted,
            count=count,
            seeds=wanted_seeds,
            sampling=sampling,
            batch_size=batch_size,
            device=device,
            precision=precision,
            attention=attention,
            overwrite=overwrite,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on with the images that are missing", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{len(paths)} images in {output}, the first ones together in {output / 'grid.png'}")


@app.command(short_help="Paint a part of an image, or around it: in-painting, out-painting, editing by class.")
def edit(
    model: Annotated[Path, typer.Option(help="Folder of weights, or of a finished run of masked, next-scale or var.")],
    image: Annotated[Path, typer.Option(help="The image to edit.")],
    output: Annotated[Path, typer.Option(help="Folder for the PNG files, input.png, grid.png and settings.json.")],
    mask: Annotated[
        Path | None, typer.Option(help="Image of the same size, white where to paint.", show_default=False)
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(help="Where to paint, instead: x0,y0,x1,y1 in pixels of it.", show_default=False),
    ] = None,
    around: Annotated[
        str | None,
        typer.Option(
            help="Paint around the image, instead: it lies at x0,y0,x1,y1 of the model's canvas and may stick out.",
            show_default=False,
        ),
    ] = None,
    tokenizer: TokenizerFolder = None,
    classes: Annotated[
        str | None, typer.Option(help="Class numbers, as in 0,1,7 or 0-9.", show_default="no class")
    ] = None,
    count: Annotated[int, typer.Option(help="Results, of each class if there are some.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same results.")] = 0,
    seeds: Annotated[
        str | None, typer.Option(help="Instead of --count and --seed: one result of each class for each, as in 3,7-9.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="An image of another size than the model's: refuse, resize (stretch) or crop.")
    ] = "refuse",
    composite: Annotated[
        bool, typer.Option("--composite", help="Put the original pixels back outside of the hole.")
    ] = False,
    known_share: Annotated[
        float, typer.Option(help="A coarse token counts as known if so much of its cell is; 1 keeps whole cells only.")
    ] = 0.5,
    cfg: Cfg = 1.5,
    cfg_ramp: CfgRamp = "linear",
    top_k: TopK = 0,
    top_p: TopP = 0.0,
    temperature: Temperature = 1.0,
    greedy: Greedy = False,
    schedule: Schedule = "default",
    masked_cfg_factor: MaskedCfgFactor = 0.0,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    precision: Precision = "auto",
    attention: Attention = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Paint a part of an image, without training for it. Give one of --mask, --box and --around.

    hmar edit --model runs/hmar --image digit.png --box 8,8,24,24 --count 3 --output edits

    What the hole showed does not matter: it is painted over before the model sees the image. Without --classes the
    surroundings alone say what belongs there.
    """
    wanted, wanted_seeds = _parse_numbers("classes", classes), _parse_numbers("seeds", seeds)
    hole, place = _parse_box("box", box), _parse_box("around", around)

    from hmar.edit_image import edit_image
    from hmar.generate import SamplingConfig
    from hmar.sample import parse_ramp, parse_schedule

    sampling = SamplingConfig(
        cfg=cfg,
        cfg_ramp=parse_ramp(cfg_ramp),
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        schedule=parse_schedule(schedule),
        masked_cfg_factor=masked_cfg_factor,
        seed=seed,
        greedy=greedy,
    )
    try:
        paths = edit_image(
            model,
            image,
            output,
            mask=mask,
            box=hole,
            around=place,
            classes=wanted,
            count=count,
            seeds=wanted_seeds,
            sampling=sampling,
            fit=fit,
            known_share=known_share,
            composite=composite,
            tokenizer_folder=tokenizer,
            batch_size=batch_size,
            device=device,
            precision=precision,
            attention=attention,
            overwrite=overwrite,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on with the images that are missing", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{len(paths)} images in {output}, what the model saw in {output / 'input.png'}")


@app.command(short_help="Draw many images of a model and measure them: FID, IS, KID, precision, recall.")
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of weights, or of a finished run of masked, next-scale or var.")],
    output: Annotated[Path, typer.Option(help="Folder for images, samples.npz and evaluation.json.")],
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to compare with: digits or photographs (:test for the other split), a folder of images, or an "
            ".npz of mean and covariance (mu, sigma) or images (arr_0), as ADM's reference batches.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Images in all, equally many of each class.")] = 50_000,
    metrics: Annotated[str, typer.Option(help="Any of fid,is,kid,precision,recall; or none: only draw.")] = "all",
    extractor: Annotated[
        str,
        typer.Option(help="What turns images into features: a name (a wrong one lists them), or file.py:Name."),
    ] = "inception-v3-compat",
    extractor_weights: Annotated[
        Path | None, typer.Option(help="File of the extractor's weights.", show_default="downloaded once")
    ] = None,
    save_reference: Annotated[
        Path | None, typer.Option(help=".npz for the reference's features, to be the --reference of later calls.")
    ] = None,
    kid_subsets: Annotated[int, typer.Option(help="KID: random subsets.")] = 100,
    kid_subset_size: Annotated[int, typer.Option(help="KID: images in each subset.")] = 1000,
    is_splits: Annotated[int, typer.Option(help="IS: parts of the images.")] = 10,
    neighbours: Annotated[int, typer.Option(help="Precision and recall: nearest neighbours.")] = 3,
    npz: Annotated[bool, typer.Option("--npz/--no-npz", help="Write samples.npz for ADM's evaluator.")] = True,
    tokenizer: TokenizerFolder = None,
    classes: Classes = None,
    seed: Annotated[int, typer.Option(help="Same seed, same images, whatever the number of processes.")] = 0,
    cfg: Cfg = 1.5,
    cfg_ramp: CfgRamp = "linear",
    top_k: TopK = 0,
    top_p: TopP = 0.0,
    temperature: Temperature = 1.0,
    greedy: Greedy = False,
    schedule: Schedule = "default",
    masked_cfg_factor: MaskedCfgFactor = 0.0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    attention: Attention = "auto",
    rank: Annotated[int, typer.Option(envvar="RANK", help="Which of several processes this is.")] = 0,
    world_size: Annotated[int, typer.Option(envvar="WORLD_SIZE", help="How many processes share the images.")] = 1,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw images and compare them with real ones. The same command goes on where it was stopped, to the same images.

    hmar evaluate --model runs/hmar --reference digits --extractor digits --count 2000 --output runs/evaluation

    torchrun --nproc-per-node 8 -m hmar evaluate ... shares the images among GPUs. Processes that are not started
    together take --rank and --world-size and only draw; the same command without them measures in the end.
    """
    wanted = _parse_numbers("classes", classes)

    from hmar.evaluate import METRICS, MetricsConfig
    from hmar.evaluate import evaluate as evaluate_model
    from hmar.generate import SamplingConfig
    from hmar.processes import joined_processes
    from hmar.sample import parse_ramp, parse_schedule

    names = {"all": METRICS, "none": ()}.get(metrics, [name.strip() for name in metrics.split(",")])
    config = MetricsConfig(
        metrics=tuple(names),
        extractor=extractor,
        extractor_weights=None if extractor_weights is None else str(extractor_weights),
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        is_splits=is_splits,
        neighbours=neighbours,
    )
    sampling = SamplingConfig(
        cfg=cfg,
        cfg_ramp=parse_ramp(cfg_ramp),
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        schedule=parse_schedule(schedule),
        masked_cfg_factor=masked_cfg_factor,
        seed=seed,
        greedy=greedy,
    )
    try:
        with joined_processes(rank, world_size):
            result = evaluate_model(
                model,
                output,
                reference=reference,
                count=count,
                tokenizer_folder=tokenizer,
                classes=wanted,
                sampling=sampling,
                config=config,
                save_reference=save_reference,
                npz=npz,
                batch_size=batch_size,
                device=device,
                precision=precision,
                attention=attention,
                rank=rank,
                world_size=world_size,
                overwrite=overwrite,
                progress=not quiet,
            )
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on with the images that are missing", err=True)
        raise typer.Exit(130) from None
    if result is None:
        return
    for name, value in result["metrics"].items():
        typer.echo(f"{name:9s}  {value:.6g}")
    typer.echo(f"{count} images, {output / 'evaluation.json'}")


@app.command(short_help="Make a folder of weights of published files, training checkpoints or stages.")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A published file or training checkpoint (.pth, .pt, .safetensors), a folder of weights, a run, or a "
            "Hugging Face id (owner/name or owner/name/file.pth).",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(help="A folder; or a .pth or .safetensors file, for the published names.", show_default=False),
    ],
    given: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Sizes the tensors do not tell, as in sides=[1,2,3,4]."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="tokenizer, var, next-scale, masked or hmar; next-scale also makes VAR's weights a start for stage 1.",
            show_default="what the source holds",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer of a transformer, in any of these forms.")
    ] = None,
    next_scale: Annotated[
        str | None, typer.Option(help="Stage 1, when the source is stage 2: writes the HMAR they make.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset that the source must have the sizes of.")] = None,
    part: Annotated[
        str | None,
        typer.Option(help="One state dict of several, as in trainer.var_wo_ddp; without, an error lists them."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace weights that are there.")] = False,
) -> None:
    """Convert weights, strictly: every tensor has its place, or is named in the error and nothing is written.

    hmar convert vae_ch160v4096z32.pth weights/vae

    hmar convert hmar-d16.pth weights/hmar-d16 --tokenizer vae_ch160v4096z32.pth

    hmar convert stage2.pth weights/hmar --next-scale stage1.pth
    """
    from hmar.convert import convert as convert_weights
    from hmar.recipe import apply_overrides

    for sentence in convert_weights(
        source,
        destination,
        kind=kind,
        tokenizer=tokenizer,
        next_scale=next_scale,
        preset=preset,
        given=apply_overrides({}, given or []),
        part=part,
        revision=revision,
        overwrite=overwrite,
    ):
        typer.echo(sentence)


@app.command(short_help="Train and compare everything on handwritten digits, in minutes.")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, table and summary.json.")] = Path("reports/demo"),
    run_folder: Annotated[Path, typer.Option(help="Folder for the training runs.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, to see that it works.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--anew",
            help="Keep earlier training runs, or delete them.",
            show_default="go on with a demo that was interrupted",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train tokenizer, HMAR and VAR on handwritten digits with one budget, measure and draw them."""
    from hmar.demo import run
    from hmar.train import Interrupted, NonFiniteError

    try:
        run(output, run_folder=run_folder, device=device, quick=quick, resume=resume, progress=not quiet)
    except Interrupted as interruption:
        typer.echo(f"{interruption}. The same command goes on from there", err=True)
        raise typer.Exit(128 + interruption.signal_number) from None
    except NonFiniteError as error:
        _fail(str(error), 1, error)


@app.command(short_help="Show versions, attention implementations and presets; or one preset, weights or codes.")
def info(
    subject: Annotated[
        str | None, typer.Argument(help="A preset, a folder of weights or a folder of codes.", show_default=False)
    ] = None,
) -> None:
    """Show what is installed and what the presets are, or the details of one preset or folder of weights or codes."""
    from rich.console import Console

    from hmar.describe import describe_codes, describe_installation, describe_preset, describe_presets, describe_weights

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if subject is None:
        console.print(describe_installation())
        console.print(describe_presets())
        return
    from hmar.codes import INDEX
    from hmar.config import PRESETS

    if subject in PRESETS or not Path(subject).exists():
        console.print(describe_preset(subject))
    else:
        console.print((describe_codes if (Path(subject) / INDEX).exists() else describe_weights)(subject))


def main() -> None:
    """Entry point of the command: errors of input become one sentence on stderr and exit code 2, others 1."""
    arguments = sys.argv[1:]
    if "--traceback" in arguments:
        # typer knows the option before the command only; people add it at the end.
        sys.argv = [sys.argv[0], "--traceback", *(argument for argument in arguments if argument != "--traceback")]
    try:
        app()
    except (ValueError, ModuleNotFoundError) as error:
        _fail(str(error), 2, error)
    except OSError as error:
        _fail(str(error), 1, error)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"not enough GPU memory: {str(error).splitlines()[0]} A smaller batch size needs less", 1, error)


def _fail(message: str, code: int, error: BaseException | None = None) -> None:
    if error is not None and "--traceback" in sys.argv:
        raise error
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)


def _parse_numbers(option: str, text: str | None) -> list[int] | None:
    """Numbers from "0,1,7" and "0-9"; None stays None."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f'--{option} is "{text}": expected numbers as in 0,1,7 or 0-9')
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def _parse_box(option: str, text: str | None) -> list[int] | None:
    """Four whole numbers, which may be negative; None stays None."""
    if text is None:
        return None
    try:
        box = [int(part) for part in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise ValueError(f'--{option} is "{text}": expected x0,y0,x1,y1 in pixels, as in 64,64,192,192')
    return box
