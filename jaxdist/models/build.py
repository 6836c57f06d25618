"""From `model:` and what the data holds to a Task."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.chain import Apart
from jaxdist.config import model as options
from jaxdist.config.errors import UserError
from jaxdist.config.target import call, resolve
from jaxdist.data.source import Info
from jaxdist.models import losses
from jaxdist.models.cnn import CNN, side_after
from jaxdist.models.factorization import Factorization
from jaxdist.models.mlp import MLP, mlp_apart
from jaxdist.models.resnet import STAGES, ResNet
from jaxdist.models.transformer import TransformerTask
from jaxdist.models.vit import ViTTask
from jaxdist.randomness import sample_keys
from jaxdist.task import Batch, ModuleTask, Task


def build_task(block: Any, data: Info) -> Task:
    """Raises UserError if the data has not got what the model reads."""
    match block:
        case options.Transformer():
            if data.vocabulary is None:
                raise UserError(f"model.kind: transformer reads tokens, the data has only {', '.join(data.features)}")
            return TransformerTask(data.vocabulary, **block.model_dump(exclude={"kind", "init_from"}))
        case options.MLP():
            shape, outputs = _x_and_outputs("mlp", data)
            return module_task(
                lambda rngs: MLP(math.prod(shape), block.hidden, outputs, block.dropout, rngs=rngs),
                classes=data.classes,
                draws=block.dropout > 0,
                apart=mlp_apart(block.hidden, block.dropout, lambda out, batch: _loss_of(out, batch, data.classes)),
            )
        case options.CNN():
            shape, outputs = _x_and_outputs("cnn", data)
            sides = (block.kernel, block.padded)
            if len(shape) != 3 or side_after(min(shape[:2]), len(block.channels), *sides) < 1:
                smallest = next(n for n in itertools.count(1) if side_after(n, len(block.channels), *sides) == 1)
                raise UserError(
                    f"model.channels: {len(block.channels)} poolings need images [H, W, C] of at least "
                    f"{smallest} x {smallest}, the data has {list(shape)}"
                )
            group = block.norm_group if block.batch_norm else None
            return module_task(
                lambda rngs: CNN(
                    shape, block.channels, block.hidden, outputs, group, block.dropout, *sides, rngs=rngs
                ),
                classes=data.classes,
                draws=block.dropout > 0,
            )
        case options.ResNet():
            return _resnet(block, data)
        case options.ViT():
            return _vit(block, data)
        case options.Factorization():
            return _factorization(block, data)
        case options.ModelTarget():
            return _users_task(block, data)
    raise AssertionError(block)


def module_task(
    build: Callable[[nnx.Rngs], nnx.Module], *, classes: int | None, draws: bool = False, apart: Apart | None = None
) -> ModuleTask:
    """A task for a module that maps `batch["x"]` to outputs: cross-entropy on labels `batch["y"]` if there
    are classes, else squared error.

    Args:
      draws: call the module with per-sample keys too, `module(x, keys)`, keys None in evaluation.
      apart: how it comes apart into a chain, if it does.
    """

    def outputs(model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        if draws and key is not None:
            return model(batch["x"], sample_keys(key, batch["sample_id"]))
        return model(batch["x"])

    def loss(model: Any, batch: Batch, key: jax.Array | None) -> Any:
        return _loss_of(outputs(model, batch, key), batch, classes)

    return ModuleTask(build, loss, lambda model, batch: outputs(model, batch, None), apart)


def _loss_of(outputs: jax.Array, batch: Batch, classes: int | None) -> Any:
    if classes is not None:
        return losses.classification(outputs, batch["y"].astype(jnp.int32), batch["weight"])
    return losses.squared_error(outputs, batch["y"], batch["weight"])


def _x_and_outputs(kind: str, data: Info) -> tuple[tuple[int, ...], int]:
    if "x" not in data.features or "y" not in data.features:
        raise UserError(
            f"model.kind: {kind} reads x and y, the data has only {', '.join(data.features)}; "
            "use a model for tokens, such as transformer, or other data"
        )
    y = data.features["y"]
    return tuple(data.features["x"].shape), data.classes or math.prod(y.shape)


def _resnet(block: options.ResNet, data: Info) -> Task:
    shape, outputs = _x_and_outputs("resnet", data)
    imagenet, (blocks, bottleneck) = block.stem == "imagenet", STAGES[block.depth]
    if len(shape) != 3:
        raise UserError(f"model.kind: resnet reads images [H, W, C], the data has x of {list(shape)}; try mlp")
    smallest = 32 if imagenet else 8  # a side of one pixel after all halvings
    if min(shape[:2]) < smallest:
        way_out = "use model.stem: small" if imagenet and min(shape[:2]) >= 8 else "use larger images, or cnn or mlp"
        raise UserError(
            f"model.stem: {block.stem} needs images of at least {smallest} x {smallest}, "
            f"the data has {shape[0]} x {shape[1]}; {way_out}"
        )
    return module_task(
        lambda rngs: ResNet(
            shape[2],
            blocks,
            bottleneck,
            outputs,
            width=block.width,
            imagenet_stem=imagenet,
            norm_group=block.norm_group if block.batch_norm == "ghost" else None,
            zero_init_residual=block.zero_init_residual,
            rngs=rngs,
        ),
        classes=data.classes,
    )


def _vit(block: options.ViT, data: Info) -> Task:
    shape, outputs = _x_and_outputs("vit", data)
    if len(shape) != 3:
        raise UserError(f"model.kind: vit reads images [H, W, C], the data has x of {list(shape)}; try mlp")
    side = math.gcd(*shape[:2])
    if side % block.patch:
        fits = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise UserError(
            f"model.patch: {block.patch} does not divide the images' sides, {shape[0]} x {shape[1]}; "
            f"patches that do: {fits}"
        )
    return ViTTask(
        shape,
        outputs,
        lambda outputs, batch: _loss_of(outputs, batch, data.classes),
        **block.model_dump(exclude={"kind"}),
    )


def _factorization(block: options.Factorization, data: Info) -> Task:
    if not {"user", "item"} <= data.ids.keys() or "y" not in data.features:
        raise UserError(
            "model.kind: factorization reads ratings (user, item, y), the data has only "
            f"{', '.join(data.features)}; use data such as synthetic_ratings, or a data.target that gives them"
        )
    return ModuleTask(
        lambda rngs: Factorization(data.ids["user"], data.ids["item"], block.rank, rngs=rngs),
        lambda model, batch, key: losses.squared_error(
            model(batch["user"], batch["item"]), batch["y"], batch["weight"]
        ),
        lambda model, batch: model(batch["user"], batch["item"]),
    )


def _users_task(block: options.ModelTarget, data: Info) -> Task:
    """`target:` names a Task, something that returns one, or an nnx.Module class."""
    named = resolve(block.target)
    offered = {"features": data.features, "classes": data.classes, "vocabulary": data.vocabulary}
    if isinstance(named, type) and issubclass(named, nnx.Module):

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return call(block, "model", rngs=rngs, **offered)

        if block.loss is None:
            return module_task(build, classes=data.classes)
        return ModuleTask(build, resolve(block.loss), lambda model, batch: model(batch["x"]))
    if block.loss is not None:
        raise UserError(f"model.loss: has no effect, {block.target} is no nnx.Module class and brings its own")
    task = named if isinstance(named, Task) and not isinstance(named, type) else call(block, "model", **offered)
    if not isinstance(task, Task):
        raise UserError(
            f"model.target: {block.target} gave a {type(task).__name__}, which is no Task "
            "(it needs the methods init, loss and predict)"
        )
    return task
