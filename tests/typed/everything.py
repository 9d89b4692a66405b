"""Every name of the public surface in the hand of a user: `mypy --strict` must have nothing to say of it. It is not
run; test_typed.py asks whether a name is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinydiff
from tinydiff import Rng, Tensor, backend, data, functional, interop, metrics, nn, ops, optim, plot, saving
from tinydiff import diffusion as d
from tinydiff.trained import Trained
from tinydiff.training import CannotResume, InUse, TrainState, gradients, read_log, train, write_csv


@tinydiff.rebuildable
class Doubled(nn.Module):
    def __init__(self, by: float = 2.0) -> None:
        self.by = by

    def forward(self, x: Any, noise: Any) -> Any:
        return x * self.by


def loaded() -> Path:
    Trained(d.Denoiser(Doubled(3.0), 0.5), d.KarrasSDE(), (8, 8, 1)).save("double.npz")
    trained = tinydiff.load("double.npz")
    x: Any = trained.sample(2, 0, steps=3)
    plot.picture_files(x, "pictures", low=trained.low, high=trained.high)
    return Path("pictures")


def engine(x: Tensor) -> float:
    y: Tensor = tinydiff.tensor([1.0, 2.0], requires_grad=True)
    y.name = "y"
    first: list[Tensor] = list(tinydiff.grad((x * y).sum(), [x, y]))
    z: Tensor = tinydiff.checkpoint(lambda a: a * a, x)
    with tinydiff.no_grad(), tinydiff.detect_anomaly():
        recorded: bool = tinydiff.grad_enabled()
    with backend.no_sync():
        x += 1
    try:
        ok: bool = tinydiff.gradcheck(lambda a: a * a, np.ones(2)).ok
    except tinydiff.GradcheckError as error:
        print(error)
    print(tinydiff.explain(z), tinydiff.exercises(), tinydiff.exercise("softmax"), tinydiff.profile(lambda: x * x))
    tinydiff.study.save(z, "page.html")
    shared: Tensor = tinydiff.from_dlpack(np.from_dlpack(x), copy=True)
    kind, number = x.__dlpack_device__()
    product: Tensor = functional.jvp(lambda a: a * a, x, x)[1] + functional.hvp(lambda a: (a * a).sum(), x, x)[1]
    matrix: Tensor = functional.jacobian(lambda a: a * a, x)
    print(first, recorded, ok, shared, kind, number, product, matrix)
    return x.item() + float(x.sum()) + len(x)


def every_op(x: Tensor, index: Any, rng: Rng) -> list[Tensor]:
    """x (N, N); some need other shapes to run."""
    return [
        ops.abs(x), ops.add(x, x), ops.astype(x, dtype="float64"), ops.attention(x, x, x, mask=None, scale=1.0),
        ops.avg_pool2d(x, kernel=2), ops.batch_norm(x, eps=1e-5), ops.broadcast_to(x, shape=(2, 3, 3)),
        ops.binary_cross_entropy_with_logits(x, x, reduction="sum"), ops.clip(x, low=0.0, high=1.0), ops.copy(x),
        ops.concatenate([x, x], axis=1), ops.conv1d(x, x, padding="same"), ops.conv2d(x, x, stride=2, groups=1),
        ops.conv_transpose2d(x, x, output_padding=1), ops.cos(x), ops.cross_entropy(x, index), ops.cumsum(x, axis=0),
        ops.divide(x, x), ops.dropout(x, p=0.5, rng=rng), ops.einsum("ij,jk->ik", x, x), ops.embedding(index, x),
        ops.erf(x), ops.exp(x), ops.expand_dims(x, axis=0), ops.expm1(x), ops.flip(x, axis=0), ops.getitem(x, index=0),
        ops.gelu(x, approximate="tanh"), ops.group_norm(x, groups=1, silu=True), ops.index_add(x, x, index=index),
        ops.layer_norm(x), ops.linear(x, x, x), ops.log(x), ops.log1p(x), ops.log_softmax(x), ops.logsumexp(x, axis=1),
        ops.matmul(x, x), ops.max(x), ops.max_pool2d(x, kernel=(2, 2)), ops.maximum(x, x), ops.mean(x, axis=(0, 1)),
        ops.min(x), ops.minimum(x, x), ops.mse_loss(x, x), ops.multiply(x, x), ops.negative(x),
        ops.pad(x, pad_width=[(1, 1)] * 2), ops.power(x, 2.0), ops.prod(x, keepdims=True), ops.relu(x),
        ops.reshape(x, shape=-1), ops.roll(x, shift=1),
        ops.scatter_add(x, index=index, shape=(9,)), ops.sigmoid(x), ops.sign(x), ops.silu(x), ops.sin(x),
        ops.softmax(x, axis=0), ops.softplus(x), *ops.split(x, 3), ops.sqrt(x), ops.square(x), ops.squeeze(x),
        ops.stack([x, x]), ops.subtract(x, x), ops.sum(x, axis=0), ops.swapaxes(x, axis1=0, axis2=1),
        ops.take(x, index, axis=0), ops.take_along_axis(x, index, axis=0), ops.tanh(x), ops.tile(x, reps=(2, 1)),
        ops.transpose(x, axes=(1, 0)), ops.tril(x), ops.triu(x, k=1), ops.upsample_nearest2d(x, scale=2),
        ops.var(x, ddof=1), ops.where(index, x, x),
    ]  # fmt: skip


class Net(nn.Module):
    def __init__(self, rng: Rng) -> None:
        self.scale, self.constant = nn.Parameter(np.ones(3)), nn.Setting(0.5)
        self.layers: list[nn.Module] = [
            nn.Conv1d(1, 1, 3, rng=rng), nn.Conv2d(1, 1, (3, 3), padding="same", rng=rng), nn.BatchNorm2d(4),
            nn.ConvTranspose2d(1, 1, 3, output_padding=1, stride=2, rng=rng), nn.Dropout(0.1, rng=rng), nn.Identity(),
            nn.Embedding(10, 4, rng=rng), nn.Flatten(), nn.FourierFeatures(4, rng=rng), nn.GELU(), nn.GroupNorm(2, 4),
            nn.LayerNorm(4), nn.LearnedPositions(5, 4, rng=rng), nn.Linear(4, 4, bias=False, rng=nn.Unfilled()),
            nn.MultiHeadAttention(4, 2, rng=rng), nn.ReLU(), nn.Sequential(nn.SiLU(), nn.Sigmoid(), nn.Tanh()),
            nn.SinusoidalPositions(5, 4), nn.TransformerBlock(4, 2, rng=rng),
        ]  # fmt: skip

    def forward(self, x: Any, t: Any = None, **condition: Any) -> Any:
        return x


def optimisers(net: nn.Module) -> None:
    average = optim.EMA(net, decay=0.99)
    schedules: list[Callable[[int], float]] = [
        optim.constant(), optim.cosine(10), optim.exponential(0.9), optim.warmup(5, optim.cosine(10)),
    ]  # fmt: skip
    every: list[optim.Optimizer] = [
        optim.SGD(net.parameters(), lr=0.1, momentum=0.9), optim.Adam(net.parameters()), optim.AdamW(net.parameters()),
    ]  # fmt: skip
    for optimizer, schedule in zip(every, schedules):
        optimizer.lr = 0.1 * schedule(3)
        optimizer.zero_grad()
        optim.clip_grad_norm(net.parameters(), 1.0)
        optimizer.step()
    average.update()
    with average.applied():
        net.eval()


def diffusion(net: Net, x0: Any, rng: Rng) -> list[Any]:
    processes: list[Any] = [
        d.Brownian(2.0), d.FlowSDE(), d.KarrasSDE(80.0), d.SubVPSDE(), d.VESDE(25.0), d.VPSDE(d.CosineSchedule()),
        d.VPSDE(d.LinearSchedule(0.1, 20.0)), d.process("vp", schedule="cosine"),
    ]  # fmt: skip
    process = processes[0]
    denoiser, model = d.Denoiser(net, sigma_data=0.5), d.ScoreModel(net, process, "noise")
    losses: list[Tensor] = [
        d.denoising_loss(model, x0, rng), d.edm_loss(denoiser, x0, rng), d.likelihood_loss(model, x0, rng),
        d.score_matching_loss(net, x0, process, rng, sample_offset=3, digit=7),
    ]  # fmt: skip
    methods: list[d.Method] = [
        d.ddim(eta=1.0), d.ddpm(), d.dpm_solver(), d.euler_maruyama(), d.heun(s_churn=1.0), d.predictor_corrector(),
        d.probability_flow(solver="euler"), d.rk45(rtol=1e-3), d.METHODS["heun"],
    ]  # fmt: skip

    @d.method(steps=5)
    def mine(state: Any, *, stretch: float = 1.0) -> Any:
        return state.x * stretch

    told = d.drop_labels({"digit": np.zeros(2, "int64")}, 0.1, rng, sample_offset=1)
    guided, counted = d.Guided(denoiser, 1.0, interval=(0.3, 5.0), **told), d.Counted(denoiser)
    samples = [
        d.sample(guided, (2, 4), process, rng, method=method, steps=d.steps_for(method, 35)) for method in methods
    ]
    samples += [d.sample(counted, (2, 4), process, 0, method=mine(stretch=0.5), timesteps=d.uniform_times)]
    samples += [d.inpaint(model, x0, x0 > 0, process, rng, timesteps=d.karras_times)]
    level: float = d.sigma_at(process, d.time_at(process, 0.5))
    score = d.score_of(denoiser, process)
    return [losses, samples, level, counted.nfe, d.log_likelihood(score, x0, process, rng),
            d.bits_per_dimension(score, x0, process, rng)]  # fmt: skip


def files_and_data(net: Net, out: Path) -> None:
    digits: data.Digits = data.mnist(out, "test")
    drawn: data.Glyphs = data.glyphs(100, 0, variety=next(iter(data.VARIETIES)))
    scenes: data.Scenes = data.scenes(10, side=32)
    try:
        pictures: data.Pictures = data.folder("pets", size=(32, 64), classes="species", on_error="skip")
        training, validation = pictures.split(0.1)
    except data.DownloadError as error:
        print(error)
    masks = data.hold_out(drawn.captions, 0.1) | data.validation_mask(drawn.captions, 0.1)
    mixture = data.GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.1, 0.2])
    order = data.Batches(100, 10, seed=1).indices(3)
    images = data.to_float(digits.images, -1, 1)[order]
    saving.save(out / "all.npz", {"model": net.state_dict()})
    saving.save_weights(out / "net.safetensors", interop.to_torch(net))
    interop.from_torch(net, saving.load_weights(str(out / "net.safetensors")))
    net.load_state_dict(saving.load(out / "all.npz")["model"])
    saving.write_atomically(saving.cache_dir("mine") / "file", lambda file: file.write(b""))
    print(training, validation, masks, scenes.labels, mixture.sample(3, 0), images, data.ATTRIBUTES, data.SCENE)
    print([name for name, axes in interop.axes_of(net) if len(axes) == 2], interop.from_dlpack(images))
    print(interop.from_bfloat16(b"\0\0", (1,)))


def learn(net: Net, loss: Callable[..., Tensor], images: Any) -> int:
    gradients(loss, list(net.parameters()), (images,), Rng(0), size=8)
    try:
        state: TrainState = train(net, loss, images, optim.Adam(net.parameters()), epochs=1, batch_size=8, out="runs")
    except (CannotResume, InUse):
        return 1
    plot.loss_curve(state.records, "loss.png", x="step")
    write_csv(read_log("runs"), "runs/log.csv")
    return state.exit_code


def judge(a: Any, b: Any) -> None:
    shares: list[metrics.Share] = [metrics.accuracy(a, b), *metrics.precision_recall(a, b, k=3), metrics.copied(a, b)]
    shares += metrics.conditional_accuracy({"digit": a}, {"digit": b}).values()
    distance: float = metrics.frechet_distance(a, b)
    nearest, far = metrics.nearest(a, b)
    figure = plot.new_figure(plot.text_width("title", 10) + 3, 3)
    plot.frame(figure.add_subplot(), "title", x="step")
    plot.save(figure, "figure.png")
    plot.image_grid(a, "images.png", rows=2, low=-1, high=1)
    plot.matrix(a, "matrix.png", labels=["a", "b"], low=0, high=1)
    print(shares[0].value, distance, nearest, far)
